// The source of engine/vector.h's loops, plain C++ that compilers vectorize. It is included by one file for
// each instruction set, so all of it is in an anonymous namespace and calls nothing (kernels/kernel.h says
// why). kRegister, defined before the inclusion, is the size of its registers in bytes.

#include "engine/vector.h"

namespace mixbits {
namespace {

constexpr int kColumns = kRegister / 4;  // of a tile of `product`: two registers of doubles a row

// e**x is 2**n e**r with n the integer nearest to x / ln 2 and |r| <= ln 2 / 2, where the Taylor series to
// r**13 is exact to 2**-57.
struct Power {
  double scale;  // 2**n
  double rest;   // e**r - 1, relatively exact: no 1 was added
};

// `x` within -708 .. 709, where 2**n is a normal double.
inline Power power(double x) {
  constexpr double kLog2E = 1.4426950408889634;
  // ln 2 in two parts, the first of 32 bits, so that n times it is exact.
  constexpr double kLn2High = 0.69314718036912382, kLn2Low = 1.9082149292705877e-10;
  constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2**52: a sum with it is rounded to an integer
  const double rounded = x * kLog2E + kRounder;
  const double n = rounded - kRounder;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double sum = 1.0 / 6227020800.0;  // 1 / 13!
  sum = sum * r + 1.0 / 479001600.0;
  sum = sum * r + 1.0 / 39916800.0;
  sum = sum * r + 1.0 / 3628800.0;
  sum = sum * r + 1.0 / 362880.0;
  sum = sum * r + 1.0 / 40320.0;
  sum = sum * r + 1.0 / 5040.0;
  sum = sum * r + 1.0 / 720.0;
  sum = sum * r + 1.0 / 120.0;
  sum = sum * r + 1.0 / 24.0;
  sum = sum * r + 1.0 / 6.0;
  sum = sum * r + 0.5;
  // The low bits of `rounded` are n; moved into the exponent of a double they make 2**n.
  const long long bits = __builtin_bit_cast(long long, rounded);
  const double scale = __builtin_bit_cast(double, (bits << 52) + (1023LL << 52));
  return {scale, r + r * r * sum};
}

inline double clamped(double x, double low, double high) {
  x = x < low ? low : x;  // NaN stays
  return x > high ? high : x;
}

// e**x; below -708 it stays at 3e-308, which is 0 to a float32.
inline double exp_of(double x) {
  const Power e = power(clamped(x, -708, 709));
  const double y = e.scale + e.scale * e.rest;
  return x > 709 ? __builtin_inf() : y;
}

inline double sigmoid_of(double x) { return 1 / (1 + exp_of(-x)); }

// 1 - 2 / (e**2x + 1), arranged so that small x lose nothing.
inline double tanh_of(double x) {
  const double size = x < 0 ? -x : x;
  const Power e = power(clamped(2 * size, 0, 40));        // tanh(20) is 1
  const double above = e.scale * e.rest + (e.scale - 1);  // e**2x - 1
  const double y = above / (above + 2);
  return x < 0 ? -y : y;
}

// x tanh(log(1 + e**x)), with e**x as w: x (w**2 + 2 w) / (w**2 + 2 w + 2).
inline double mish_of(double x) {
  const double w = exp_of(clamped(x, -708, 40));  // from there on it is x
  const double above = w * (w + 2);
  return x * (above / (above + 2));
}

// erfc(z) = e**(-z**2) P(u), 0 <= z <= 6.5, beyond which it is below 2**-53; u is linear in 1 / (z + 4) and
// goes from 1 to -1. P interpolates e**(z**2) erfc(z) at the 19 Chebyshev points, computed with 50 digits;
// absolute error of erfc below 5e-17.
inline double erfc_of(double z) {
  const double u = 12.923076923076923 / (z + 4) - 2.230769230769231;
  double p = 3.397774863158942e-14;
  p = p * u + 3.5184020486047117e-11;
  p = p * u + 2.002749767812676e-12;
  p = p * u - 1.0137000613083485e-09;
  p = p * u - 8.639333773859329e-10;
  p = p * u + 2.522188772571026e-08;
  p = p * u + 7.124550375161453e-08;
  p = p * u - 5.208116156180445e-07;
  p = p * u - 3.927601065484216e-06;
  p = p * u - 1.480371104437138e-06;
  p = p * u + 0.00012401497073532034;
  p = p * u + 0.000995660690052791;
  p = p * u + 0.004801406001136301;
  p = p * u + 0.01711950833150222;
  p = p * u + 0.04830152065636582;
  p = p * u + 0.11101893550852207;
  p = p * u + 0.210251198447979;
  p = p * u + 0.327965037356824;
  p = p * u + 0.27942855219368923;
  return exp_of(-z * z) * p;
}

// x / 2 (1 + erf(x / sqrt 2)); erf is rounded to a double before 1 is added, as in the definition.
inline double gelu_erf_of(double x) {
  const double z = x / 1.4142135623730951;
  const double size = z < 0 ? -z : z;
  const double erf = 1 - erfc_of(clamped(size, 0, 6.5));
  return x / 2 * (1 + (z < 0 ? -erf : erf));
}

// Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2; the first factor is sqrt(2 / pi).
inline double gelu_tanh_of(double x) {
  return x / 2 * (1 + tanh_of(0.7978845608028654 * (x + 0.044715 * (x * x * x))));
}

template <double (*function)(double)>
void of_floats(std::int64_t count, const float* x, float* y) {
  for (std::int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(function(x[i]));
}

// Partial results of a line: enough to fill registers and keep their units busy.
constexpr int kPartials = 8;

inline double larger(double x, double y) {  // passes NaN on
  const double most = x > y ? x : y;
  return x != x ? x : most;
}

// Subtracts the largest.
void shift(std::int64_t count, double* x) {
  double partial[kPartials];
  for (double& most : partial) most = x[0];
  std::int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kPartials; ++k) partial[k] = larger(partial[k], x[i + k]);
  }
  for (; i < count; ++i) partial[0] = larger(partial[0], x[i]);
  double most = partial[0];
  for (const double other : partial) most = larger(most, other);
  for (i = 0; i < count; ++i) x[i] -= most;
}

double total(const double (&partial)[kPartials]) {
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

double softmax_sum(std::int64_t count, double* x) {
  shift(count, x);
  double partial[kPartials] = {};
  std::int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kPartials; ++k) partial[k] += exp_of(x[i + k]);
  }
  for (; i < count; ++i) partial[0] += exp_of(x[i]);
  return total(partial);
}

