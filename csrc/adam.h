// A step of Adam with its gradients clipped: what goes in and what is changed, on any device.
#pragma once

#include "math/adam.h"
#include "tensor.h"

namespace pyfast_ppo {

constexpr int kMaxAdamTensors = 64;  // so that all fits into the arguments of a CUDA kernel
constexpr int kMaxAdamModules = 4;

// Contiguous float32, `count` elements each, but for `step`, which has one.
struct AdamTensor {
  float *parameter, *gradient, *exp_avg, *exp_avg_sq;
  float* step;  // how many steps there were
  int64_t count;
  int module;       // tensors of a module follow each other
  int first_chunk;  // see cut
};

struct AdamArgs {
  AdamRule rule;
  float max_norm;       // of the gradients of each module
  bool skip_nonfinite;  // no step where one of these norms is not finite
  Coefficient rate;     // the learning rate
  const uint8_t* skip;  // a boolean: no step where it is true; null: none asks for that
  uint8_t* lost;        // written: whether a norm was not finite, where skip_nonfinite
  int num_tensors;
  int num_modules;
  int num_chunks;
  AdamTensor tensors[kMaxAdamTensors];
};

// Cuts the tensors into chunks of `size` elements, each of one tensor, in their order.
inline void cut(AdamArgs& args, int64_t size) {
  args.num_chunks = 0;
  for (int i = 0; i < args.num_tensors; ++i) {
    args.tensors[i].first_chunk = args.num_chunks;
    args.num_chunks += static_cast<int>((args.tensors[i].count + size - 1) / size);
  }
}

// The tensor that a chunk belongs to.
PYFAST_PPO_INLINE int tensor_of_chunk(const AdamArgs& args, int chunk) {
  int i = 0;
  while (i + 1 < args.num_tensors && args.tensors[i + 1].first_chunk <= chunk) ++i;
  return i;
}

// The first chunk of a module, or of what follows it.
PYFAST_PPO_INLINE int first_chunk_of_module(const AdamArgs& args, int module) {
  for (int i = 0; i < args.num_tensors; ++i) {
    if (args.tensors[i].module >= module) return args.tensors[i].first_chunk;
  }
  return args.num_chunks;
}

}  // namespace pyfast_ppo
