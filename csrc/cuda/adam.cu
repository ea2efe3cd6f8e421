// A step of Adam with clipped gradients in two launches: the norms of the gradients and all that follows from them for
// whole tensors, then the elements. Nothing is copied to the device: the table of the tensors is an argument.
#include "adam.h"

#include "launch.cuh"
#include "reduce.cuh"

namespace pyfast_ppo::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kChunk = kThreads * kPerThread;  // elements of a block
constexpr int kWarps = kThreads / kWarp;

static_assert(sizeof(AdamArgs) + 64 <= 4096, "more than the arguments of a kernel hold");
static_assert(kMaxAdamTensors <= kThreads, "a thread for each tensor");

// What the first launch leaves for the second.
struct Decision {
  bool taken;
  AdamWeights weights;
  float clip[kMaxAdamModules];
  AdamScales scales[kMaxAdamTensors];
};

// A thread's four elements: neighbours, so that they are one access of 128 bits; all but the tensor's last ones.
struct Place {
  const AdamTensor& tensor;
  int64_t first;
  int count;

  __device__ Place(const AdamTensor& tensor, int chunk) : tensor(tensor) {
    first = static_cast<int64_t>(chunk - tensor.first_chunk) * kChunk + static_cast<int64_t>(threadIdx.x) * kPerThread;
    const int64_t left = tensor.count - first;
    count = static_cast<int>(left < 0 ? 0 : (left < kPerThread ? left : kPerThread));
  }
};

struct alignas(kPerThread * sizeof(float)) Pack {
  float elements[kPerThread];
};

template <bool kVector>
__device__ __forceinline__ void load(float (&out)[kPerThread], const float* data, const Place& place) {
  if (kVector && place.count == kPerThread) {
    const Pack pack = *reinterpret_cast<const Pack*>(data + place.first);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) out[e] = pack.elements[e];
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) out[e] = e < place.count ? data[place.first + e] : 0.0f;
  }
}

template <bool kVector>
__device__ __forceinline__ void store(const float (&x)[kPerThread], float* data, const Place& place) {
  if (kVector && place.count == kPerThread) {
    Pack pack;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) pack.elements[e] = x[e];
    *reinterpret_cast<Pack*>(data + place.first) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (e < place.count) data[place.first + e] = x[e];
    }
  }
}

// In every thread of the block. Each sum has memory of its own: no barrier is needed before it is written.
__device__ __forceinline__ double block_sum(double x, double (&warp_sums)[kWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  return sum;
}

// --- CUDA kernels ----------------------------------------------------------------------------------------------------

// partials: [chunks], the squares of each.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    adam_norms_kernel(const __grid_constant__ AdamArgs args, double* partials, Decision* decision, unsigned* counter) {
  __shared__ double sums_of_chunk[kWarps], sums_of_module[kMaxAdamModules][kWarps];
  const int chunk = static_cast<int>(blockIdx.x);
  const Place place(args.tensors[tensor_of_chunk(args, chunk)], chunk);
  float gradient[kPerThread];
  load<kVector>(gradient, place.tensor.gradient, place);
  float squares = 0.0f;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) squares += gradient[e] * gradient[e];
  const double sum = block_sum(squares, sums_of_chunk);
  if (threadIdx.x == 0) partials[chunk] = sum;
  if (!is_last_block(counter, gridDim.x)) return;

  bool finite = true;
  for (int module = 0; module < args.num_modules; ++module) {
    const int end = first_chunk_of_module(args, module + 1);
    double of_module = 0.0;
    for (int i = first_chunk_of_module(args, module) + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      of_module += __ldcg(partials + i);  // past the L1 cache, which does not see what other processors wrote
    }
    const float norm = static_cast<float>(std::sqrt(block_sum(of_module, sums_of_module[module])));
    finite = finite && norm - norm == 0.0f;
    if (threadIdx.x == 0) decision->clip[module] = clip_factor(norm, args.max_norm);
  }
  const bool lost = args.skip_nonfinite && !finite;
  const bool taken = !lost && (args.skip == nullptr || *args.skip == 0);
  const double rate = value_of(args.rate);
  const int i = static_cast<int>(threadIdx.x);
  if (i < args.num_tensors) {
    const float step = *args.tensors[i].step + (taken ? 1.0f : 0.0f);
    *args.tensors[i].step = step;
    decision->scales[i] = adam_scales(args.rule, rate, static_cast<uint32_t>(step));
  }
  if (i == 0) {
    decision->taken = taken;
    decision->weights = adam_weights(args.rule, rate);
    *args.lost = lost;
  }
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ AdamArgs args, const Decision* decision) {
  const int chunk = static_cast<int>(blockIdx.x), i = tensor_of_chunk(args, chunk);
  const Place place(args.tensors[i], chunk);
  // all loads first, so that they are in flight together
  float parameter[kPerThread], gradient[kPerThread], exp_avg[kPerThread], exp_avg_sq[kPerThread];
  load<kVector>(parameter, place.tensor.parameter, place);
  load<kVector>(gradient, place.tensor.gradient, place);
  load<kVector>(exp_avg, place.tensor.exp_avg, place);
  load<kVector>(exp_avg_sq, place.tensor.exp_avg_sq, place);
  if (!decision->taken) return;
  const AdamWeights weights = decision->weights;
  const AdamScales scales = decision->scales[i];
  const float clip = decision->clip[place.tensor.module];
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    gradient[e] *= clip;
    const AdamElement x = adam_step(weights, scales, gradient[e], {parameter[e], exp_avg[e], exp_avg_sq[e]});
    parameter[e] = x.parameter;
    exp_avg[e] = x.exp_avg;
    exp_avg_sq[e] = x.exp_avg_sq;
  }
  store<kVector>(parameter, place.tensor.parameter, place);
  store<kVector>(exp_avg, place.tensor.exp_avg, place);
  store<kVector>(exp_avg_sq, place.tensor.exp_avg_sq, place);
  if (clip != 1.0f) store<kVector>(gradient, place.tensor.gradient, place);
}

// --- kernel launcher -------------------------------------------------------------------------------------------------

bool is_aligned(const AdamArgs& args) {
  for (int i = 0; i < args.num_tensors; ++i) {
    const AdamTensor& t = args.tensors[i];
    for (const float* data : {t.parameter, t.gradient, t.exp_avg, t.exp_avg_sq}) {
      if (reinterpret_cast<uintptr_t>(data) % sizeof(Pack) != 0) return false;
    }
  }
  return true;
}

int64_t decision_doubles() { return blocks_of(sizeof(Decision), sizeof(double)); }

}  // namespace

int64_t adam_partials(int64_t num_elements, int64_t num_tensors) {
  return decision_doubles() + num_elements / kChunk + num_tensors;
}

void adam_step(AdamArgs args, const Scratch& scratch, const Stream& stream) {
  cut(args, kChunk);
  Decision* decision = static_cast<Decision*>(scratch.partials);
  double* partials = static_cast<double*>(scratch.partials) + decision_doubles();
  const bool vector = is_aligned(args);
  launch("adam_norms_kernel", vector ? adam_norms_kernel<true> : adam_norms_kernel<false>, args.num_chunks, kThreads,
         stream, args, partials, decision, scratch.counter);
  launch("adam_kernel", vector ? adam_kernel<true> : adam_kernel<false>, args.num_chunks, kThreads, stream, args,
         static_cast<const Decision*>(decision));
}

}  // namespace pyfast_ppo::cuda
