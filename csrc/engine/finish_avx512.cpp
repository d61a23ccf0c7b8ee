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

// The two roundings that nearly every layer has, on their own, with the layer's limits taken in: codes rise
// with values, so a limit only moves where they start and end.
template <int Last>
struct Thresholds {
  Thresholds(const Rounding& to, const Finish& f)
      : byte_step(_mm_set1_epi8(static_cast<char>(to.byte_step))) {
    for (int i = 0; i < Last; ++i) {
      float least = to.reached[i];
      if (f.limited && f.low >= least) least = -__builtin_inff();           // always reached
      if (f.limited && f.high < to.reached[i]) least = __builtin_nanf("");  // never
      reached[i] = _mm512_set1_ps(least);
    }
  }
  __m128i operator()(__m512 value) const {
    __m128i byte = _mm_maskz_mov_epi8(_mm512_cmp_ps_mask(value, reached[0], _CMP_GE_OQ), byte_step);
    for (int i = 1; i < Last; ++i) {
      const __mmask16 more = _mm512_cmp_ps_mask(value, reached[i], _CMP_GE_OQ);
      byte = _mm_mask_add_epi8(byte, more, byte, byte_step);
    }
    return byte;
  }
  __m512 reached[Last];
  __m128i byte_step;
};

struct Reciprocal {
  Reciprocal(const Rounding& to, const Finish& f)
      : step(_mm512_set1_ps(to.step)),
        inverse(_mm512_set1_ps(to.inverse)),
        low(_mm512_set1_ps(f.limited && f.low > to.low ? f.low : to.low)),
        high(_mm512_set1_ps(f.limited && f.high < to.high ? f.high : to.high)),
        first_level(_mm_set1_epi8(static_cast<char>(static_cast<int>(to.level_min)))) {}
  __m128i operator()(__m512 value) const {
    value = _mm512_min_ps(_mm512_max_ps(value, low), high);
    const __m512 quotient = _mm512_mul_ps(value, inverse);
    const __m512 ratio = _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, step, value), inverse, quotient);
    return _mm_sub_epi8(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(ratio)), first_level);
  }
  __m512 step, inverse, low, high;
  __m128i first_level;
};

bool round(const Rounding& to, const float* values, std::size_t count, std::uint8_t* bytes) {
  const Rounder rounder(to);
  __mmask16 not_numbers = 0;
  for (std::size_t i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = first(static_cast<int>(count - i < kLanes ? count - i : kLanes));
    const __m512 value = _mm512_maskz_loadu_ps(lanes, values + i);
    // What is infinite minus itself is not a number.
    const __m512 number = to.finite ? _mm512_sub_ps(value, value) : value;
    not_numbers |= _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q);
    const __m128i found = rounder.bytes(value);
    if (lanes == 0xFFFF) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), found);
    } else {
      _mm_mask_storeu_epi8(bytes + i, lanes, found);
    }
  }
  return not_numbers == 0;
}

// What happens to the values of a strip. The numbers of it all are copied: bytes are stored between their
// uses, and a store of a byte could change anything that is not a local variable.
template <Finish::Residual Kind>
struct Values {
  explicit Values(const Finish& f)
      : scale(f.scale),
        bias(f.bias),
        step(_mm512_set1_ps(f.residual_step)),
        level_scale(_mm512_set1_epi32(f.residual_scale)),
        level_offset(_mm512_set1_epi32(f.residual_offset)) {}

  // Of sixteen channels from `o` on; `residual` is that of the first.
  __m512 at(const std::int32_t* acc, int o, const void* residual, __mmask16 lanes) const {
    __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(acc));
    value = _mm512_add_ps(_mm512_mul_ps(value, _mm512_load_ps(scale + o)), _mm512_load_ps(bias + o));
    if constexpr (Kind == Finish::bytes) {
      const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(residual)));
      const __m512i level = _mm512_add_epi32(_mm512_mullo_epi32(byte, level_scale), level_offset);
      value = _mm512_add_ps(value, _mm512_mul_ps(_mm512_cvtepi32_ps(level), step));
    } else if constexpr (Kind == Finish::floats) {
      value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, residual));
    }
    return value;
  }

  const float* const scale;
  const float* const bias;
  const __m512 step;
  const __m512i level_scale, level_offset;
};

constexpr std::ptrdiff_t size_of(Finish::Residual kind) { return kind == Finish::floats ? sizeof(float) : 1; }

