// The PPO loss, its metrics and all gradients in one launch.
//
// A block takes a tile of rows as one flat array of rows * A elements, four to a thread, so that loads are coalesced
// and 128 bits wide whatever A is, and no lane is idle at A = 19. A thread keeps its place in the tile: its four
// columns never change, and what depends on the column alone (a shared std) stays in registers. Two steps need whole
// rows and stand between barriers: the sum of a row's terms, and its loss. The last block adds up what all blocks left.
#include "ppo_loss.h"

#include <type_traits>

#include "../math/gaussian.h"
#include "../math/ppo.h"
#include "launch.cuh"
#include "prefetch.cuh"
#include "reduce.cuh"

namespace pyfast_ppo::cuda {

namespace {

constexpr int kThreads = 384;           // few blocks: few partial sums for the last one to read
constexpr int kBlocksPerProcessor = 2;  // with 80 registers a thread
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerThread = 4;
constexpr int kTileElements = kThreads * kPerThread;
constexpr int kFirstSum = kLoss + 1;  // the loss is made of the other metrics
constexpr int kLanesOfSum = 8;        // threads of the last block that add up one sum of all blocks
constexpr int kAtOnce = 8;            // partial sums that each of them passes over together, if there are few blocks

enum class Std {
  kShared,     // std and old_std are one row each
  kOldPerRow,  // std is one row, old_std is [N, A]
  kPerRow      // std is [N, A]; old_std is read per row, too
};

// A tensor whose rows are asked for before they are loaded.
struct Prefetched {
  const char* data;
  int64_t num_rows, row_bytes;
};
constexpr int kMostPrefetched = 10;

template <class T>
struct Call {
  PpoLossArgs args;
  Gather gather;
  Prefetched prefetched[kMostPrefetched];
  int num_prefetched;
  T* partials;  // [sums, blocks], from kFirstSum on
  unsigned* counter;
  int64_t num_tiles;
  int tile_rows;
  int column_groups;          // threads that share a column when the gradient of a shared std is added up
  bool sum_in_fours;          // A % 4 == 0: a thread's four elements are of one row
  T row_weight;               // 1 / N
  T original_weight;          // 1 / num_original
  double share[kNumMetrics];  // what the sum of a metric is multiplied by
};

// The coefficients, in the order of PpoLossArgs.
enum Weight { kClip, kOfValue, kOfEntropy, kOfKl, kNumWeights };

// What a block leaves behind, if a std has one gradient for all rows.
PYFAST_PPO_INLINE int64_t sums_of_block(int64_t num_actions) { return kNumMetrics - kFirstSum + num_actions; }

template <class T>
struct Shared {
  alignas(16) T terms[kTileElements];
  T coefficient[kThreads];             // of each row: d loss / d log pi
  int fault[kThreads];                 // of each row: its old mean or old std is at fault
  double sum_log_std, log_normalizer;  // of a shared std
  bool old_std_fault;                  // in a shared old std
  double coefficients[kNumWeights];    // as they are when the kernel runs
  T weights[kNumWeights];              // the clip, and what a row's gradients are multiplied by
  ClipRange<T> clip_range;
  T warp_sums[kWarps][kNumMetrics];
  double totals[kNumMetrics];
};

// --- reading and writing ---------------------------------------------------------------------------------------------

template <class Element>
struct alignas(kPerThread * sizeof(Element)) Pack {
  Element elements[kPerThread];
};

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == T(0);
}

// Row i's row in the rollout's tensors; negative if there is none.
__device__ __forceinline__ int64_t rollout_row(const Gather& gather, int64_t i) {
  if (gather.index == nullptr) return i;
  const int64_t row = gather.index[i];
  return row < gather.num_rows ? row : -1;
}

template <class T>
__device__ __forceinline__ T read(const View& view, int64_t row, int64_t col) {
  if (row < 0) return std::numeric_limits<T>::quiet_NaN();
  return read_element<T>(view.data, view.dtype, row * view.row_stride + col * view.col_stride);
}

// A thread's place in a tile: the rows and columns of its elements, two numbers to a register. A row is one that has an
// entry in shared memory, beyond the tile, too.
template <bool kVector>
struct Place {
  uint32_t rows[kPerThread / 2], cols[kPerThread / 2];

  __device__ explicit Place(int num_actions) {
#pragma unroll
    for (int e = 0; e < kPerThread; e += 2) {
      const int row = index(e) / num_actions, next_row = index(e + 1) / num_actions;
      rows[e / 2] = static_cast<uint32_t>(min(row, kThreads - 1) | min(next_row, kThreads - 1) << 16);
      cols[e / 2] =
          static_cast<uint32_t>((index(e) - row * num_actions) | (index(e + 1) - next_row * num_actions) << 16);
    }
  }

  __device__ int row(int e) const { return static_cast<int>(rows[e / 2] >> e % 2 * 16 & 0xffffu); }
  __device__ int col(int e) const { return static_cast<int>(cols[e / 2] >> e % 2 * 16 & 0xffffu); }

