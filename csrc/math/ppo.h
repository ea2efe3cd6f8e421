// One row of PPO: the clipped surrogate, the value loss, and their derivatives. r = pi_new / pi_old.
//
// Where two arguments of max() are equal, torch.autograd gives each half of the gradient, and clamp() passes the
// gradient at its bounds, or did before torch 2.14; both are kept here, so that ties agree with the stock formula.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

template <class T>
struct SurrogateTerms {
  T ratio;       // exp of the clamped log-ratio
  T loss;        // max(-A r, -A clamp(r, lo, hi))
  T d_log_prob;  // d loss / d log pi_new
  T approx_kl;   // (r - 1) - log r, the k3 estimate of KL(old || new)
  T outside;     // 1 where r is outside the clip range, else 0
};

template <class T>
PYFAST_PPO_INLINE T max_weight(T first, T second) {  // the share of max(first, second)'s gradient that goes to first
  return first > second ? T(1) : (first == second ? T(0.5) : T(0));
}

// The bounds of the ratio, 1 -+ clip_param, each rounded once: every backend judges a ratio at a bound alike.
template <class T>
struct ClipRange {
  T lo, hi;
};

template <class T>
PYFAST_PPO_INLINE ClipRange<T> clip_range(double clip_param) {
  return {static_cast<T>(1.0 - clip_param), static_cast<T>(1.0 + clip_param)};
}

// 0, or NaN for a clip_param that is no range. A tensor's value is only seen here: added to every row's log-ratio, the
// fault shows in the loss and is counted.
PYFAST_PPO_INLINE double clip_fault(double clip_param) {
  return clip_param >= 0.0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
}

template <class T>
PYFAST_PPO_INLINE SurrogateTerms<T> surrogate_terms(T log_ratio, T advantage, ClipRange<T> range) {
  const T lo = range.lo, hi = range.hi;
  constexpr T limit = T(kMaxLogRatio);
  const T clamped = log_ratio < -limit ? -limit : (log_ratio > limit ? limit : log_ratio);
  const ExpTerms<T> e = exp_terms(clamped);
  const T ratio = e.exp + (log_ratio - log_ratio);  // NaN if the log-ratio is infinite, so that it shows
  const T clipped = ratio < lo ? lo : (ratio > hi ? hi : ratio);
  const bool inside = ratio >= lo && ratio <= hi;
  const T plain_loss = -advantage * ratio;
  const T clipped_loss = -advantage * clipped;
  const T weight = max_weight(plain_loss, clipped_loss);
  const T passed = inside ? T(1) : weight;  // inside, both arguments pass their share: together 1
  return {ratio, plain_loss > clipped_loss ? plain_loss : clipped_loss, plain_loss * passed, k3(e, clamped, log_ratio),
          ratio < lo || ratio > hi ? T(1) : T(0)};
}

template <class T>
struct ValueTerms {
  T loss;
  T d_value;
};

// max((v - R)^2, (v_c - R)^2) with v_c = v_old + clamp(v - v_old, -clip, clip)
template <class T>
PYFAST_PPO_INLINE ValueTerms<T> clipped_value_terms(T value, T old_value, T target, T clip) {
  const T step = value - old_value;
  const T clipped_step = step < -clip ? -clip : (step > clip ? clip : step);
  const T inside = step >= -clip && step <= clip ? T(1) : T(0);
  const T error = value - target;
  const T clipped_error = (old_value + clipped_step) - target;
  const T loss = error * error;
  const T clipped_loss = clipped_error * clipped_error;
  const T weight = max_weight(loss, clipped_loss);
  return {loss > clipped_loss ? loss : clipped_loss,
          T(2) * (weight * error + (T(1) - weight) * inside * clipped_error)};
}

// (v - R)^2
template <class T>
PYFAST_PPO_INLINE ValueTerms<T> plain_value_terms(T value, T target) {
  const T error = value - target;
  return {error * error, T(2) * error};
}

}  // namespace pyfast_ppo
