// One dimension of a diagonal Gaussian: log-probability, entropy, KL and their derivatives. l = log(std).
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

constexpr double kHalfLog2Pi = 0.91893853320467274178;   // 1/2 log(2 pi)
constexpr double kHalfLog2PiE = 1.41893853320467274178;  // 1/2 log(2 pi e), the entropy of a unit Gaussian

// log pi(a) = -1/2 z^2 - l - 1/2 log(2 pi), z = (a - mean) / std
//   d/dmean = z / std          d/dl = z^2 - 1          d/dstd = (d/dl) / std
template <class T>
PYFAST_PPO_INLINE T standardized(T action, T mean, T inv_std) {
  return (action - mean) * inv_std;
}

// KL(p || q) of two Gaussians in one dimension, with m = (mean_p - mean_q) / std_q and d = l_p - l_q:
//   value = 1/2 [phi(2 d) + m^2], phi(x) = e^x - 1 - x.   Never negative, exactly 0 at equality.
//   d/dmean_p = m / std_q,  d/dmean_q = -m / std_q,  d/dl_p = e^{2d} - 1,  d/dl_q = -(e^{2d} - 1 + m^2)
template <class T>
struct KlTerms {
  T value;
  T d_mean_p;  // d_mean_q is its negative
  T d_log_std_p;
  T d_log_std_q;
};

template <class T>
PYFAST_PPO_INLINE KlTerms<T> kl_terms(T mean_p, T mean_q, T inv_std_q, RatioTerms<T> std_ratio) {
  const T m = (mean_p - mean_q) * inv_std_q;
  return {T(0.5) * (std_ratio.phi + m * m), m * inv_std_q, std_ratio.expm1, -(std_ratio.expm1 + m * m)};
}

// The log-probability, the entropy and the KL from means and stds, with the derivatives by those.
template <class T>
struct LogProbTerms {
  T value;   // without the constant - 1/2 log(2 pi)
  T d_mean;  // d_action is its negative
  T d_std;
};

template <class T>
PYFAST_PPO_INLINE LogProbTerms<T> log_prob_terms(T action, T mean, T inv_std, T log_std) {
  const T z = standardized(action, mean, inv_std);
  return {-(T(0.5) * z * z + log_std), z * inv_std, (z * z - T(1)) * inv_std};
}

template <class T>
PYFAST_PPO_INLINE LogProbTerms<T> log_prob_terms(T action, T mean, T std) {
  return log_prob_terms(action, mean, reciprocal_or_nan(std), log_or_nan(std));
}

// The entropy l + 1/2 log(2 pi e), and its derivative. NaN, both, if the std is at fault.
template <class T>
struct EntropyTerms {
  T value;  // without the constant 1/2 log(2 pi e)
  T d_std;
};

template <class T>
PYFAST_PPO_INLINE EntropyTerms<T> entropy_terms(T std) {
  return {log_or_nan(std), reciprocal_or_nan(std)};
}

template <class T>
struct KlOfStdsTerms {
  T value;
  T d_mean_p;  // d_mean_q is its negative
  T d_std_p;
  T d_std_q;
};

template <class T>
PYFAST_PPO_INLINE KlOfStdsTerms<T> kl_of_stds_terms(T mean_p, T std_p, T mean_q, T std_q) {
  const T inv_q = reciprocal_or_nan(std_q);
  const KlTerms<T> kl = kl_terms(mean_p, mean_q, inv_q, ratio_terms(std_p, std_q, inv_q));
  return {kl.value, kl.d_mean_p, kl.d_log_std_p / std_p, kl.d_log_std_q * inv_q};
}

}  // namespace pyfast_ppo
