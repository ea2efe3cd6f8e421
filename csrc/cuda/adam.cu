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
constexpr int kFirstOfTensors = kMaxAdamModules * kWarp;  // the last block: a warp a module, then a thread a tensor
constexpr int kPartialsInFlight = 16;                     // of a thread of the last block

static_assert(sizeof(AdamArgs) + 64 <= 4096, "more than the arguments of a kernel hold");
static_assert(kFirstOfTensors + kMaxAdamTensors <= kThreads, "not enough threads for the last block");

// What the first launch leaves for the second, for each tensor all of it: three accesses of 128 bits, and none that
// waits for another.
struct alignas(16) Decision {
  float taken;  // 0 or 1
  AdamWeights weights;
  AdamScales scales;
  float clip;
};

static_assert(sizeof(Decision) == 48, "more accesses than three");

// A thread's four elements: neighbours, so that they are one access of 128 bits; all but the tensor's last ones.
struct Place {
  const AdamTensor& tensor;
  int64_t first;
  int count;

  __device__ Place(const AdamArgs& args, int i, int chunk) : tensor(args.tensors[i]) {
    first = static_cast<int64_t>(chunk - args.first_chunk[i]) * kChunk + static_cast<int64_t>(threadIdx.x) * kPerThread;
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

// --- CUDA kernels ----------------------------------------------------------------------------------------------------

// The norm of a module's gradients, in all lanes of a warp.
__device__ __forceinline__ float norm_of_module(const AdamArgs& args, const double* partials, int module) {
  const int lane = threadIdx.x % kWarp, end = args.first_chunk_of_module[module + 1];
  double sum = 0.0;
  for (int chunk = args.first_chunk_of_module[module] + lane; chunk < end; chunk += kPartialsInFlight * kWarp) {
    double x[kPartialsInFlight];
#pragma unroll
    for (int k = 0; k < kPartialsInFlight; ++k) {  // past the L1 cache, which does not see what other processors wrote
      x[k] = chunk + k * kWarp < end ? __ldcg(partials + chunk + k * kWarp) : 0.0;
    }
#pragma unroll
    for (int k = 0; k < kPartialsInFlight; k += 2) sum += x[k] + x[k + 1];
  }
  return static_cast<float>(std::sqrt(warp_sum(sum)));
}

// partials: [chunks], the squares of each.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    adam_norms_kernel(const __grid_constant__ AdamArgs args, double* partials, Decision* decisions, unsigned* counter) {
  __shared__ double warp_sums[kWarps];
  __shared__ float norms[kMaxAdamModules];
  const int chunk = static_cast<int>(blockIdx.x), t = static_cast<int>(threadIdx.x), warp = t / kWarp;
  const Place place(args, tensor_of_chunk(args, chunk), chunk);
  float gradient[kPerThread];
  load<kVector>(gradient, place.tensor.gradient, place);
  // For the last block, for which everything waits: on their way with the gradient. It alone changes a step, after all
  // blocks have read it.
  const int i = t - kFirstOfTensors;
  const bool of_tensor = i >= 0 && i < args.num_tensors;
  const bool skip = args.skip != nullptr && *args.skip != 0;
  const float step = of_tensor ? *args.tensors[i].step : 0.0f;
  const double rate = of_tensor ? value_of(args.rate) : 0.0;

  float squares = 0.0f;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) squares += gradient[e] * gradient[e];
  const double sum = warp_sum(static_cast<double>(squares));
  if (t % kWarp == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (t == 0) {
    double of_chunk = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) of_chunk += warp_sums[w];
    partials[chunk] = of_chunk;
  }
  if (!is_last_block(counter, gridDim.x)) return;

  // side by side: the norms, and what else holds for a tensor
  Decision decision{};
  if (warp < kMaxAdamModules) {
    const float norm = warp < args.num_modules ? norm_of_module(args, partials, warp) : 0.0f;
    if (t % kWarp == 0) norms[warp] = norm;
  } else if (of_tensor) {  // of the step that is taken; where none is, nobody asks
    decision.weights = adam_weights(args.rule, rate);
    decision.scales = adam_scales(args.rule, rate, static_cast<uint32_t>(step + 1.0f));
  }
  __syncthreads();
  bool finite = true;
#pragma unroll
  for (int module = 0; module < kMaxAdamModules; ++module) finite = finite && norms[module] - norms[module] == 0.0f;
  const bool lost = args.skip_nonfinite && !finite, taken = !lost && !skip;
  if (of_tensor) {
    decision.taken = taken ? 1.0f : 0.0f;
    decision.clip = clip_factor(norms[args.tensors[i].module], args.max_norm);
    decisions[i] = decision;
    if (taken) *args.tensors[i].step = step + 1.0f;
  }
  if (t == 0) *args.lost = lost;
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ AdamArgs args, const Decision* decisions) {
  const int chunk = static_cast<int>(blockIdx.x), i = tensor_of_chunk(args, chunk);
  const Place place(args, i, chunk);
  // all loads first, so that they are in flight together
  float parameter[kPerThread], gradient[kPerThread], exp_avg[kPerThread], exp_avg_sq[kPerThread];
  load<kVector>(parameter, place.tensor.parameter, place);
  load<kVector>(gradient, place.tensor.gradient, place);
  load<kVector>(exp_avg, place.tensor.exp_avg, place);
  load<kVector>(exp_avg_sq, place.tensor.exp_avg_sq, place);
  const Decision decision = decisions[i];
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    gradient[e] *= decision.clip;
    const AdamElement x =
        adam_step(decision.weights, decision.scales, gradient[e], {parameter[e], exp_avg[e], exp_avg_sq[e]});
    parameter[e] = x.parameter;
    exp_avg[e] = x.exp_avg;
    exp_avg_sq[e] = x.exp_avg_sq;
  }
  if (decision.taken == 0.0f) return;  // asked only here, so that all of the decision is read at once
  store<kVector>(parameter, place.tensor.parameter, place);
  store<kVector>(exp_avg, place.tensor.exp_avg, place);
  store<kVector>(exp_avg_sq, place.tensor.exp_avg_sq, place);
  if (decision.clip != 1.0f) store<kVector>(gradient, place.tensor.gradient, place);
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

constexpr int64_t kDecisionDoubles = kMaxAdamTensors * sizeof(Decision) / sizeof(double);

}  // namespace

int64_t adam_partials(int64_t num_elements, int64_t num_tensors) {
  return kDecisionDoubles + num_elements / kChunk + num_tensors;
}

void adam_step(AdamArgs args, const Scratch& scratch, const Stream& stream) {
  cut(args, kChunk);
  Decision* decisions = static_cast<Decision*>(scratch.partials);
  double* partials = static_cast<double*>(scratch.partials) + kDecisionDoubles;
  const bool vector = is_aligned(args);
  launch("adam_norms_kernel", vector ? adam_norms_kernel<true> : adam_norms_kernel<false>, num_chunks(args), kThreads,
         stream, args, partials, decisions, scratch.counter);
  launch("adam_kernel", vector ? adam_kernel<true> : adam_kernel<false>, num_chunks(args), kThreads, stream, args,
         static_cast<const Decision*>(decisions));
}

}  // namespace pyfast_ppo::cuda
