#include "engine/rounding.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

namespace mixbits {
namespace {

constexpr int kNeighbours =
    16;  // floats on either side of a threshold on which the two quotients are compared

float bounded(double value) {
  return static_cast<float>(std::clamp(value, -double{FLT_MAX}, double{FLT_MAX}));
}

int code_of(const Rounding& to, float ratio) {
  const float code = to.kind == Rounding::odd ? std::nearbyint((ratio - to.level_min) * 0.5F)
                                              : std::nearbyint(ratio) - to.level_min;
  return static_cast<int>(std::clamp(code, 0.0F, static_cast<float>(to.last)));
}

float divided(const Rounding& to, float value) { return std::clamp(value, to.low, to.high) / to.step; }

// The quotient by reciprocal and one correction (Markstein 1990): within a unit of the last place of the true
// one, nearly always the same.
float corrected(const Rounding& to, float value) {
  value = std::clamp(value, to.low, to.high);
  const float quotient = value * to.inverse;
  return std::fma(std::fma(-quotient, to.step, value), to.inverse, quotient);
}

// Floats in their order as integers.
std::int64_t order_of(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits >= 0 ? bits : std::int64_t{INT32_MIN} - bits;
}

float at_order(std::int64_t order) {
  return std::bit_cast<float>(
      static_cast<std::int32_t>(order >= 0 ? order : std::int64_t{INT32_MIN} - order));
}

// The order of the least float with at least this code.
std::int64_t reaches(const Rounding& to, int code) {
  std::int64_t below = order_of(to.low), from = order_of(to.high);
  while (from - below > 1) {
    const std::int64_t middle = below + (from - below) / 2;
    (code_of(to, divided(to, at_order(middle))) >= code ? from : below) = middle;
  }
  return from;
}

// Codes change only where the quotient passes a threshold, and the two quotients differ by a unit of their
// last place at most: if all floats near each threshold have the same code either way, all floats have.
bool reciprocal_is_exact(const Rounding& to) {
  if (!(to.step > 0x1p-60F && to.step < 0x1p60F)) return false;  // corrections could underflow or overflow
  for (int code = 1; code <= to.last; ++code) {
    const std::int64_t from = reaches(to, code);
    for (std::int64_t order = from - kNeighbours; order <= from + kNeighbours; ++order) {
      const float value = at_order(order);
      if (code_of(to, divided(to, value)) != code_of(to, corrected(to, value))) return false;
    }
  }
  return true;
}

}  // namespace

Rounding uniform_rounding(float step, int level_min, int spacing, int last, int byte_step) {
  Rounding to;
  to.kind = spacing == 2 ? Rounding::odd : Rounding::even;
  to.step = step;
  to.inverse = static_cast<float>(1.0 / double{step});
  to.level_min = static_cast<float>(level_min);
  to.last = last;
  to.byte_step = byte_step;
  to.low = bounded(double{step} * level_min);
  to.high = bounded(double{step} * (level_min + spacing * last));
  to.divide = !reciprocal_is_exact(to);
  for (int code = 1; code <= std::min(last, Rounding::kFew); ++code) {
    to.reached[code - 1] = at_order(reaches(to, code));
  }
  return to;
}

Rounding codebook_rounding(float step, const std::vector<float>& thresholds,
                           const std::vector<std::uint8_t>& bytes) {
  Rounding to;
  to.kind = Rounding::edges;
  to.step = step;
  to.last = static_cast<int>(thresholds.size());
  to.low = bounded(double{step} * (double{thresholds.front()} - 1));
  to.high = bounded(double{step} * (double{thresholds.back()} + 1));
  std::copy(thresholds.begin(), thresholds.end(), to.thresholds);
  std::copy(bytes.begin(), bytes.end(), to.bytes);
  return to;
}

}  // namespace mixbits
