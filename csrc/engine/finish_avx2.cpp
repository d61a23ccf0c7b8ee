#include <immintrin.h>

#include "engine/finish.h"

namespace mixbits {
namespace {

constexpr int kLanes = 8;

// Of a vector, the lanes that are used: all, or the first `count`.
struct Lanes {
  explicit Lanes(std::ptrdiff_t left) : count(left < kLanes ? static_cast<int>(left) : kLanes) {}
  bool all() const { return count == kLanes; }
  __m256i mask() const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  int count;
};

__m256 load_floats(const void* from, Lanes lanes) {
  const auto* values = static_cast<const float*>(from);
  return lanes.all() ? _mm256_loadu_ps(values) : _mm256_maskload_ps(values, lanes.mask());
}

void store_floats(float* at, __m256 values, Lanes lanes) {
  if (lanes.all()) {
    _mm256_storeu_ps(at, values);
  } else {
    _mm256_maskstore_ps(at, lanes.mask(), values);
  }
}

// Bytes that are held as int32, which are in 0 .. 255. Of a part of a vector, `end` bytes are stored, those
// behind its lanes as 0.
void store_bytes(std::uint8_t* at, __m256i bytes, Lanes lanes, int end) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  const __m128i packed = _mm_packus_epi16(words, words);
  if (lanes.all()) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), packed);
    return;
  }
  alignas(16) std::uint8_t found[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(found), packed);
  for (int i = 0; i < end; ++i) at[i] = i < lanes.count ? found[i] : std::uint8_t{0};
}

// 32 bytes that are held as int32, eight a vector.
void store_bytes(std::uint8_t* at, __m256i first, __m256i second, __m256i third, __m256i fourth) {
  const __m256i packed =
      _mm256_packus_epi16(_mm256_packs_epi32(first, second), _mm256_packs_epi32(third, fourth));
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing is by halves
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_permutevar8x32_epi32(packed, in_order));
}

// Where value >= threshold: `byte`, elsewhere 0.
__m256i if_reached(__m256 value, __m256 threshold, __m256i byte) {
  return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_GE_OQ)), byte);
}

// value / step by reciprocal and one correction (rounding.cpp).
__m256 corrected(__m256 value, __m256 step, __m256 inverse) {
  const __m256 quotient = _mm256_mul_ps(value, inverse);
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, step, value), inverse, quotient);
}

// A rounding with its numbers in registers.
struct Rounder {
  explicit Rounder(const Rounding& to)
      : to(to),
        step(_mm256_set1_ps(to.step)),
        inverse(_mm256_set1_ps(to.inverse)),
        level_min(_mm256_set1_ps(to.level_min)),
        low(_mm256_set1_ps(to.low)),
        high(_mm256_set1_ps(to.high)),
        byte_step(_mm256_set1_epi32(to.byte_step)) {}

  // Eight bytes, as int32, of eight values that are numbers.
  __m256i bytes(__m256 value) const {
    if (to.kind == Rounding::edges) return of_codebook(ratio(value));
    if (to.last <= Rounding::kFew) return of_few(value);
    __m256i code;
    if (to.kind == Rounding::even) {
      code = _mm256_sub_epi32(_mm256_cvtps_epi32(ratio(value)), _mm256_cvtps_epi32(level_min));
    } else {
      const __m256 half = _mm256_mul_ps(_mm256_sub_ps(ratio(value), level_min), _mm256_set1_ps(0.5F));
      code = _mm256_cvtps_epi32(half);
    }
    return to.byte_step == 1 ? code : _mm256_add_epi32(code, code);
  }

 private:
  // value / step as float32 division gives it, or close enough that the code is the same (Rounding::divide).
  __m256 ratio(__m256 value) const {
    value = _mm256_min_ps(_mm256_max_ps(value, low), high);
    return to.divide ? _mm256_div_ps(value, step) : corrected(value, step, inverse);
  }