void softmax(std::int64_t count, double* x) {
  shift(count, x);
  for (std::int64_t i = 0; i < count; ++i) x[i] = exp_of(x[i]);
  double partial[kPartials] = {};
  std::int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kPartials; ++k) partial[k] += x[i + k];
  }
  for (; i < count; ++i) partial[0] += x[i];
  const double sum = total(partial);
  for (i = 0; i < count; ++i) x[i] /= sum;
}

void product(const double* a, const double* b, std::int64_t depth, std::int64_t columns, double* out,
             std::int64_t ld) {
  for (std::int64_t first = 0; first < columns; first += kPanelColumns, b += depth * kPanelColumns) {
    for (int part = 0; part < kPanelColumns; part += kColumns) {  // as many columns as registers hold
      double sums[kPanelRows][kColumns] = {};
      for (std::int64_t i = 0; i < depth; ++i) {
        for (int r = 0; r < kPanelRows; ++r) {
          for (int j = 0; j < kColumns; ++j) {
            sums[r][j] += a[i * kPanelRows + r] * b[i * kPanelColumns + part + j];
          }
        }
      }
      for (int r = 0; r < kPanelRows; ++r) {
        for (int j = 0; j < kColumns; ++j) out[r * ld + first + part + j] = sums[r][j];
      }
    }
  }
}

// Registers, by an extension that GCC and Clang share.
typedef std::uint8_t Bytes __attribute__((vector_size(kRegister)));
typedef float Floats __attribute__((vector_size(kRegister)));

// Of vectors and of single elements; NaN goes on.
template <class V>
inline void keep_larger(V& most, const V& x) {
  const V larger = most > x ? most : x;
  most = most != most ? most : larger;
}
inline void keep_larger(Bytes& most, const Bytes& x) { most = most > x ? most : x; }

template <class V, class T>
void max_lines(const T* const* lines, int count, std::int64_t lanes, T* most) {
  constexpr int kBlock = sizeof(V) / sizeof(T);
  std::int64_t i = 0;
  for (; i + kBlock <= lanes; i += kBlock) {
    V block, line;
    __builtin_memcpy(&block, most + i, sizeof block);
    for (int k = 0; k < count; ++k) {
      __builtin_memcpy(&line, lines[k] + i, sizeof line);
      keep_larger(block, line);
    }
    __builtin_memcpy(most + i, &block, sizeof block);
  }
  for (; i < lanes; ++i) {
    for (int k = 0; k < count; ++k) keep_larger(most[i], lines[k][i]);
  }
}

constexpr VectorLoops kLoops = {
    .exp = of_floats<exp_of>,
    .mish = of_floats<mish_of>,
    .sigmoid = of_floats<sigmoid_of>,
    .silu = of_floats<[](double x) { return x * sigmoid_of(x); }>,
    .tanh = of_floats<tanh_of>,
    .gelu_erf = of_floats<gelu_erf_of>,
    .gelu_tanh = of_floats<gelu_tanh_of>,
    .softmax = softmax,
    .softmax_sum = softmax_sum,
    .product = product,
    .max_bytes = max_lines<Bytes>,
    .max_floats = max_lines<Floats>,
};

}  // namespace
}  // namespace mixbits
