// ELU with alpha 1: x above 0, e^x - 1 below, and its derivative from what it gave.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

PYFAST_PPO_INLINE float elu(float x) {
  // below -20, e^x - 1 rounds to -1; a NaN passes both comparisons by
  const float bounded = x < static_cast<float>(-kMaxLogRatio) ? static_cast<float>(-kMaxLogRatio) : x;
  const float expm1 = expm1_below_zero(bounded > 0.0f ? 0.0f : bounded);
  return x > 0.0f ? x : expm1;
}

// Of x, from that of y = elu(x).
PYFAST_PPO_INLINE float elu_gradient(float grad, float y) { return grad * (y > 0.0f ? 1.0f : y + 1.0f); }

}  // namespace pyfast_ppo