  __m256i of_few(__m256 value) const {
    __m256i byte = _mm256_setzero_si256();
    for (int code = 0; code < to.last; ++code) {
      byte = _mm256_add_epi32(byte, if_reached(value, _mm256_set1_ps(to.reached[code]), byte_step));
    }
    return byte;
  }

  __m256i of_codebook(__m256 q) const {
    const __m256i one = _mm256_set1_epi32(1);
    __m256i code = _mm256_setzero_si256();
    for (int i = 0; i < to.last; ++i) {
      code = _mm256_add_epi32(code, if_reached(q, _mm256_set1_ps(to.thresholds[i]), one));
    }
    alignas(32) std::int32_t codes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes), code);
    for (std::int32_t& found : codes) found = to.bytes[found];
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
  }

  const Rounding& to;
  const __m256 step, inverse, level_min, low, high;
  const __m256i byte_step;
};

// The two roundings that nearly every layer has, on their own, with the layer's limits taken in: codes rise
// with values, so a limit only moves where they start and end.
template <int Last>
struct Thresholds {
  Thresholds(const Rounding& to, const Finish& f) : byte_step(_mm256_set1_epi32(to.byte_step)) {
    for (int i = 0; i < Last; ++i) {
      float least = to.reached[i];
      if (f.limited && f.low >= least) least = -__builtin_inff();           // always reached
      if (f.limited && f.high < to.reached[i]) least = __builtin_nanf("");  // never
      reached[i] = _mm256_set1_ps(least);
    }
  }
  __m256i operator()(__m256 value) const {
    __m256i byte = if_reached(value, reached[0], byte_step);
    for (int i = 1; i < Last; ++i) byte = _mm256_add_epi32(byte, if_reached(value, reached[i], byte_step));
    return byte;
  }
  __m256 reached[Last];
  __m256i byte_step;
};

struct Reciprocal {
  Reciprocal(const Rounding& to, const Finish& f)
      : step(_mm256_set1_ps(to.step)),
        inverse(_mm256_set1_ps(to.inverse)),
        low(_mm256_set1_ps(f.limited && f.low > to.low ? f.low : to.low)),
        high(_mm256_set1_ps(f.limited && f.high < to.high ? f.high : to.high)),
        first_level(_mm256_set1_epi32(static_cast<int>(to.level_min))) {}
  __m256i operator()(__m256 value) const {
    value = _mm256_min_ps(_mm256_max_ps(value, low), high);
    return _mm256_sub_epi32(_mm256_cvtps_epi32(corrected(value, step, inverse)), first_level);
  }
  __m256 step, inverse, low, high;
  __m256i first_level;
};

// The lanes of a vector that hold what is not a number, a bit each.
int not_numbers_of(__m256 values, Lanes lanes) {
  return _mm256_movemask_ps(_mm256_cmp_ps(values, values, _CMP_UNORD_Q)) & ((1 << lanes.count) - 1);
}

bool round(const Rounding& to, const float* values, std::size_t count, std::uint8_t* bytes) {
  const Rounder rounder(to);
  int not_numbers = 0;
  for (std::size_t i = 0; i < count; i += kLanes) {
    const Lanes lanes(static_cast<std::ptrdiff_t>(count - i));
    const __m256 value = load_floats(values + i, lanes);
    // What is infinite minus itself is not a number.
    not_numbers |= not_numbers_of(to.finite ? _mm256_sub_ps(value, value) : value, lanes);
    store_bytes(bytes + i, rounder.bytes(value), lanes, lanes.count);
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
        step(_mm256_set1_ps(f.residual_step)),
        level_scale(_mm256_set1_epi32(f.residual_scale)),
        level_offset(_mm256_set1_epi32(f.residual_offset)) {}

  // Of eight channels from `o` on; `residual` is that of the first.
  __m256 at(const std::int32_t* acc, int o, const void* residual, Lanes lanes) const {
    __m256 value = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc)));
    value = _mm256_add_ps(_mm256_mul_ps(value, _mm256_load_ps(scale + o)), _mm256_load_ps(bias + o));
    if constexpr (Kind == Finish::bytes) {
      const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(residual)));
      const __m256i level = _mm256_add_epi32(_mm256_mullo_epi32(byte, level_scale), level_offset);
      value = _mm256_add_ps(value, _mm256_mul_ps(_mm256_cvtepi32_ps(level), step));
    } else if constexpr (Kind == Finish::floats) {
      value = _mm256_add_ps(value, load_floats(residual, lanes));
    }
    return value;
  }

  const float* const scale;
  const float* const bias;
  const __m256 step;
  const __m256i level_scale, level_offset;
};

