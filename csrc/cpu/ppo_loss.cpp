#include "ppo_loss.h"

#include <type_traits>
#include <vector>

#include "../math/gaussian.h"
#include "../math/ppo.h"
#include "isa.h"
#include "parallel.h"

namespace pyfast_ppo {

namespace {

// One call: the arguments, how the rows are cut, the tables that all threads read and the partial results that they
// leave.
template <class T>
struct PpoLossCall {
  PpoLossArgs args;
  // The arguments', read once: loss and gradients belong together even if another thread writes the tensors meanwhile.
  double clip_param, value_loss_coef, entropy_coef, kl_coef;
  bool std_per_row, old_std_per_row;
  int64_t tile_rows, tile_elements;  // a tile fits the L1 cache
  int64_t chunk_rows, num_chunks;    // a chunk is one thread's task and leaves one partial result
  int64_t partial_size;
  double sum_log_std;
  // rows of A elements, and rows repeated to tile_elements
  T *std_row, *old_std_row, *inv_std, *inv_old_std, *std_tile, *ratio_expm1, *ratio_phi;
  // [num_chunks, partial_size]: the sums behind the metrics, the sum of the rows' coefficients, the std gradient's
  // columns
  double* partials;
};

}  // namespace
}  // namespace pyfast_ppo

#define PYFAST_PPO_KERNEL "ppo_loss_kernel.inl"
#include "for_each_isa.h"

namespace pyfast_ppo {

namespace {

constexpr int64_t kTileElements = 1024;
constexpr int64_t kMaxTileRows = 256;
constexpr int64_t kTilesPerChunk = 4;

// How rows are cut depends on N and A alone, never on the threads: the sums then have one order.
template <class T>
void cut_rows(PpoLossCall<T>& call) {
  const int64_t A = call.args.num_actions;
  int64_t rows = kTileElements / A;
  if (rows > kMaxTileRows) rows = kMaxTileRows;
  if (rows >= 16) rows -= rows % 16;
  if (rows < 1) rows = 1;
  call.tile_rows = rows;
  call.tile_elements = rows * A;
  call.chunk_rows = rows * kTilesPerChunk;
  call.num_chunks = (call.args.num_rows + call.chunk_rows - 1) / call.chunk_rows;
}

template <class T>
void finish(const PpoLossCall<T>& call) {
  const PpoLossArgs& args = call.args;
  const int64_t A = args.num_actions;
  std::vector<double> total(static_cast<size_t>(call.partial_size), 0.0);
  for (int64_t chunk = 0; chunk < call.num_chunks; ++chunk) {
    const double* partial = call.partials + chunk * call.partial_size;
    for (int64_t i = 0; i < call.partial_size; ++i) {
      if (i == kMaxRatio) {
        total[i] = partial[i] > total[i] ? partial[i] : total[i];
      } else {
        total[i] += partial[i];
      }
    }
  }
  for (int k = kLoss + 1; k < kNumMetrics; ++k) total[k] /= rows_of_metric(k, args);
  if (!call.std_per_row) total[kEntropy] = call.sum_log_std;
  finish_metrics(total.data(), A, call.value_loss_coef, call.entropy_coef, call.kl_coef);
  baseline::write_back(args.metrics, 0, kNumMetrics, total.data());
  if (call.std_per_row) return;
  std::vector<double> grad_std(static_cast<size_t>(A));
  for (int64_t j = 0; j < A; ++j) {
    grad_std[j] = (total[kNumMetrics + 1 + j] - total[kNumMetrics] - call.entropy_coef) / call.std_row[j];
  }
  baseline::write_back(args.grad_std, 0, A, grad_std.data());
}

template <class T>
void run(const PpoLossArgs& args, int num_threads) {
  PpoLossCall<T> call{};
  call.args = args;
  call.clip_param = value_of(args.clip_param), call.value_loss_coef = value_of(args.value_loss_coef);
  call.entropy_coef = value_of(args.entropy_coef), call.kl_coef = value_of(args.kl_coef);
  call.std_per_row = args.std.row_stride != 0;
  call.old_std_per_row = call.std_per_row || args.old_std.row_stride != 0;
  cut_rows(call);
  const int64_t A = args.num_actions;
  call.partial_size = kNumMetrics + 1 + (call.std_per_row ? 0 : A);
  std::vector<double> partials(static_cast<size_t>(call.num_chunks * call.partial_size), 0.0);
  std::vector<T> tables(static_cast<size_t>(2 * A + 5 * call.tile_elements));
  call.partials = partials.data();
  call.std_row = tables.data();
  call.old_std_row = call.std_row + A;
  T* tile = call.old_std_row + A;
  for (T** table : {&call.inv_std, &call.inv_old_std, &call.std_tile, &call.ratio_expm1, &call.ratio_phi}) {
    *table = tile;
    tile += call.tile_elements;
  }
  PYFAST_PPO_DISPATCH(T, fill_ppo_loss_tables(call));
  for_each_task<T>(call.num_chunks, num_threads, baseline::ppo_loss_scratch_size(call), [&](int64_t chunk, T* scratch) {
    PYFAST_PPO_DISPATCH(T, run_ppo_loss_chunk(call, chunk, scratch));
  });
  finish(call);
}

}  // namespace

void ppo_loss(const PpoLossArgs& args, bool use_double, int num_threads) {
  if (use_double) {
    run<double>(args, num_threads);
  } else {
    run<float>(args, num_threads);
  }
}

}  // namespace pyfast_ppo
