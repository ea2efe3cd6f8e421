// Asking for memory before it is read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyfast_ppo::cuda {

// Brings a tensor's bytes into the L2 cache, on Hopper and on Blackwell for data centres; elsewhere nothing (CUDA 12.9
// would run out of registers for sm_120). It takes whole sixteens of bytes: from the one that the first byte lies in,
// which another tensor may share, to the last that is complete.
__device__ __forceinline__ void prefetch_to_l2([[maybe_unused]] const void* from, [[maybe_unused]] int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
  const uint64_t address = __cvta_generic_to_global(from), begin = address & ~uint64_t(15);
  const uint32_t size = static_cast<uint32_t>(address + bytes - begin) & ~15u;
  if (size > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(begin), "r"(size));
#endif
}

}  // namespace pyfast_ppo::cuda
