#pragma once

#include "../schedule.h"
#include "launch.h"

namespace pyfast_ppo::cuda {

// All addresses are the device's. Asynchronous. Throws std::runtime_error if the launch fails.
void adapt_rate(const RateArgs& args, const Stream& stream);

}  // namespace pyfast_ppo::cuda