  // Its element e in the flat tile: four neighbours are one load; single elements lie a block's width apart.
  __device__ static int index(int e) {
    return kVector ? static_cast<int>(threadIdx.x) * kPerThread + e : static_cast<int>(threadIdx.x) + e * kThreads;
  }
};

// A thread's four elements of a tile that starts at row `first` and has `count` elements; `fill` beyond those.
template <class Element, bool kVector, class T>
__device__ __forceinline__ void load(T (&out)[kPerThread], const View& view, const Place<kVector>& place,
                                     const int64_t (&source)[kPerThread], int count, T fill) {
  if constexpr (kVector) {
    const int left = count - place.index(0);
    const Element* from =
        static_cast<const Element*>(view.data) + source[0] * view.row_stride + static_cast<int64_t>(place.col(0));
    if (left >= kPerThread && source[0] >= 0) {
      const Pack<Element> pack = *reinterpret_cast<const Pack<Element>*>(from);
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) out[e] = to_float(pack.elements[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        out[e] = e >= left ? fill : (source[0] < 0 ? std::numeric_limits<T>::quiet_NaN() : T(to_float(from[e])));
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      out[e] = place.index(e) < count ? read<T>(view, source[e], place.col(e)) : fill;
    }
  }
}

// A row that all rows share, at a thread's columns. Its type is most often the arithmetic's: then the reads follow each
// other closely.
template <class T, bool kVector, class Keep>
__device__ __forceinline__ void read_columns(const View& view, const Place<kVector>& place, Keep keep) {
  if (view.dtype == dtype_of<T>()) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) keep(e, static_cast<const T*>(view.data)[place.col(e) * view.col_stride]);
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) keep(e, read<T>(view, 0, place.col(e)));
  }
}

// Asks for what a tile will read, each tensor by a warp. Else nothing of it would be on the way while the block
// computes the tile before.
template <class T>
__device__ __forceinline__ void prefetch_tile(const Call<T>& call, int64_t tile) {
  const int which = threadIdx.x / kWarp;
  if (tile >= call.num_tiles || which >= call.num_prefetched || threadIdx.x % kWarp != 0) return;
  const Prefetched& of = call.prefetched[which];
  const int64_t first = tile * call.tile_rows, rows = min(of.num_rows - first, static_cast<int64_t>(call.tile_rows));
  if (rows > 0) prefetch_to_l2(of.data + first * of.row_bytes, rows * of.row_bytes);
}

// The other way; `begin` is the tile's first element in the output.
template <class Element, bool kVector, class T>
__device__ __forceinline__ void store(const T (&x)[kPerThread], const Output& output, const Place<kVector>& place,
                                      int64_t begin, int count) {
  if constexpr (kVector) {
    const int left = count - place.index(0);
    Element* to = static_cast<Element*>(output.data) + begin + place.index(0);
    Pack<Element> pack;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) from_float(x[e], &pack.elements[e]);
    if (left >= kPerThread) {
      *reinterpret_cast<Pack<Element>*>(to) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (e < left) to[e] = pack.elements[e];
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (place.index(e) < count) write_element(output, begin + place.index(e), x[e]);
    }
  }
}

// --- one element, one row --------------------------------------------------------------------------------------------

// The coefficients are read by a thread each, so that none waits for another.
template <class T>
__device__ __forceinline__ void read_coefficient(const Call<T>& call, int which, Shared<T>& shared) {
  const PpoLossArgs& args = call.args;
  const double x = value_of(which == kClip        ? args.clip_param
                            : which == kOfValue   ? args.value_loss_coef
                            : which == kOfEntropy ? args.entropy_coef
                                                  : args.kl_coef);
  shared.coefficients[which] = x;
  const T of_row = which == kClip ? T(1) : (which == kOfValue ? call.row_weight : call.original_weight);
  shared.weights[which] = static_cast<T>(x) * of_row;
  if (which == kClip) shared.clip_range = clip_range<T>(x);
}

// What the KL needs of the two stds. KL(old || new), or KL(new || old) if new_old.
template <class T>
struct StdPair {
  T inv_q;
  RatioTerms<T> ratio;

  StdPair() = default;
  __device__ StdPair(T std, T old_std, T inv_std, bool new_old) {
    inv_q = new_old ? reciprocal_or_nan(old_std) : inv_std;
    ratio = ratio_terms(new_old ? std : old_std, new_old ? old_std : std, inv_q);
  }
};

template <class T>
struct NewKl {
  T value, d_mean, d_log_std;  // with respect to the new policy

  __device__ NewKl(T mean, T old_mean, const StdPair<T>& stds, bool new_old) {
    const KlTerms<T> kl = kl_terms(new_old ? mean : old_mean, new_old ? old_mean : mean, stds.inv_q, stds.ratio);
    value = kl.value;
    d_mean = new_old ? kl.d_mean_p : -kl.d_mean_p;
    d_log_std = new_old ? kl.d_log_std_p : kl.d_log_std_q;
  }
};

