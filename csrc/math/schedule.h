// The adaptive learning rate of rsl_rl: 0-dim numbers in, the rate of the next step out.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

struct RateRule {
  double desired_kl, min_rate, max_rate, factor;
  double rise_above;  // the rate rises only where the KL is greater than this
};

// kl > 2 desired: rate / factor, but min_rate at least. kl < desired / 2: rate factor, but max_rate at most. A KL that
// is NaN changes nothing. lost: the last step was not taken, because its gradients were not finite: lower, in any case.
// The KL is compared in its own type, as torch does.
template <class T>
PYFAST_PPO_INLINE double next_rate(const RateRule& rule, T kl, double rate, bool lost) {
  const double divided = rate / rule.factor, multiplied = rate * rule.factor;
  const double lowered = divided > rule.min_rate ? divided : rule.min_rate;
  const double raised = multiplied < rule.max_rate ? multiplied : rule.max_rate;
  const bool high = kl > static_cast<T>(rule.desired_kl * 2.0);
  const bool low = kl < static_cast<T>(rule.desired_kl / 2.0) && kl > static_cast<T>(rule.rise_above);
  const double next = high ? lowered : (low ? raised : rate);
  return lost && lowered < next ? lowered : next;
}

}  // namespace pyfast_ppo
