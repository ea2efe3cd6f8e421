// One step of generalised advantage estimation (Schulman et al. 2016), from the step after it.
#pragma once

#include "elementary.h"

namespace pyfast_ppo {

// delta_t = r_t + gamma V(s_{t+1}) - V(s_t). At the end of an episode V(s_{t+1}) is 0, or the value of the observation
// before the reset if a time limit ended it (Pardo et al. 2018).
template <class T>
PYFAST_PPO_INLINE T delta_of(T reward, T gamma, T next_value, T value) {
  return reward + gamma * next_value - value;
}

// A_t = delta_t + factor A_{t+1}. The factor is gamma lam, or 0 at the end of an episode. Where it is 0, what comes
// later does not matter, not even as NaN or infinity.
template <class T>
PYFAST_PPO_INLINE T advantage_of(T delta, T factor, T next) {
  return factor == T(0) ? delta : delta + factor * next;
}

}  // namespace pyfast_ppo