template <class T>
struct RowInputs {
  T old_log_prob, advantage, target, old_value, value;

  RowInputs() = default;
  template <class Reader>
  __device__ RowInputs(const Call<T>& call, int64_t row, const Reader& reader) {
    const PpoLossArgs& args = call.args;
    const int64_t source = rollout_row(call.gather, row);
    old_log_prob = reader.rollout(args.old_log_prob, source);
    advantage = reader.rollout(args.advantages, source);
    target = reader.rollout(args.returns, source);
    old_value = reader.rollout(args.old_values, source);
    value = reader.network(args.values, row);
  }
};

// How numbers of a row are read and written: of whatever type their tensor says,
template <class T>
struct AnyType {
  __device__ T rollout(const View& view, int64_t row) const { return read<T>(view, row, 0); }
  __device__ T network(const View& view, int64_t row) const { return read<T>(view, row, 0); }
  __device__ void write(const Output& output, int64_t row, T x) const { write_element(output, row, x); }
};

// or of types known beforehand, which saves most of the kernel's instructions.
template <class T, class Net>
struct KnownType {
  __device__ T rollout(const View& view, int64_t row) const {
    return row < 0 ? std::numeric_limits<T>::quiet_NaN() : static_cast<const T*>(view.data)[row * view.row_stride];
  }
  __device__ T network(const View& view, int64_t row) const {
    return to_float(static_cast<const Net*>(view.data)[row * view.row_stride]);
  }
  __device__ void write(const Output& output, int64_t row, T x) const {
    from_float(x, static_cast<Net*>(output.data) + row);
  }
};

// Adds a row's losses to the sums, writes the gradient of its value, and returns d loss / d log pi. row_sum: of the
// terms 1/2 z^2 (+ log std).
template <class T, class Reader>
__device__ __forceinline__ T row_losses(const Call<T>& call, const Reader& reader, const Shared<T>& shared, int64_t row,
                                        const RowInputs<T>& in, T row_sum, double log_normalizer, bool fault,
                                        T (&sums)[kNumMetrics]) {
  // in double: for many actions the two terms are large and their difference is small
  const T log_ratio = static_cast<T>(-static_cast<double>(row_sum) - (log_normalizer + in.old_log_prob));
  const SurrogateTerms<T> surrogate = surrogate_terms(log_ratio, in.advantage, shared.clip_range);
  const ValueTerms<T> value = call.args.use_clipped_value_loss
                                  ? clipped_value_terms(in.value, in.old_value, in.target, shared.weights[kClip])
                                  : plain_value_terms(in.value, in.target);
  reader.write(call.args.grad_values, row, shared.weights[kOfValue] * value.d_value);
  const bool finite = is_finite(log_ratio) && is_finite(in.advantage) && is_finite(in.value) &&
                      is_finite(in.old_value) && is_finite(in.target) && !fault;
  sums[kSurrogate] += surrogate.loss;
  sums[kValueLoss] += value.loss;
  sums[kApproxKl] += surrogate.approx_kl;
  sums[kClipFraction] += surrogate.outside;
  sums[kMaxRatio] = surrogate.ratio > sums[kMaxRatio] ? surrogate.ratio : sums[kMaxRatio];
  sums[kNonfinite] += finite ? T(0) : T(1);
  return call.row_weight * surrogate.d_log_prob;
}

// Notes the rows of a thread's elements whose old mean or old std is at fault. Elements that count for nothing have
// none.
template <Std kStd, class T, bool kVector>
__device__ __forceinline__ void note_faults(const T (&old_mean)[kPerThread], const T (&old_std)[kPerThread],
                                            const Place<kVector>& place, int* fault_of_row) {
  bool at_fault[kPerThread], any = false;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    at_fault[e] = !is_finite(old_mean[e]) || (kStd != Std::kShared && !is_positive_normal(old_std[e]));
    any = any || at_fault[e];
  }
  if (!any) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    if (at_fault[e]) atomicOr(&fault_of_row[place.row(e)], 1);
  }
}

// By one warp: what the rows need of a shared std.
template <class T, Std kStd>
__device__ __forceinline__ void read_row_of_std(const PpoLossArgs& args, Shared<T>& shared) {
  const int A = static_cast<int>(args.num_actions), lane = threadIdx.x % kWarp;
  double sum_log_std = 0.0;
  T faults = T(0);
  if constexpr (kStd != Std::kPerRow) {
    for (int j = lane; j < A; j += kWarp) {
      sum_log_std += log_or_nan(read<T>(args.std, 0, j));
      if (kStd == Std::kShared && !is_positive_normal(read<T>(args.old_std, 0, j))) faults += T(1);
    }
    sum_log_std = warp_sum(sum_log_std);
    faults = warp_sum(faults);
  }
  if (lane != 0) return;
  shared.sum_log_std = sum_log_std;
  shared.log_normalizer = sum_log_std + kHalfLog2Pi * static_cast<double>(A) + clip_fault(value_of(args.clip_param));
  shared.old_std_fault = faults != T(0);
}

