#include <algorithm>
#include <cmath>

#include "engine/finish.h"

namespace mixbits {
namespace {

int code_of(const Rounding& to, float value) {
  const float ratio = value / to.step;
  if (to.kind == Rounding::edges) {
    return static_cast<int>(std::upper_bound(to.thresholds, to.thresholds + to.last, ratio) - to.thresholds);
  }
  const float code = to.kind == Rounding::odd ? std::nearbyint((ratio - to.level_min) / 2.0F)
                                              : std::nearbyint(ratio) - to.level_min;
  return static_cast<int>(std::clamp(code, 0.0F, static_cast<float>(to.last)));
}

std::uint8_t byte_of(const Rounding& to, float value) {
  const int code = code_of(to, value);
  return to.kind == Rounding::edges ? to.bytes[code] : static_cast<std::uint8_t>(code * to.byte_step);
}

bool round(const Rounding& to, const float* values, std::size_t count, std::uint8_t* bytes) {
  bool numbers = true;
  for (std::size_t i = 0; i < count; ++i) {
    numbers &= to.finite ? std::isfinite(values[i]) : !std::isnan(values[i]);
    bytes[i] = std::isnan(values[i]) ? 0 : byte_of(to, values[i]);
  }
  return numbers;
}

float residual(const Finish& f, std::ptrdiff_t at) {
  if (f.residual_kind == Finish::floats) return static_cast<const float*>(f.residual)[at];
  const int byte = static_cast<const std::uint8_t*>(f.residual)[at];
  return static_cast<float>(f.residual_scale * byte + f.residual_offset) * f.residual_step;
}

bool finish(const Finish& f, const Strip& strip) {
  bool numbers = true;
  const std::int32_t* acc = strip.acc;
  for (int y = strip.y0; y < strip.y1; ++y) {
    for (int x = 0; x < strip.width; ++x, acc += strip.ld) {
      const std::ptrdiff_t residual_at = y * f.residual_row + x * f.residual_pixel;
      for (int o = strip.o0; o < strip.o1; ++o) {
        float value = static_cast<float>(acc[o - strip.o0]) * f.scale[o] + f.bias[o];
        if (f.residual_kind != Finish::none) value += residual(f, residual_at + o);
        if (f.limited) value = std::min(std::max(value, f.low), f.high);
        if (f.floats_out != nullptr) f.floats_out[y * f.floats_row + x * f.floats_pixel + o] = value;
        for (int map = 0; map < f.byte_maps; ++map) {
          const ByteMap& to = f.maps[map];
          numbers &= round(to.rounding, &value, 1, to.data + y * to.row + x * to.pixel + o);
        }
      }
      for (int map = 0; strip.o1 == strip.outputs && map < f.byte_maps; ++map) {
        std::uint8_t* pixel = f.maps[map].data + y * f.maps[map].row + x * f.maps[map].pixel;
        std::fill(pixel + strip.outputs, pixel + strip.fill, std::uint8_t{0});
      }
    }
  }
  return numbers;
}

}  // namespace

const Finisher kFinishPortable = {.isa = Isa::portable, .finish = finish, .round = round};

const Finisher& finisher() {
  static const Finisher& best = []() -> const Finisher& {
#if defined(__x86_64__)
    if (usable(Isa::avx512)) return kFinishAvx512;
    if (usable(Isa::avx2)) return kFinishAvx2;
#endif
    return kFinishPortable;
  }();
  return best;
}

}  // namespace mixbits