void store_bytes(std::uint8_t* at, __m128i bytes, __mmask16 lanes, int end) {
  if (lanes == 0xFFFF) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
  } else {
    _mm_mask_storeu_epi8(at, first(end), _mm_maskz_mov_epi8(lanes, bytes));
  }
}

// The usual case: sums become bytes of one grid, and all values are numbers.
template <Finish::Residual Kind, class Round>
void finish_bytes(const Finish& f, const Strip& strip, const Round round) {
  const Values<Kind> values(f);
  const int o0 = strip.o0, o1 = strip.o1, end = o1 == strip.outputs ? strip.fill : o1;
  const std::ptrdiff_t residual_pixel = f.residual_pixel * size_of(Kind), pixel = f.maps[0].pixel;
  const std::int32_t* acc = strip.acc - o0;
  for (int y = strip.y0; y < strip.y1; ++y) {
    const auto* residual = static_cast<const std::uint8_t*>(f.residual) + y * f.residual_row * size_of(Kind);
    std::uint8_t* out = f.maps[0].data + y * f.maps[0].row;
    for (int x = 0; x < strip.width; ++x, acc += strip.ld, residual += residual_pixel, out += pixel) {
      for (int o = o0; o < o1; o += kLanes) {
        const __mmask16 lanes = first(o1 - o);
        const __m512 value = values.at(acc + o, o, residual + o * size_of(Kind), lanes);
        store_bytes(out + o, round(value), lanes, end - o);
      }
    }
  }
}

template <Finish::Residual Kind>
bool finish_strip(const Finish& f, const Strip& strip) {
  const Rounder rounder(f.maps[0].rounding);
  const Rounding& to = f.maps[0].rounding;
  if (f.byte_maps == 1 && f.floats_out == nullptr && f.always_numbers &&
      (!f.limited || (f.low <= to.high && f.high >= to.low && f.low <= f.high))) {
    if (to.kind != Rounding::edges && to.last == 1) {
      const Thresholds<1> round(to, f);
      finish_bytes<Kind>(f, strip, round);
      return true;
    }
    if (to.kind != Rounding::edges && to.last == 3) {
      const Thresholds<3> round(to, f);
      finish_bytes<Kind>(f, strip, round);
      return true;
    }
    if (to.kind == Rounding::even && !to.divide && to.byte_step == 1) {
      const Reciprocal round(to, f);
      finish_bytes<Kind>(f, strip, round);
      return true;
    }
  }
  const Values<Kind> values(f);
  const __m512 low = _mm512_set1_ps(f.low), high = _mm512_set1_ps(f.high);
  __mmask16 not_numbers = 0;
  const std::int32_t* acc = strip.acc - strip.o0;
  for (int y = strip.y0; y < strip.y1; ++y) {
    for (int x = 0; x < strip.width; ++x, acc += strip.ld) {
      const auto* residual = static_cast<const std::uint8_t*>(f.residual) +
                             (y * f.residual_row + x * f.residual_pixel) * size_of(Kind);
      for (int o = strip.o0; o < strip.o1; o += kLanes) {
        const __mmask16 lanes = first(strip.o1 - o);
        __m512 value = values.at(acc + o, o, residual + o * size_of(Kind), lanes);
        // A limit lets what is not a number through, as NumPy's maximum and minimum do: it is the second
        // operand.
        if (f.limited) value = _mm512_min_ps(high, _mm512_max_ps(low, value));
        if (f.floats_out != nullptr) {
          float* into = f.floats_out + y * f.floats_row + x * f.floats_pixel + o;
          if (lanes == 0xFFFF) {
            _mm512_storeu_ps(into, value);
          } else {
            _mm512_mask_storeu_ps(into, lanes, value);
          }
        }
        if (f.byte_maps == 0) continue;
        if (!f.always_numbers) not_numbers |= _mm512_mask_cmp_ps_mask(lanes, value, value, _CMP_UNORD_Q);
        const int end = (strip.o1 == strip.outputs ? strip.fill : strip.o1) - o;
        for (int map = 0; map < f.byte_maps; ++map) {
          const ByteMap& into = f.maps[map];
          const __m128i bytes = map == 0 ? rounder.bytes(value) : Rounder(into.rounding).bytes(value);
          store_bytes(into.data + y * into.row + x * into.pixel + o, bytes, lanes, end);
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