// --- the end: this block's sums, then those of all blocks ------------------------------------------------------------

// Two parts of sum k; of the ratio the largest counts, and NaNs are passed over.
template <class Number>
__device__ __forceinline__ Number joined(int k, Number a, Number b) {
  return k == kMaxRatio ? (b > a ? b : a) : a + b;
}

template <class T>
__device__ __forceinline__ T* partial_of(const Call<T>& call, int block, int sum) {
  return call.partials + static_cast<int64_t>(sum - kFirstSum) * gridDim.x + block;
}

// num_rows: as many of the block's threads have had rows.
template <class T>
__device__ void leave_sums(const Call<T>& call, Shared<T>& shared, const T (&sums)[kNumMetrics], int num_rows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  T of_warp[kNumMetrics] = {};
  of_warp[kEntropy] = warp_sum(sums[kEntropy]), of_warp[kKl] = warp_sum(sums[kKl]);
  if (warp * kWarp < num_rows) {  // in the other warps all but these two, which are sums over elements, are 0
#pragma unroll
    for (int k = kFirstSum; k < kNumMetrics; ++k) {
      if (k != kEntropy && k != kKl) of_warp[k] = k == kMaxRatio ? warp_max(sums[k]) : warp_sum(sums[k]);
    }
  }
#pragma unroll
  for (int k = kFirstSum; k < kNumMetrics; ++k) {
    if (lane == 0) shared.warp_sums[warp][k] = of_warp[k];
  }
  __syncthreads();
  const int k = kFirstSum + static_cast<int>(threadIdx.x);
  if (k < kNumMetrics) {
    T sum = T(0);
    for (int w = 0; w < kWarps; ++w) sum = joined(k, sum, shared.warp_sums[w][k]);
    *partial_of(call, blockIdx.x, k) = sum;
  }
}

// The sums over rows of d loss / d log std, from those of each place of the tile in shared.terms.
template <class T>
__device__ void leave_columns(const Call<T>& call, Shared<T>& shared) {
  const int A = static_cast<int>(call.args.num_actions);
  const int elements = call.tile_rows * A;
  const int groups = call.column_groups;
  for (int i = threadIdx.x; i < groups * A; i += kThreads) {
    T sum = T(0);
    for (int k = i; k < elements; k += groups * A) sum += shared.terms[k];
    if (groups == 1) {
      *partial_of(call, blockIdx.x, kNumMetrics + i) = sum;
    } else {
      shared.coefficient[i] = sum;
    }
  }
  if (groups == 1) return;
  __syncthreads();
  const int column = threadIdx.x;
  if (column < A) {
    T sum = T(0);
    for (int g = 0; g < groups; ++g) sum += shared.coefficient[g * A + column];
    *partial_of(call, blockIdx.x, kNumMetrics + column) = sum;
  }
}

// Metrics and the gradient of a shared std, by one block, when all have left their sums: kLanesOfSum neighbouring
// threads for each sum, which take neighbouring blocks. Four partial sums are added in their own type before they go
// into the double, whose arithmetic is slow on many GPUs. kInFlight: partial sums that a thread reads at a time; with
// 40 one round takes what 320 blocks left.
template <int kInFlight, class T>
__device__ void finish(const Call<T>& call, Shared<T>& shared, bool shared_std, bool entropy_of_rows) {
  const PpoLossArgs& args = call.args;
  const int t = threadIdx.x, lane = t % kLanesOfSum, blocks = gridDim.x;
  const int num_sums = kNumMetrics + (shared_std ? static_cast<int>(args.num_actions) : 0);
  constexpr int kSumsOfWarp = kWarp / kLanesOfSum;
  for (int of_warp = kFirstSum + t / kWarp * kSumsOfWarp; of_warp < num_sums; of_warp += kWarps * kSumsOfWarp) {
    const int k = of_warp + t % kWarp / kLanesOfSum;
    const bool inside = k < num_sums, of_std = inside && k >= kNumMetrics && lane == 0;
    const T std = of_std ? read<T>(args.std, 0, k - kNumMetrics) : T(1);
    double total = 0.0;
    for (int first = 0; first < blocks; first += kInFlight * kLanesOfSum) {
      T x[kInFlight] = {};
      const int left = inside ? blocks - first - lane : 0;
      const T* from = partial_of(call, first + lane, k);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i % kAtOnce == 0 && first + i * kLanesOfSum >= blocks) break;
        // past the L1 cache, which does not see what other processors wrote
        if (i * kLanesOfSum < left) x[i] = __ldcg(from + i * kLanesOfSum);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; i += 4) {
        if (i % kAtOnce == 0 && first + i * kLanesOfSum >= blocks) break;
        const T four = joined(k, joined(k, x[i], x[i + 1]), joined(k, x[i + 2], x[i + 3]));
        total = joined(k, total, static_cast<double>(four));
      }
    }
