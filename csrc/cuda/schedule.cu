// The next learning rate: one launch in place of a chain of operators.
#include "schedule.h"

#include "launch.cuh"

namespace pyfast_ppo::cuda {

namespace {

__global__ void adapt_rate_kernel(const __grid_constant__ RateArgs args) { adapt_rate(args); }

}  // namespace

void adapt_rate(const RateArgs& args, const Stream& stream) {
  launch("adapt_rate_kernel", adapt_rate_kernel, 1, 1, stream, args);
}

}  // namespace pyfast_ppo::cuda
