// Sums over a warp and over a block, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include "../math/elementary.h"

namespace pyfast_ppo::cuda {

constexpr int kWarp = 32;

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The largest of numbers that are not negative; NaNs are passed over.
template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// atomicInc: counts up to `most` and then starts at 0 again. What this block wrote before the barrier before it is seen
// after the barrier behind it, in the blocks that count later: no fences beside the atomic.
__device__ __forceinline__ unsigned count_and_wrap(unsigned* counter, unsigned most) {
#if defined(__CUDA_ARCH__)
  unsigned before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most) : "memory");
  return before;
#else
  return atomicInc(counter, most);
#endif
}

// True in every thread of the block that comes here last of the num_blocks blocks that share the counter; it then sees
// what the others wrote before. The counter is 0 before the launch and after it, so that a captured graph can be
// replayed.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned num_blocks) {
  __shared__ bool last;
  __syncthreads();  // after what every thread of this block has written
  if (threadIdx.x == 0) last = count_and_wrap(counter, num_blocks - 1) == num_blocks - 1;
  __syncthreads();
  return last;
}

}  // namespace pyfast_ppo::cuda