#pragma unroll
    for (int offset = kLanesOfSum / 2; offset > 0; offset /= 2) {
      total = joined(k, total, __shfl_xor_sync(0xffffffffu, total, offset));
    }
    if (of_std) {
      const double gradient = (total - shared.coefficients[kOfEntropy]) * (1.0 / static_cast<double>(std));
      write_element(args.grad_std, k - kNumMetrics, static_cast<T>(gradient));
    } else if (inside && lane == 0) {
      shared.totals[k] = k == kEntropy && !entropy_of_rows ? shared.sum_log_std : total * call.share[k];
    }
  }
  __syncthreads();
  if (t == 0) {
    const double* of = shared.coefficients;
    finish_metrics(shared.totals, args.num_actions, of[kOfValue], of[kOfEntropy], of[kOfKl]);
  }
  __syncthreads();
  if (t < kNumMetrics) write_element(args.metrics, t, static_cast<T>(shared.totals[t]));
}

// --- CUDA kernels ----------------------------------------------------------------------------------------------------

// Net: the elements of mean, std and their gradients, if kVector; the rollout's are T then. Else all are what their
// views say.
template <class T, class Net, Std kStd, bool kVector>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? kBlocksPerProcessor : 1)
    ppo_loss_kernel(const __grid_constant__ Call<T> call) {
  __shared__ Shared<T> shared;
  const PpoLossArgs& args = call.args;
  const int A = static_cast<int>(args.num_actions);
  const int t = threadIdx.x;
  const bool new_old = args.kl_new_old;
  const Place<kVector> place(A);
  const std::conditional_t<kVector, KnownType<T, Net>, AnyType<T>> reader;
  const int lane = t % kWarp, warp = t / kWarp;
  shared.fault[t] = 0;
  __syncthreads();

  // what depends on the column alone; the stds themselves until the first tile is on its way
  T std[kPerThread], inv_std[kPerThread];
  StdPair<T> stds[kPerThread];
  if constexpr (kStd != Std::kPerRow) {
    read_columns<T>(args.std, place, [&](int e, T x) { inv_std[e] = x; });
    if constexpr (kStd == Std::kShared) read_columns<T>(args.old_std, place, [&](int e, T x) { stds[e].inv_q = x; });
  }

  T sums[kNumMetrics] = {};
  T column_sums[kPerThread] = {};
  for (int64_t tile = blockIdx.x; tile < call.num_tiles; tile += gridDim.x) {
    const int64_t first = tile * call.tile_rows;
    const int rows = static_cast<int>(min(args.num_rows - first, static_cast<int64_t>(call.tile_rows)));
    const int rows_kl = static_cast<int>(max(min(args.num_original - first, static_cast<int64_t>(rows)), int64_t(0)));
    const int count = rows * A, count_kl = rows_kl * A;

    int64_t own[kPerThread], source[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      own[e] = first + place.row(e);
      source[e] = place.row(e) < rows && (!kVector || e == 0) ? rollout_row(call.gather, own[e]) : own[e];
    }
    T actions[kPerThread], mean[kPerThread], old_mean[kPerThread], old_std[kPerThread];
    load<T>(actions, args.actions, place, source, count, T(0));
    load<T>(old_mean, args.old_mean, place, source, count_kl, T(0));
    if constexpr (kStd != Std::kShared) load<T>(old_std, args.old_std, place, source, count_kl, T(1));
    RowInputs<T> in;
    if (t < rows) in = RowInputs<T>(call, first + t, reader);
    load<Net>(mean, args.mean, place, own, count, T(0));
    if constexpr (kStd == Std::kPerRow) load<Net>(std, args.std, place, own, count, T(1));
    if constexpr (kVector) prefetch_tile(call, tile + gridDim.x);
    if (tile == blockIdx.x) {  // the block's first; what is shared here is for after the next barrier
      if (warp == kWarps - 1 && lane < kNumWeights) read_coefficient(call, lane, shared);
      if (warp == kWarps - 2) read_row_of_std<T, kStd>(args, shared);
      if constexpr (kStd != Std::kPerRow) {
#pragma unroll
        for (int e = 0; e < kPerThread; ++e) {
          std[e] = inv_std[e];
          inv_std[e] = reciprocal_or_nan(std[e]);
          if constexpr (kStd == Std::kShared) stds[e] = StdPair<T>(std[e], stds[e].inv_q, inv_std[e], new_old);
        }
      }
    }

    // --- the distribution, element by element
    T z[kPerThread], log_std[kPerThread], kl_value[kPerThread], kl_d_mean[kPerThread], kl_d_log_std[kPerThread];
    Pack<T> terms;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if constexpr (kStd == Std::kPerRow) inv_std[e] = reciprocal_or_nan(std[e]);
      z[e] = standardized(actions[e], mean[e], inv_std[e]);
      terms.elements[e] = T(0.5) * z[e] * z[e];
      if constexpr (kStd == Std::kPerRow) terms.elements[e] += log_std[e] = log_or_nan(std[e]);
    }
    const auto compute_kl = [&](bool direction_new_old) {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if constexpr (kStd != Std::kShared) stds[e] = StdPair<T>(std[e], old_std[e], inv_std[e], direction_new_old);
        const NewKl<T> kl(mean[e], old_mean[e], stds[e], direction_new_old);
        kl_value[e] = kl.value, kl_d_mean[e] = kl.d_mean, kl_d_log_std[e] = kl.d_log_std;
      }
    };
    if (new_old) {  // asked here, not in each element
      compute_kl(true);
    } else {
      compute_kl(false);
    }
    if (place.index(kPerThread - 1) >= count_kl) {  // some are not of original rows
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (place.index(e) >= count_kl) log_std[e] = kl_value[e] = kl_d_mean[e] = kl_d_log_std[e] = T(0);
      }
    }
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      sums[kKl] += kl_value[e];
      if constexpr (kStd == Std::kPerRow) sums[kEntropy] += log_std[e];
    }
    note_faults<kStd>(old_mean, old_std, place, shared.fault);
    if (kVector && call.sum_in_fours) {
      // odd rows: no two of the threads that add them up read the same bank
      const int quads = A / kPerThread, stride = quads | 1;
      if (place.row(0) < rows) {
        shared.terms[place.row(0) * stride + place.col(0) / kPerThread] =
            (terms.elements[0] + terms.elements[1]) + (terms.elements[2] + terms.elements[3]);
      }
    } else if constexpr (kVector) {
      *reinterpret_cast<Pack<T>*>(&shared.terms[place.index(0)]) = terms;
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) shared.terms[place.index(e)] = terms.elements[e];
    }
    __syncthreads();

    // --- the losses, row by row
    if (t < rows) {
      const int length = kVector && call.sum_in_fours ? A / kPerThread : A;
      const T* row_terms = shared.terms + t * (kVector && call.sum_in_fours ? length | 1 : length);
      T row_sum = T(0);
#pragma unroll 4
      for (int j = 0; j < length; ++j) row_sum += row_terms[j];
      const bool fault = shared.fault[t] != 0 || (kStd == Std::kShared && shared.old_std_fault && t < rows_kl);
      shared.coefficient[t] =
          row_losses(call, reader, shared, first + t, in, row_sum, shared.log_normalizer, fault, sums);
      shared.fault[t] = 0;
    } else {
      shared.coefficient[t] = T(0);  // rows beyond add nothing to the columns
    }
    __syncthreads();

    // --- the gradients, element by element
    T grad_mean[kPerThread], d_log_std[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const T coefficient = shared.coefficient[place.row(e)], weighted = coefficient * z[e];
      grad_mean[e] = inv_std[e] * weighted;
      d_log_std[e] = weighted * z[e] - coefficient;
    }
    const T kl_weight = shared.weights[kOfKl];
    if (kl_weight != T(0)) {  // else a KL that overflows must not reach the gradients
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        grad_mean[e] += kl_weight * kl_d_mean[e];
        d_log_std[e] += kl_weight * kl_d_log_std[e];
      }
    }
    if constexpr (kStd == Std::kPerRow) {
      T grad_std[kPerThread];
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        const T entropy = place.index(e) < count_kl ? shared.weights[kOfEntropy] : T(0);
        grad_std[e] = (d_log_std[e] - entropy) * inv_std[e];
      }
      store<Net>(grad_std, args.grad_std, place, first * A, count);
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) column_sums[e] += d_log_std[e];
    }
    store<Net>(grad_mean, args.grad_mean, place, first * A, count);
  }

  if constexpr (kStd != Std::kPerRow) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (place.index(e) < call.tile_rows * A) shared.terms[place.index(e)] = column_sums[e];
    }
  }
  // its barrier also stands between the writing of the columns and their reading
  leave_sums(call, shared, sums, call.tile_rows);
  if constexpr (kStd != Std::kPerRow) leave_columns(call, shared);
  constexpr int kInFlight = kVector ? 40 : 16;  // kernels for any type have fewer registers to spare
  if (is_last_block(call.counter, gridDim.x)) {
    finish<kInFlight>(call, shared, kStd != Std::kPerRow, kStd == Std::kPerRow);
  }
}

