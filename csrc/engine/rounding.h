// Roundings made ready: limits, reciprocals, and the proof that a reciprocal gives the codes of a division.
#pragma once

#include <vector>

#include "engine/finish.h"

namespace mixbits {

// A uniform grid: codes 0 .. last of the levels level_min + spacing * code, spacing 1 or 2, stored as code *
// byte_step.
Rounding uniform_rounding(float step, int level_min, int spacing, int last, int byte_step);

// A codebook: thresholds in steps, and the byte of each of their number + 1 codes.
Rounding codebook_rounding(float step, const std::vector<float>& thresholds,
                           const std::vector<std::uint8_t>& bytes);

}  // namespace mixbits
