#include <immintrin.h>

#include "engine/finish.h"

namespace mixbits {
namespace {

constexpr int kLanes = 16;

__mmask16 first(int count) { return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1U << count) - 1); }

// A rounding with its numbers in registers.
struct Rounder {
  explicit Rounder(const Rounding& to)
      : to(to),
        step(_mm512_set1_ps(to.step)),
        inverse(_mm512_set1_ps(to.inverse)),
        level_min(_mm512_set1_ps(to.level_min)),
        low(_mm512_set1_ps(to.low)),
        high(_mm512_set1_ps(to.high)),
        first_level(_mm_set1_epi8(static_cast<char>(static_cast<int>(to.level_min)))),
        byte_step(_mm_set1_epi8(static_cast<char>(to.byte_step))) {}

  // value / step as float32 division gives it, or close enough that the code is the same (Rounding::divide).
  __m512 ratio(__m512 value) const {
    value = _mm512_min_ps(_mm512_max_ps(value, low), high);
    if (to.divide) return _mm512_div_ps(value, step);
    const __m512 quotient = _mm512_mul_ps(value, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, step, value), inverse, quotient);
  }

  // Sixteen bytes of sixteen values that are numbers.
  __m128i bytes(__m512 value) const {
    if (to.kind == Rounding::edges) return of_codebook(ratio(value));
    if (to.last <= Rounding::kFew) return of_few(value);
    __m128i code;  // modulo 256, which is all that is kept
    if (to.kind == Rounding::even) {
      code = _mm_sub_epi8(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(ratio(value))), first_level);
    } else {
      const __m512 half = _mm512_mul_ps(_mm512_sub_ps(ratio(value), level_min), _mm512_set1_ps(0.5F));
      code = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(half));
    }
    return to.byte_step == 1 ? code : _mm_add_epi8(code, code);
  }

 private:
  __m128i of_few(__m512 value) const {
    __m128i byte = _mm_maskz_mov_epi8(at_least(value, to.reached[0]), byte_step);
    for (int code = 1; code < to.last; ++code) {
      byte = _mm_mask_add_epi8(byte, at_least(value, to.reached[code]), byte, byte_step);
    }
    return byte;
  }

  static __mmask16 at_least(__m512 value, float threshold) {
    return _mm512_cmp_ps_mask(value, _mm512_set1_ps(threshold), _CMP_GE_OQ);
  }

  __m128i of_codebook(__m512 q) const {
    __m512i code = _mm512_setzero_si512();
    for (int i = 0; i < to.last; ++i) {
      code = _mm512_mask_add_epi32(code, at_least(q, to.thresholds[i]), code, _mm512_set1_epi32(1));
    }
    alignas(64) std::int32_t codes[kLanes];
    alignas(16) std::uint8_t found[kLanes];
    _mm512_store_si512(codes, code);
    for (int i = 0; i < kLanes; ++i) found[i] = to.bytes[codes[i]];
    return _mm_load_si128(reinterpret_cast<const __m128i*>(found));
  }

  const Rounding& to;
  const __m512 step, inverse, level_min, low, high;
  const __m128i first_level, byte_step;
};

bool round(const Rounding& to, const float* values, std::size_t count, std::uint8_t* bytes) {
  const Rounder rounder(to);
  __mmask16 not_numbers = 0;
  for (std::size_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first(static_cast<int>(count - i < kLanes ? count - i : kLanes));
    const __m512 value = _mm512_maskz_loadu_ps(lanes, values + i);
    not_numbers |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m128i found = rounder.bytes(value);
    if (lanes == 0xFFFF) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), found);
    } else {
      _mm_mask_storeu_epi8(bytes + i, lanes, found);
    }
  }
  return not_numbers == 0;
}

// One layer's finish with its numbers in registers; Kind is that of the residual.
template <Finish::Residual Kind>
bool finish_strip(const Finish& f, const Strip& strip) {
  const __m512 residual_step = _mm512_set1_ps(f.residual_step);
  const __m512i residual_scale = _mm512_set1_epi32(f.residual_scale);
  const __m512i residual_offset = _mm512_set1_epi32(f.residual_offset);
  const __m512 low = _mm512_set1_ps(f.low), high = _mm512_set1_ps(f.high);
  // One byte map is what nearly every layer has; its numbers stay in registers.
  const Rounder rounder(f.maps[0].rounding);
  __mmask16 not_numbers = 0;
  const std::int32_t* acc = strip.acc;
  for (int y = strip.y0; y < strip.y1; ++y) {
    for (int x = 0; x < strip.width; ++x, acc += strip.ld) {
      const std::ptrdiff_t residual_at = y * f.residual_row + x * f.residual_pixel;
      for (int o = strip.o0; o < strip.o1; o += kLanes) {
        const __mmask16 lanes = first(strip.o1 - o);
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(acc + o - strip.o0));
        value = _mm512_add_ps(_mm512_mul_ps(value, _mm512_load_ps(f.scale + o)), _mm512_load_ps(f.bias + o));
        if constexpr (Kind == Finish::bytes) {
          const auto* bytes = static_cast<const std::uint8_t*>(f.residual) + residual_at + o;
          const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
          const __m512i level = _mm512_add_epi32(_mm512_mullo_epi32(byte, residual_scale), residual_offset);
          value = _mm512_add_ps(value, _mm512_mul_ps(_mm512_cvtepi32_ps(level), residual_step));
        } else if constexpr (Kind == Finish::floats) {
          value = _mm512_add_ps(
              value, _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(f.residual) + residual_at + o));
        }
        // A limit lets what is not a number through, as NumPy's maximum and minimum do: it is the second
        // operand.
        if (f.limited) value = _mm512_min_ps(high, _mm512_max_ps(low, value));
        if (f.floats_out != nullptr) {
          float* to = f.floats_out + y * f.floats_row + x * f.floats_pixel + o;
          if (lanes == 0xFFFF) {
            _mm512_storeu_ps(to, value);
          } else {
            _mm512_mask_storeu_ps(to, lanes, value);
          }
        }
        if (f.byte_maps == 0) continue;
        if (!f.always_numbers) not_numbers |= _mm512_mask_cmp_ps_mask(lanes, value, value, _CMP_UNORD_Q);
        for (int map = 0; map < f.byte_maps; ++map) {
          const ByteMap& to = f.maps[map];
          const __m128i bytes = map == 0 ? rounder.bytes(value) : Rounder(to.rounding).bytes(value);
          std::uint8_t* at = to.data + y * to.row + x * to.pixel + o;
          if (lanes == 0xFFFF) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
          } else {
            const int end = strip.o1 == strip.outputs ? strip.fill : strip.o1;
            _mm_mask_storeu_epi8(at, first(end - o), _mm_maskz_mov_epi8(lanes, bytes));
          }
        }
      }
    }
  }
  return not_numbers == 0;
}

bool finish(const Finish& f, const Strip& strip) {
  switch (f.residual_kind) {
    case Finish::bytes: return finish_strip<Finish::bytes>(f, strip);
    case Finish::floats: return finish_strip<Finish::floats>(f, strip);
    default: return finish_strip<Finish::none>(f, strip);
  }
}

}  // namespace

const Finisher kFinishAvx512 = {.isa = Isa::avx512, .finish = finish, .round = round};

}  // namespace mixbits
