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
  int module;  // tensors of a module follow each other
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
  // By cut. Beside each other, not in the tensors: a GPU finds them in few lines of its cache for constants.
  int first_chunk[kMaxAdamTensors + 1];            // of each tensor, then what follows the last one
  int first_chunk_of_module[kMaxAdamModules + 1];  // likewise
  AdamTensor tensors[kMaxAdamTensors];
};

inline int num_chunks(const AdamArgs& args) { return args.first_chunk[args.num_tensors]; }

// Cuts the tensors into chunks of `size` elements, each of one tensor, in their order. An empty tensor has none.
inline void cut(AdamArgs& args, int64_t size) {
  int chunk = 0, module = 0;
  for (int i = 0; i < args.num_tensors; ++i) {
    while (module <= args.tensors[i].module) args.first_chunk_of_module[module++] = chunk;
    args.first_chunk[i] = chunk;
    chunk += static_cast<int>((args.tensors[i].count + size - 1) / size);
  }
  args.first_chunk[args.num_tensors] = chunk;
  while (module <= kMaxAdamModules) args.first_chunk_of_module[module++] = chunk;
}

// The tensor that a chunk belongs to: the last one that begins there or before.
PYFAST_PPO_INLINE int tensor_of_chunk(const AdamArgs& args, int chunk) {
  int i = 0, behind = args.num_tensors;
  while (behind - i > 1) {
    const int middle = (i + behind) / 2;
    if (args.first_chunk[middle] <= chunk) {
      i = middle;
    } else {
      behind = middle;
    }
  }
  return i;
}

}  // namespace pyfast_ppo
