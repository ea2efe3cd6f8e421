// Generalised advantage estimation in one launch, its normalisation in a second.
//
// Neighbouring threads have neighbouring environments. The steps of an environment are dealt out to several threads in
// stretches, so that all loads of a block are in flight at once: A_t = delta_t + gamma lam A_{t+1} is linear in the
// A_{t+1} that comes in from the right, a stretch first takes it as 0 and keeps the factor by which it counts.
#include "gae.h"

#include <cmath>

#include "../math/gae.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace pyfast_ppo::cuda {

namespace {

constexpr int kEnvs = 32;      // of a block
constexpr int kStretches = 8;  // side by side
constexpr int kSteps = 4;      // of a stretch
constexpr int kThreads = kEnvs * kStretches;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFlatPerThread = 4;

// Count, mean and sum of squared deviations from it.
template <class T>
struct Moments {
  T count, mean, deviations;
};

// Those of two sets together (Chan, Golub and LeVeque 1979).
template <class T>
__device__ __forceinline__ Moments<T> together(const Moments<T>& a, const Moments<T>& b) {
  const T count = a.count + b.count;
  if (count == T(0)) return a;
  const T difference = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + difference * share, a.deviations + b.deviations + difference * difference * a.count * share};
}

// Rounded before it is added to anything: all lanes of a sum get the same bits.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// Those of a warp's sets together, without a branch. The mean is corrected by what the differences from it leave: that
// of a constant is exact.
template <class T>
__device__ __forceinline__ Moments<T> warp_moments(const Moments<T>& m) {
  const T count = warp_sum(m.count), divisor = count > T(0) ? count : T(1);
  T mean = warp_sum(rounded_product(m.count, m.mean)) / divisor;
  mean += warp_sum(rounded_product(m.count, m.mean - mean)) / divisor;
  const T difference = m.mean - mean;
  return {count, mean, warp_sum(m.deviations + rounded_product(m.count, difference * difference))};
}

// Of a whole block, in its first warp; memory: one entry per warp.
template <class T>
__device__ Moments<T> block_moments(Moments<T> m, Moments<T>* memory, int num_warps) {
  m = warp_moments(m);
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = m;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_moments(lane < num_warps ? memory[lane] : Moments<T>{});
}

// An environment's numbers in a tensor, from a step on. kKnown: the tensor is one of Ts.
template <class T, bool kKnown>
struct Steps {
  const View& view;
  int64_t index;  // of that step

  __device__ Steps(const View& view, int64_t t, int64_t env)
      : view(view), index(t * view.row_stride + env * view.col_stride) {}

  __device__ T operator[](int k) const {
    const int64_t at = index + k * view.row_stride;
    return kKnown ? static_cast<const T*>(view.data)[at] : read_element<T>(view.data, view.dtype, at);
  }
};

// --- CUDA kernels ----------------------------------------------------------------------------------------------------

