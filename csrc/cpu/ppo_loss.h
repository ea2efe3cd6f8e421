#pragma once

#include "../ppo_loss.h"

namespace pyfast_ppo {

// Arithmetic in double if any tensor is float64, else in float. The same arguments give the same bits for any
// num_threads.
void ppo_loss(const PpoLossArgs& args, bool use_double, int num_threads);

}  // namespace pyfast_ppo
