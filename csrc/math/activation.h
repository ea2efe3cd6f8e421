// Activations of a hidden layer, and their derivatives from what they gave: value(x), and gradient(grad, y), which is
// that of x from that of y = value(x). NaN gives NaN.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

enum class Activation { kElu, kRelu, kTanh };

// With alpha 1: x above 0, e^x - 1 below.
struct Elu {
  PYFAST_PPO_INLINE static float value(float x) {
    // below -20, e^x - 1 rounds to -1; a NaN passes both comparisons by
    const float bounded = x < static_cast<float>(-kMaxLogRatio) ? static_cast<float>(-kMaxLogRatio) : x;
    const float expm1 = expm1_below_zero(bounded > 0.0f ? 0.0f : bounded);
    return x > 0.0f ? x : expm1;
  }
  PYFAST_PPO_INLINE static float gradient(float grad, float y) { return grad * (y > 0.0f ? 1.0f : y + 1.0f); }
};

// x above 0, 0 below.
struct Relu {
  PYFAST_PPO_INLINE static float value(float x) { return x < 0.0f ? 0.0f : x; }
  PYFAST_PPO_INLINE static float gradient(float grad, float y) { return y <= 0.0f ? 0.0f : grad; }
};

struct Tanh {
  PYFAST_PPO_INLINE static float value(float x) {
    const float twice = -2.0f * std::fabs(x);  // beyond 20 the result rounds to 1
    const float expm1 =
        expm1_below_zero(twice < static_cast<float>(-kMaxLogRatio) ? static_cast<float>(-kMaxLogRatio) : twice);
    return std::copysign(-expm1 / (2.0f + expm1), x);
  }
  PYFAST_PPO_INLINE static float gradient(float grad, float y) { return grad * ((1.0f - y) * (1.0f + y)); }
};

// work(Elu{}), or with another of them.
template <class Work>
void with_activation(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::kElu:
      return work(Elu{});
    case Activation::kRelu:
      return work(Relu{});
    case Activation::kTanh:
      return work(Tanh{});
  }
}

}  // namespace pyfast_ppo