// moments: [3, blocks], or null.
template <class T, bool kKnown>
__global__ void __launch_bounds__(kThreads, 2) gae_kernel(const __grid_constant__ GaeArgs args, T* moments) {
  __shared__ T stretch_advantage[kStretches][kEnvs], stretch_factor[kStretches][kEnvs], carried[kEnvs];
  __shared__ Moments<T> warp_results[kWarps];
  const int lane = threadIdx.x % kEnvs, stretch = threadIdx.x / kEnvs;
  const int64_t env = static_cast<int64_t>(blockIdx.x) * kEnvs + lane;
  const bool inside = env < args.num_envs;
  const T gamma = static_cast<T>(args.gamma), gamma_lam = static_cast<T>(args.gamma * args.lam);
  T* advantages = static_cast<T*>(args.advantages);
  T* returns = static_cast<T*>(args.returns);
  Moments<T> mine{};
  if (stretch == 0) carried[lane] = T(0);

  // as long stretches as there are steps for; longer rollouts go through in parts, the last steps first
  const int64_t even = (args.num_steps + kStretches - 1) / kStretches;
  const int length = static_cast<int>(even < kSteps ? even : kSteps);
  for (int64_t end = args.num_steps; end > 0; end -= static_cast<int64_t>(length) * kStretches) {
    const int64_t first = end - static_cast<int64_t>(kStretches - stretch) * length;  // this thread's; may be negative
    // all loads first, so that they are in flight together
    const Steps<T, kKnown> rewards(args.rewards, first, env), values(args.values, first, env);
    const Steps<T, kKnown> final_values(args.final_values, first, env);
    const Steps<uint8_t, true> dones(args.dones, first, env), time_outs(args.time_outs, first, env);
    T reward[kSteps], value[kSteps], final_value[kSteps];
    bool there[kSteps], done[kSteps], timed_out[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      there[k] = k < length && first + k >= 0 && inside;
      reward[k] = there[k] ? rewards[k] : T(0);
      value[k] = there[k] ? values[k] : T(0);
      done[k] = there[k] && dones[k] != 0;
      timed_out[k] = there[k] && args.time_outs.data != nullptr && time_outs[k] != 0;
      final_value[k] = there[k] && args.final_values.data != nullptr ? final_values[k] : T(0);
    }
    const int64_t after = first + length;
    T value_after = T(0);
    if (inside && after > 0) {
      value_after = after < args.num_steps ? values[length] : Steps<T, kKnown>(args.last_values, 0, env)[0];
    }
    T delta[kSteps], factor[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const T at_end = timed_out[k] ? (args.final_values.data != nullptr ? final_value[k] : value[k]) : T(0);
      const T next_value = done[k] ? at_end : (k + 1 < kSteps && k + 1 < length ? value[k + 1] : value_after);
      delta[k] = delta_of(reward[k], gamma, next_value, value[k]);
      factor[k] = done[k] ? T(0) : gamma_lam;
    }
    T advantage = T(0), product = T(1);
#pragma unroll
    for (int k = kSteps - 1; k >= 0; --k) {
      if (!there[k]) continue;
      advantage = advantage_of(delta[k], factor[k], advantage);
      product *= factor[k];
    }
    stretch_advantage[stretch][lane] = advantage;
    stretch_factor[stretch][lane] = product;
    __syncthreads();
    T incoming = carried[lane];
    for (int s = kStretches - 1; s > stretch; --s) {
      incoming = advantage_of(stretch_advantage[s][lane], stretch_factor[s][lane], incoming);
    }
    __syncthreads();
    if (stretch == 0) carried[lane] = advantage_of(advantage, product, incoming);
    advantage = incoming;
    const int64_t out = first * args.num_envs + env;
#pragma unroll
    for (int k = kSteps - 1; k >= 0; --k) {
      if (!there[k]) continue;
      advantage = advantage_of(delta[k], factor[k], advantage);
      advantages[out + k * args.num_envs] = advantage;
      returns[out + k * args.num_envs] = advantage + value[k];
      const T difference = advantage - mine.mean;
      mine.count += T(1);
      mine.mean += difference / mine.count;
      mine.deviations += difference * (advantage - mine.mean);
    }
  }
  if (moments == nullptr) return;
  const Moments<T> block = block_moments(mine, warp_results, kWarps);
  if (threadIdx.x != 0) return;
  moments[blockIdx.x] = block.count;
  moments[gridDim.x + blockIdx.x] = block.mean;
  moments[2 * gridDim.x + blockIdx.x] = block.deviations;
}

// As rsl_rl: (A - mean) / (std + 1e-8) with the unbiased std. Each block adds up the moments for itself, all in the
// same order.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_kernel(T* advantages, int64_t count, const T* moments, int num_moments) {
  __shared__ Moments<T> warp_results[kWarps];
  __shared__ T mean, scale;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads * kFlatPerThread + threadIdx.x;
  T x[kFlatPerThread];
#pragma unroll
  for (int k = 0; k < kFlatPerThread; ++k) {
    x[k] = begin + k * kThreads < count ? advantages[begin + k * kThreads] : T(0);
  }
  Moments<T> m{};
  for (int i = threadIdx.x; i < num_moments; i += kThreads) {
    m = together(m, {moments[i], moments[num_moments + i], moments[2 * num_moments + i]});
  }
  m = block_moments(m, warp_results, kWarps);
  if (threadIdx.x == 0) {
    mean = m.mean;
    scale = std::sqrt(m.deviations / (m.count - T(1))) + T(1e-8);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kFlatPerThread; ++k) {
    if (begin + k * kThreads < count) advantages[begin + k * kThreads] = (x[k] - mean) / scale;
  }
}

// --- kernel launcher -------------------------------------------------------------------------------------------------

template <class T>
void run(const GaeArgs& args, void* memory, const Stream& stream) {
  T* moments = args.normalize ? static_cast<T*>(memory) : nullptr;
  const int64_t blocks = blocks_of(args.num_envs, kEnvs);
  bool known = true;
  for (const View* view : {&args.rewards, &args.values, &args.last_values, &args.final_values}) {
    known = known && (view->data == nullptr || view->dtype == dtype_of<T>());
  }
  launch("gae_kernel", known ? gae_kernel<T, true> : gae_kernel<T, false>, blocks, kThreads, stream, args, moments);
  if (!args.normalize) return;
  const int64_t count = args.num_steps * args.num_envs;
  launch("normalize_kernel", normalize_kernel<T>, blocks_of(count, kThreads * kFlatPerThread), kThreads, stream,
         static_cast<T*>(args.advantages), count, static_cast<const T*>(moments), static_cast<int>(blocks));
}

}  // namespace

int64_t gae_moments(int64_t num_envs) { return 3 * blocks_of(num_envs, kEnvs); }

void gae(const GaeArgs& args, bool use_double, void* moments, const Stream& stream) {
  if (use_double) {
    run<double>(args, moments, stream);
  } else {
    run<float>(args, moments, stream);
  }
}

}  // namespace pyfast_ppo::cuda
