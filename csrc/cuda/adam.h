#pragma once

#include "../adam.h"
#include "ppo_loss.h"

namespace pyfast_ppo::cuda {

// How many doubles of scratch memory a step over so many elements of so many tensors needs, at most.
int64_t adam_partials(int64_t num_elements, int64_t num_tensors);

// All addresses are the device's. Two launches, asynchronous; the same arguments give the same bits. A gradient that is
// clipped is changed in place, as torch does. Throws std::runtime_error if a launch fails.
void adam_step(AdamArgs args, const Scratch& scratch, const Stream& stream);

}  // namespace pyfast_ppo::cuda
