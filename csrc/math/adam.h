// Adam's step (Kingma and Ba 2015) for one element, its weight decay as in Adam or, decoupled, as in AdamW (Loshchilov
// and Hutter 2019). The same formulas as torch's fused step.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

struct AdamRule {
  double beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW
};

// What all elements of a tensor have in common.
struct AdamScales {
  float step_size;        // rate / (1 - beta1^t)
  float root_correction;  // sqrt(1 - beta2^t)
};

// beta1^t and beta2^t, by squaring, in far fewer instructions than powers with any exponent take, and side by side; off
// by t / 2^53 of themselves at most.
struct AdamPowers {
  double of_beta1, of_beta2;
};

PYFAST_PPO_INLINE AdamPowers adam_powers(const AdamRule& rule, uint32_t t) {
  AdamPowers power = {1.0, 1.0};
  double beta1 = rule.beta1, beta2 = rule.beta2;
  for (; t != 0; t >>= 1) {
    if (t & 1u) power.of_beta1 *= beta1, power.of_beta2 *= beta2;
    beta1 *= beta1, beta2 *= beta2;
  }
  return power;
}

// t: the number of this step, from 1 on.
PYFAST_PPO_INLINE AdamScales adam_scales(const AdamRule& rule, double rate, uint32_t t) {
  const AdamPowers power = adam_powers(rule, t);
  return {static_cast<float>(rate / (1.0 - power.of_beta1)), static_cast<float>(std::sqrt(1.0 - power.of_beta2))};
}

// The rule in the arithmetic of the elements.
struct AdamWeights {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, eps;
  float kept;   // of a parameter, where decay is decoupled: 1 - rate weight_decay
  float decay;  // of a parameter into its gradient, where it is not
};

PYFAST_PPO_INLINE AdamWeights adam_weights(const AdamRule& rule, double rate) {
  return {static_cast<float>(rule.beta1),
          static_cast<float>(rule.beta2),
          static_cast<float>(1.0 - rule.beta1),
          static_cast<float>(1.0 - rule.beta2),
          static_cast<float>(rule.eps),
          static_cast<float>(rule.decoupled ? 1.0 - rate * rule.weight_decay : 1.0),
          static_cast<float>(rule.decoupled ? 0.0 : rule.weight_decay)};
}

struct AdamElement {
  float parameter, exp_avg, exp_avg_sq;
};

//   m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//   p = p - rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
PYFAST_PPO_INLINE AdamElement adam_step(const AdamWeights& w, const AdamScales& scales, float gradient, AdamElement x) {
  const float g = gradient + w.decay * x.parameter;
  const float exp_avg = w.beta1 * x.exp_avg + w.one_minus_beta1 * g;
  const float exp_avg_sq = w.beta2 * x.exp_avg_sq + w.one_minus_beta2 * g * g;
  const float denominator = std::sqrt(exp_avg_sq) / scales.root_correction + w.eps;
  return {w.kept * x.parameter - scales.step_size * exp_avg / denominator, exp_avg, exp_avg_sq};
}

// What gradients are multiplied by so that their norm is max_norm at most: as torch's clip_grad_norm_. NaN if the norm
// is; infinity for a max_norm leaves them alone.
PYFAST_PPO_INLINE float clip_factor(float norm, float max_norm) {
  const float factor = max_norm / (norm + 1e-6f);
  return factor > 1.0f || max_norm == std::numeric_limits<float>::infinity() ? 1.0f : factor;
}

}  // namespace pyfast_ppo