constexpr std::ptrdiff_t size_of(Finish::Residual kind) { return kind == Finish::floats ? sizeof(float) : 1; }

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
      int o = o0;
      for (; o + 4 * kLanes <= o1; o += 4 * kLanes) {
        const auto rounded = [&](int at) {
          return round(values.at(acc + at, at, residual + at * size_of(Kind), Lanes(kLanes)));
        };
        store_bytes(out + o, rounded(o), rounded(o + kLanes), rounded(o + 2 * kLanes),
                    rounded(o + 3 * kLanes));
      }
      for (; o < o1; o += kLanes) {
        const Lanes lanes(o1 - o);
        const __m256 value = values.at(acc + o, o, residual + o * size_of(Kind), lanes);
        store_bytes(out + o, round(value), lanes, end - o);
      }
    }
  }
}

template <Finish::Residual Kind>
bool finish_strip(const Finish& f, const Strip& strip) {
  const Rounding& to = f.maps[0].rounding;
  if (f.byte_maps == 1 && f.floats_out == nullptr && f.always_numbers &&
      (!f.limited || (f.low <= to.high && f.high >= to.low && f.low <= f.high))) {
    if (to.kind != Rounding::edges && to.last == 1) {
      finish_bytes<Kind>(f, strip, Thresholds<1>(to, f));
      return true;
    }
    if (to.kind != Rounding::edges && to.last == 3) {
      finish_bytes<Kind>(f, strip, Thresholds<3>(to, f));
      return true;
    }
    if (to.kind == Rounding::even && !to.divide && to.byte_step == 1) {
      finish_bytes<Kind>(f, strip, Reciprocal(to, f));
      return true;
    }
  }
  const Values<Kind> values(f);
  const Rounder rounder(to);
  const __m256 low = _mm256_set1_ps(f.low), high = _mm256_set1_ps(f.high);
  int not_numbers = 0;
  const std::int32_t* acc = strip.acc - strip.o0;
  for (int y = strip.y0; y < strip.y1; ++y) {
    for (int x = 0; x < strip.width; ++x, acc += strip.ld) {
      const auto* residual = static_cast<const std::uint8_t*>(f.residual) +
                             (y * f.residual_row + x * f.residual_pixel) * size_of(Kind);
      for (int o = strip.o0; o < strip.o1; o += kLanes) {
        const Lanes lanes(strip.o1 - o);
        __m256 value = values.at(acc + o, o, residual + o * size_of(Kind), lanes);
        // A limit lets what is not a number through, as NumPy's maximum and minimum do: it is the second
        // operand.
        if (f.limited) value = _mm256_min_ps(high, _mm256_max_ps(low, value));
        if (f.floats_out != nullptr) {
          store_floats(f.floats_out + y * f.floats_row + x * f.floats_pixel + o, value, lanes);
        }
        if (f.byte_maps == 0) continue;
        if (!f.always_numbers) not_numbers |= not_numbers_of(value, lanes);
        const int end = (strip.o1 == strip.outputs ? strip.fill : strip.o1) - o;
        for (int map = 0; map < f.byte_maps; ++map) {
          const ByteMap& into = f.maps[map];
          const __m256i bytes = map == 0 ? rounder.bytes(value) : Rounder(into.rounding).bytes(value);
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

const Finisher kFinishAvx2 = {.isa = Isa::avx2, .finish = finish, .round = round};

}  // namespace mixbits
