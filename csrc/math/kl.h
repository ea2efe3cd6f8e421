// One sample of a policy: estimates of a KL, and the losses whose gradients are that of a KL in expectation.
//
// x = log pi_new - log pi_old, r = e^x. A loss has a value, and a coefficient: d loss / d log pi_new.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

// Direction of the KL, the policy that was sampled, the form; the order is that of reference.KL_LOSSES.
enum class KlLoss : int {
  kOldNewOldK1,
  kOldNewOldK3,
  kNewOldOldK1,
  kNewOldOldK2,
  kNewOldOldK3,
  kNewOldNewK1,
  kNewOldNewK2,
  kNewOldNewK3,
  kOldNewNewK1,
  kOldNewNewK3,
};
constexpr int kNumKlLosses = static_cast<int>(KlLoss::kOldNewNewK3) + 1;

template <class T>
struct KlLossTerms {
  T value;
  T coefficient;
};

// e^x is clamped to e^{+-20}, x elsewhere is not: an outlier stays visible in the value. A loop in which `which` is
// constant keeps one of the cases only.
template <class T>
PYFAST_PPO_INLINE KlLossTerms<T> kl_loss_terms(KlLoss which, T x) {
  constexpr T limit = T(kMaxLogRatio);
  const T clamped = x < -limit ? -limit : (x > limit ? limit : x);
  const ExpTerms<T> up = exp_terms(clamped), down = exp_terms(-clamped);  // e^x, e^-x
  const T r = up.exp;
  const T k3_old = k3(up, clamped, x);      // (r - 1) - x
  const T k3_new = k3(down, -clamped, -x);  // (1/r - 1) + x
  switch (which) {
    case KlLoss::kOldNewOldK1:
      return {-x, T(-1)};
    case KlLoss::kOldNewOldK3:
      return {k3_old, up.expm1_minus_x + clamped};
    case KlLoss::kNewOldOldK1:
      return {r * x, r * (x + T(1))};
    case KlLoss::kNewOldOldK2:
      return {T(0.5) * r * x * x, r * x};
    case KlLoss::kNewOldOldK3:
      return {r * k3_new, r * x};
    case KlLoss::kNewOldNewK1:
      return {x, x};
    case KlLoss::kNewOldNewK2:
      return {T(0.5) * x * x, x};
    case KlLoss::kNewOldNewK3:
      return {k3_new, x};
    case KlLoss::kOldNewNewK1:
      return {-x * down.exp, -down.exp};
    case KlLoss::kOldNewNewK3:
      return {k3_new, clamped - down.expm1_minus_x};  // 1 - 1/r
  }
  return {};
}

}  // namespace pyfast_ppo
