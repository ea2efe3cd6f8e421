#pragma once

#include "../gae.h"
#include "launch.h"

namespace pyfast_ppo::cuda {

// How many numbers (of the arithmetic's type) the normalisation of E environments' advantages needs as scratch memory.
int64_t gae_moments(int64_t num_envs);

// All addresses are the device's. Arithmetic in double if any tensor is float64, else in float. moments: scratch
// memory, if args.normalize. Asynchronous; the same arguments give the same bits. Throws std::runtime_error if a launch
// fails.
void gae(const GaeArgs& args, bool use_double, void* moments, const Stream& stream);

}  // namespace pyfast_ppo::cuda
