// What a kernel can reach at most: the instructions that its inner loop repeats, alone, from registers.
//
// A ceiling is measured, not looked up: what starts a cycle differs from CPU to CPU, and so does the clock
// under wide instructions.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/isa.h"

namespace mixbits {

struct Ceiling {
  const char* name;  // the instructions
  Isa isa;
  // Repeats them `rounds` times (a multiple of kCeilingSums) without waiting for results.
  void (*run)(std::int64_t rounds);
};

// Sums that grow in turn: enough to hide a latency of 5 cycles where two instructions start a cycle, and few
// enough for the 16 registers of AVX2.
inline constexpr int kCeilingSums = 12;

// Defining one at namespace scope makes it known.
struct RegisteredCeiling {
  explicit RegisteredCeiling(const Ceiling& ceiling);
};

const std::vector<const Ceiling*>& all_ceilings();

}  // namespace mixbits
