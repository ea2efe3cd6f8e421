// exp and log of one number, in the forms that stay accurate where PPO lives: ratios near 1, KL near 0.
//
// float: branch-free polynomials, so that a loop over them becomes SIMD code with any compiler, on any instruction set.
// double: the C library, with series where a difference would cancel.
// tests/csrc/test_math.py holds both against exact values.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define PYFAST_PPO_INLINE __host__ __device__ __forceinline__
#else
#define PYFAST_PPO_INLINE inline __attribute__((always_inline))
#endif

namespace pyfast_ppo {

// Log-ratios are clamped to +-kMaxLogRatio inside exp: e^20 = 4.9e8 is far beyond any clip range and far below
// overflow.
constexpr double kMaxLogRatio = 20.0;

PYFAST_PPO_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

PYFAST_PPO_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// e^x and e^x - 1 - x, the latter never as a difference of near-equal numbers. |x| <= kMaxLogRatio or NaN.
template <class T>
struct ExpTerms {
  T exp;
  T expm1_minus_x;
};

// e^x = 2^n e^f with |f| <= ln(2)/2.
struct ReducedExp {
  float n, power;                // 2^n
  float expm1_f, expm1_minus_f;  // e^f - 1, e^f - 1 - f
};

PYFAST_PPO_INLINE ReducedExp reduced_exp(float x) {
  // x = n ln 2 + f; adding and subtracting 1.5 * 2^23 rounds to the nearest integer
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  // e^f = 1 + f + f^2 q, Taylor to f^7: its error is below 1e-7 of q.
  const float q = 0.5f + f * (1.66666667e-1f +
                              f * (4.16666667e-2f + f * (8.33333333e-3f + f * (1.38888889e-3f + f * 1.98412698e-4f))));
  const float power = float_from_bits((float_bits(shifted) << 23) + 0x3f800000u);
  return {n, power, f + f * f * q, f * f * q};
}

PYFAST_PPO_INLINE ExpTerms<float> exp_terms(float x) {
  const ReducedExp e = reduced_exp(x);
  const float exp_x = e.power + e.power * e.expm1_f;
  return {exp_x, e.n == 0.0f ? e.expm1_minus_f : (e.power * e.expm1_f + (e.power - 1.0f)) - x};
}

// e^x - 1 - x, the k3 estimate of a KL, with the exponential clamped: beyond kMaxLogRatio it grows by the distance, so
// that it never falls below 0 and a far outlier stays visible. `of_clamped` are the terms of x where it was clamped to.
template <class T>
PYFAST_PPO_INLINE T k3(const ExpTerms<T>& of_clamped, T clamped, T x) {
  return of_clamped.expm1_minus_x + std::fabs(x - clamped);
}

// e^x - 1, to rounding for 0 as for -20, its least argument; NaN for NaN. 2^n - 1 is exact, and 0 where x is small.
PYFAST_PPO_INLINE float expm1_below_zero(float x) {
  const ReducedExp e = reduced_exp(x);
  return e.power * e.expm1_f + (e.power - 1.0f);
}

PYFAST_PPO_INLINE ExpTerms<double> exp_terms(double x) {
  if (std::fabs(x) >= 0.5) return {std::exp(x), std::expm1(x) - x};
  // sum over k >= 2 of x^k / k!, by Horner from k = 16 down; the remainder is below 1e-20.
  double series = 0.0;
  for (int k = 16; k >= 2; --k) series = x / k * (1.0 + series);
  return {std::exp(x), x * series};
}

// Neither zero, negative, subnormal, infinite nor NaN: what a standard deviation has to be. The functions below give
// NaN for everything else, so that a fault shows.
PYFAST_PPO_INLINE bool is_positive_normal(float x) { return float_bits(x) - 0x00800000u < 0x7f000000u; }

PYFAST_PPO_INLINE bool is_positive_normal(double x) {
  return x >= std::numeric_limits<double>::min() && x <= std::numeric_limits<double>::max();
}

template <class T>
PYFAST_PPO_INLINE T reciprocal_or_nan(T x) {
  return is_positive_normal(x) ? T(1) / x : std::numeric_limits<T>::quiet_NaN();
}

// x = 2^exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)), for a positive normal x.
struct BinaryExponent {
  float exponent;
  float mantissa;
};

PYFAST_PPO_INLINE BinaryExponent binary_exponent(float x) {
  const uint32_t bits = float_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  return {static_cast<float>(exponent), float_from_bits(bits - static_cast<uint32_t>(exponent) * 0x800000u)};
}

// (x - log(1 + x)) / x^2 for 1 + x in [sqrt(1/2), sqrt(2)): minimax to 8e-9, without a division.
PYFAST_PPO_INLINE float log1p_remainder(float x) {
  float sum = 1.16315447e-1f - x * 6.90237209e-2f;
  sum = -1.17914788e-1f + x * sum;
  sum = 1.24062918e-1f + x * sum;
  sum = -1.42331809e-1f + x * sum;
  sum = 1.66684628e-1f + x * sum;
  sum = -2.00014457e-1f + x * sum;
  sum = 2.49999911e-1f + x * sum;
  sum = -3.33333224e-1f + x * sum;
  return 0.5f + x * sum;
}

PYFAST_PPO_INLINE float log_or_nan(float x) {
  const BinaryExponent b = binary_exponent(x);
  const float m1 = b.mantissa - 1.0f;
  const float result = b.exponent * 0.693147181f + (m1 - m1 * m1 * log1p_remainder(m1));
  return is_positive_normal(x) ? result : std::numeric_limits<float>::quiet_NaN();
}

PYFAST_PPO_INLINE double log_or_nan(double x) {
  return is_positive_normal(x) ? std::log(x) : std::numeric_limits<double>::quiet_NaN();
}

// The terms of a ratio p / q of two standard deviations, d = log(p / q):
//   expm1 = e^{2d} - 1 and phi = e^{2d} - 1 - 2d, both with a small relative error however close p and q are,
// because e = (p - q) / q is exact to rounding there (Sterbenz) and phi = e^2 + 2 (e - log(1 + e)), where the
// difference is a series in e that starts with e^2 / 2: nothing cancels. inv_q is reciprocal_or_nan(q). NaN where p or
// q is not a positive normal number; in float also where p / q is below one: its logarithm would cost all others time.
template <class T>
struct RatioTerms {
  T expm1;
  T phi;
};

PYFAST_PPO_INLINE RatioTerms<float> ratio_terms(float p, float q, float inv_q) {
  const float e = (p - q) * inv_q;
  const float ratio = p * inv_q;
  const BinaryExponent b = binary_exponent(ratio);
  const bool near = b.exponent == 0.0f;
  const float m1 = near ? e : b.mantissa - 1.0f;
  const float difference = m1 * m1 * log1p_remainder(m1);  // m1 - log(1 + m1)
  const float expm1 = e * (2.0f + e);
  const float phi = ((near ? e * e : expm1 - 2.0f * m1) + 2.0f * difference) - b.exponent * 1.38629436f;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool valid = is_positive_normal(p < ratio ? p : ratio);  // both; a ratio may overflow, as the KL does
  return {valid ? expm1 : nan, valid ? phi : nan};
}

PYFAST_PPO_INLINE RatioTerms<double> ratio_terms(double p, double q, double inv_q) {
  if (!is_positive_normal(p)) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan};
  }
  const double e = (p - q) * inv_q;
  const double expm1 = e * (2.0 + e);
  if (std::fabs(e) > 0.4) {
    const double ratio = p * inv_q;
    return {expm1, expm1 - 2.0 * (is_positive_normal(ratio) ? std::log(ratio) : std::log(p) - std::log(q))};
  }
  const double s = e / (2.0 + e);  // log(1 + e) = 2 atanh(s) and e - 2 s = e s
  const double s2 = s * s;
  double series = 0.0;  // 1/3 + s^2/5 + s^4/7 + ...; |s| <= 1/4: 14 terms reach 1e-17
  for (int k = 13; k >= 0; --k) series = series * s2 + 1.0 / (2 * k + 3);
  return {expm1, 2.0 * (e * s - 2.0 * s * s2 * series) + e * e};
}

}  // namespace pyfast_ppo
