// The next learning rate, from numbers that lie on the device: what goes in and what comes out, on any device.
#pragma once

#include "math/schedule.h"
#include "tensor.h"

namespace pyfast_ppo {

struct RateArgs {
  RateRule rule;
  Coefficient kl;       // a tensor
  Coefficient rate;     // the present one
  const uint8_t* lost;  // a boolean; null: no step was lost
  double* next;         // written
};

PYFAST_PPO_INLINE void adapt_rate(const RateArgs& args) {
  const double kl = value_of(args.kl), rate = value_of(args.rate);
  const bool lost = args.lost != nullptr && *args.lost != 0;
  *args.next = args.kl.dtype == DType::kFloat64 ? next_rate(args.rule, kl, rate, lost)
                                                : next_rate(args.rule, static_cast<float>(kl), rate, lost);
}

}  // namespace pyfast_ppo
