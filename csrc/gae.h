// Generalised advantage estimation over [T, E], environments side by side: what goes in and what comes out.
#pragma once

#include "tensor.h"

namespace pyfast_ppo {

struct GaeArgs {
  int64_t num_steps;            // T
  int64_t num_envs;             // E
  View rewards, values, dones;  // [T, E]; dones are bytes
  View last_values;             // [E], as one row
  View time_outs;               // [T, E], bytes; data null: there are none
  View final_values;            // [T, E], data null: values stand in for them
  double gamma, lam;
  bool normalize;
  void *advantages, *returns;  // [T, E], contiguous, of the arithmetic's type
};

}  // namespace pyfast_ppo