// For rows that no tile holds: a block takes a row at a time and goes over it twice.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) ppo_loss_wide_kernel(const __grid_constant__ Call<T> call) {
  __shared__ Shared<T> shared;
  const PpoLossArgs& args = call.args;
  const int A = static_cast<int>(args.num_actions);
  const bool new_old = args.kl_new_old, shared_std = args.std.row_stride == 0;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x < kNumWeights) read_coefficient(call, threadIdx.x, shared);
  T sums[kNumMetrics] = {};
  for (int64_t row = blockIdx.x; row < args.num_rows; row += gridDim.x) {
    const int64_t source = rollout_row(call.gather, row);
    const bool original = row < args.num_original;
    const auto std_of = [&](int j) { return read<T>(args.std, row, j); };
    const auto kl_of = [&](int j, T std, bool* fault) {
      const T old_mean = read<T>(args.old_mean, source, j), old_std = read<T>(args.old_std, source, j);
      const StdPair<T> stds(std, old_std, reciprocal_or_nan(std), new_old);
      *fault = !is_positive_normal(old_std) || !is_finite(old_mean);
      return NewKl<T>(read<T>(args.mean, row, j), old_mean, stds, new_old);
    };
    const auto z_of = [&](int j, T inv_std) {
      return standardized(read<T>(args.actions, source, j), read<T>(args.mean, row, j), inv_std);
    };

    T term = T(0), faults = T(0);
    for (int j = threadIdx.x; j < A; j += kThreads) {
      const T std = std_of(j), log_std = log_or_nan(std);
      const T z = z_of(j, reciprocal_or_nan(std));
      term += T(0.5) * z * z + log_std;
      if (!original) continue;
      bool fault;
      sums[kEntropy] += log_std;
      sums[kKl] += kl_of(j, std, &fault).value;
      faults += fault ? T(1) : T(0);
    }
    term = warp_sum(term);
    faults = warp_sum(faults);
    if (lane == 0) {
      shared.terms[warp] = term;
      shared.terms[kWarps + warp] = faults;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      T row_sum = T(0), row_faults = T(0);
      for (int w = 0; w < kWarps; ++w) {
        row_sum += shared.terms[w];
        row_faults += shared.terms[kWarps + w];
      }
      const double log_normalizer = kHalfLog2Pi * static_cast<double>(A) + clip_fault(shared.coefficients[kClip]);
      shared.coefficient[0] = row_losses(call, AnyType<T>(), shared, row, RowInputs<T>(call, row, AnyType<T>()),
                                         row_sum, log_normalizer, row_faults != T(0), sums);
    }
    __syncthreads();
    const T coefficient = shared.coefficient[0];
    const T kl_weight = original ? shared.weights[kOfKl] : T(0);
    const T entropy_weight = original ? shared.weights[kOfEntropy] : T(0);
    for (int j = threadIdx.x; j < A; j += kThreads) {
      const T std = std_of(j), inv_std = reciprocal_or_nan(std);
      const T z = z_of(j, inv_std), weighted = coefficient * z;
      T grad_mean = inv_std * weighted, d_log_std = weighted * z - coefficient;
      if (kl_weight != T(0)) {
        bool fault;
        const NewKl<T> kl = kl_of(j, std, &fault);
        grad_mean += kl_weight * kl.d_mean;
        d_log_std += kl_weight * kl.d_log_std;
      }
      write_element(args.grad_mean, row * A + j, grad_mean);
      if (shared_std) {
        T* partial = partial_of(call, blockIdx.x, kNumMetrics + j);
        *partial = row == blockIdx.x ? d_log_std : *partial + d_log_std;
      } else {
        write_element(args.grad_std, row * A + j, (d_log_std - entropy_weight) * inv_std);
      }
    }
  }
  leave_sums(call, shared, sums, 1);
  if (is_last_block(call.counter, gridDim.x)) finish<16>(call, shared, shared_std, true);
}

// --- kernel launcher -------------------------------------------------------------------------------------------------

// Rows of a tile. For four elements at a time its length is a multiple of 4, so that every tile starts aligned; 0: no
// such tile.
int rows_of_tile(int64_t A, bool vector) {
  if (A > kTileElements) return 0;
  int rows = static_cast<int>(kTileElements / A);
  if (rows > kThreads) rows = kThreads;
  const int multiple = !vector || A % 4 == 0 ? 1 : (A % 2 == 0 ? 2 : 4);
  return rows - rows % multiple;
}

// Whether four neighbours of the flat tile can be read as one.
bool fits_vector(const View& view, DType dtype, int64_t num_rows, int64_t A) {
  const bool rows_fit = A % kPerThread == 0 ? view.row_stride % kPerThread == 0 : view.row_stride == A || num_rows == 1;
  return view.dtype == dtype && (view.col_stride == 1 || A == 1) && rows_fit &&
         reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(kPerThread * size_of(dtype)) == 0;
}

bool fits_vector(const Output& output, DType dtype, int64_t A) {
  return fits_vector(View{output.data, output.dtype, A, 1}, dtype, 1, A);
}

template <class Net>
bool fits_vector(const PpoLossArgs& args, const Gather& gather) {
  const int64_t A = args.num_actions, N = args.num_rows;
  constexpr DType net = dtype_of<Net>(), rollout = DType::kFloat32;
  const bool std_per_row = args.std.row_stride != 0, old_std_per_row = std_per_row || args.old_std.row_stride != 0;
  return rows_of_tile(A, true) > 0 && (gather.index == nullptr || A % kPerThread == 0) &&
         fits_vector(args.mean, net, N, A) && fits_vector(args.actions, rollout, N, A) &&
         fits_vector(args.old_mean, rollout, args.num_original, A) && fits_vector(args.grad_mean, net, A) &&
         (!std_per_row || (fits_vector(args.std, net, N, A) && fits_vector(args.grad_std, net, A))) &&
         (!old_std_per_row || fits_vector(args.old_std, rollout, args.num_original, A)) && args.values.dtype == net &&
         args.grad_values.dtype == net && args.old_log_prob.dtype == rollout && args.advantages.dtype == rollout &&
         args.returns.dtype == rollout && args.old_values.dtype == rollout;
}

// Those of a block's next tiles: what is read row by row, where the rows lie side by side.
template <class T>
void choose_prefetched(Call<T>& call) {
  static_assert(kMostPrefetched <= kWarps, "a warp for each");
  const PpoLossArgs& args = call.args;
  const auto add = [&](const View& view, int64_t num_rows, int64_t width) {
    if (view.row_stride != width) return;
    call.prefetched[call.num_prefetched++] = {static_cast<const char*>(view.data), num_rows,
                                              width * size_of(view.dtype)};
  };
  for (const View* view : {&args.mean, &args.std, &args.actions}) add(*view, args.num_rows, args.num_actions);
  for (const View* view : {&args.old_mean, &args.old_std}) add(*view, args.num_original, args.num_actions);
  for (const View* view : {&args.values, &args.old_log_prob, &args.advantages, &args.returns, &args.old_values}) {
    add(*view, args.num_rows, 1);
  }
}

template <class T, class Net, bool kVector>
void launch_tiles(Call<T> call, const Stream& stream) {
  const PpoLossArgs& args = call.args;
  call.tile_rows = rows_of_tile(args.num_actions, kVector);
  call.num_tiles = blocks_of(args.num_rows, call.tile_rows);
  call.sum_in_fours = args.num_actions % kPerThread == 0;
  const int64_t A = args.num_actions, most = resident_blocks(stream.device, kBlocksPerProcessor);
  call.column_groups = A < kThreads ? static_cast<int>(kThreads / A) : 1;
  if (kVector && call.num_tiles > most && call.gather.index == nullptr) choose_prefetched(call);
  const auto kernel = args.std.row_stride != 0       ? ppo_loss_kernel<T, Net, Std::kPerRow, kVector>
                      : args.old_std.row_stride != 0 ? ppo_loss_kernel<T, Net, Std::kOldPerRow, kVector>
                                                     : ppo_loss_kernel<T, Net, Std::kShared, kVector>;
  launch("ppo_loss_kernel", kernel, call.num_tiles < most ? call.num_tiles : most, kThreads, stream, call);
}

template <class T>
void run(const PpoLossArgs& args, const Gather& gather, const Scratch& scratch, const Stream& stream) {
  Call<T> call{};
  call.args = args;
  call.gather = gather;
  call.partials = static_cast<T*>(scratch.partials);
  call.counter = scratch.counter;
  call.row_weight = static_cast<T>(1.0 / static_cast<double>(args.num_rows));
  call.original_weight = static_cast<T>(1.0 / static_cast<double>(args.num_original));
  for (int k = 0; k < kNumMetrics; ++k) call.share[k] = 1.0 / rows_of_metric(k, args);
  if (rows_of_tile(args.num_actions, false) == 0) {
    const int64_t most = resident_blocks(stream.device, kBlocksPerProcessor);
    launch("ppo_loss_wide_kernel", ppo_loss_wide_kernel<T>, args.num_rows < most ? args.num_rows : most, kThreads,
           stream, call);
    return;
  }
  if constexpr (sizeof(T) == 4) {
    if (fits_vector<float>(args, gather)) return launch_tiles<T, float, true>(call, stream);
    if (fits_vector<BFloat16>(args, gather)) return launch_tiles<T, BFloat16, true>(call, stream);
    if (fits_vector<Float16>(args, gather)) return launch_tiles<T, Float16, true>(call, stream);
  }
  launch_tiles<T, T, false>(call, stream);
}

}  // namespace

int64_t ppo_loss_partials(int64_t num_actions, int device) {
  return sums_of_block(num_actions) * resident_blocks(device, kBlocksPerProcessor);
}

void ppo_loss(const PpoLossArgs& args, const Gather& gather, bool use_double, const Scratch& scratch,
              const Stream& stream) {
  if (use_double) {
    run<double>(args, gather, scratch, stream);
  } else {
    run<float>(args, gather, scratch, stream);
  }
}

}  // namespace pyfast_ppo::cuda
