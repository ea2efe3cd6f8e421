// Bias and activation of a hidden layer: forward in one launch, backward with the bias's gradient in one launch, too.
//
// A block takes 32 columns, eight threads with four columns each, and 32 rows at a time. Where rows are aligned, four
// columns are one access of 128 bits, and a warp's cover four stretches of 128 bytes. A thread keeps its columns:
// their biases, and the sums over its rows, stay in registers, and nobody divides to know the column of an element.
//
// Backward each block leaves the sums over its rows, and the last block of a tile of columns, which a counter of that
// tile tells it, adds them up. A counter for each tile, not one for all: so the last blocks, for whom everything waits,
// are several, and each has little to read.
#include "activation.h"

#include "launch.cuh"
#include "reduce.cuh"

namespace pyfast_ppo::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // columns of a thread
constexpr int kLanes = 8;      // threads side by side in a row
constexpr int kTileCols = kLanes * kPerThread;
constexpr int kRowsAtATime = kThreads / kLanes;
constexpr int kInFlight = 4;  // rows of a thread that are loaded together
constexpr int kRoundRows = kRowsAtATime * kInFlight;
// Of the backward pass, more or less: two to four for each multiprocessor of today's large GPUs, which is as much as
// memory needs to be busy, and few enough partial sums. A number of its own for each GPU would give other bits on each.
constexpr int64_t kBlocks = 384;
constexpr int kGroups = kThreads / kTileCols;  // threads of the last block that share a column
constexpr int kPartialsInFlight = 16;

// What a thread reads or writes of a row.
struct alignas(kPerThread * sizeof(float)) Pack {
  float of[kPerThread];
};

// A thread's place: which columns are its own, and which chunk of rows is its block's. Blocks that follow each other
// read whole rows together.
template <bool kVector>
struct Place {
  static constexpr int kStep = kVector ? 1 : kLanes;  // between its columns: single accesses lie side by side in a warp
  unsigned tile, chunk;
  int col_of_tile;  // its first column
  int64_t col;
  int cols;  // that a row has from there on, as far as it matters; none or less: the thread has no column
  int row;   // among those at a time

  __device__ Place(int64_t num_cols, unsigned tiles) : tile(blockIdx.x % tiles), chunk(blockIdx.x / tiles) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    col_of_tile = kVector ? lane * kPerThread : lane;
    col = static_cast<int64_t>(tile) * kTileCols + col_of_tile;
    cols = static_cast<int>(min(num_cols - col, static_cast<int64_t>(kTileCols)));
    row = static_cast<int>(threadIdx.x) / kLanes;
  }

  // From and to its first column, which exists.
  __device__ Pack load(const float* from) const {
    Pack x;
    if constexpr (kVector) {
      x = *reinterpret_cast<const Pack*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) x.of[e] = e * kStep < cols ? from[e * kStep] : 0.0f;
    }
    return x;
  }

  __device__ void store(const Pack& x, float* to) const {
    if constexpr (kVector) {
      *reinterpret_cast<Pack*>(to) = x;
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (e * kStep < cols) to[e * kStep] = x.of[e];
      }
    }
  }
};

// --- CUDA kernels ----------------------------------------------------------------------------------------------------

// A chunk is one round of rows.
template <class Function, bool kVector>
__global__ void __launch_bounds__(kThreads, 4)
    add_bias_and_activate_kernel(int64_t num_rows, int64_t num_cols, unsigned tiles, float* x, const float* bias) {
  const Place<kVector> place(num_cols, tiles);
  if (place.cols <= 0) return;
  const int64_t first = static_cast<int64_t>(place.chunk) * kRoundRows + place.row, to_next = kRowsAtATime * num_cols;
  float* const at = x + first * num_cols + place.col;
  const Pack of_column = place.load(bias + place.col);
  Pack element[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (first + k * kRowsAtATime < num_rows) element[k] = place.load(at + k * to_next);
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (first + k * kRowsAtATime >= num_rows) return;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) element[k].of[e] = Function::value(element[k].of[e] + of_column.of[e]);
    place.store(element[k], at + k * to_next);
  }
}

// rows_of_chunk: a multiple of kRoundRows. partials: [chunks, num_cols]. counters: [tiles].
template <class Function, bool kVector>
__global__ void __launch_bounds__(kThreads, 4)
    add_bias_and_activate_backward_kernel(int64_t num_rows, int64_t num_cols, unsigned tiles, int64_t rows_of_chunk,
                                          const float* grad_y, const float* y, float* grad_x, float* grad_bias,
                                          float* partials, unsigned* counters) {
  __shared__ float sums_of_rows[kRowsAtATime][kTileCols];
  __shared__ double totals[kGroups][kTileCols];
  const Place<kVector> place(num_cols, tiles);
  const int64_t first = place.chunk * rows_of_chunk + place.row, to_next = kRowsAtATime * num_cols;
  const int64_t end = min((place.chunk + 1) * rows_of_chunk, num_rows);
  // The pointers move along: where an offset does, from which each address is made, nvcc 13.0 cuts the stores in four.
  grad_y += first * num_cols + place.col;
  y += first * num_cols + place.col;
  grad_x += first * num_cols + place.col;
  float sums[kPerThread] = {};
  for (int64_t left = place.cols > 0 ? end - first : 0; left > 0; left -= kRoundRows) {
    Pack grad[kInFlight], output[kInFlight];
    // all loads first: grad_x may be grad_y, so that the compiler must not move a load over a store
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (k * kRowsAtATime < left) grad[k] = place.load(grad_y + k * to_next);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (k * kRowsAtATime < left) output[k] = place.load(y + k * to_next);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (k * kRowsAtATime >= left) break;
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        grad[k].of[e] = Function::gradient(grad[k].of[e], output[k].of[e]);
        sums[e] = __fadd_rn(sums[e], grad[k].of[e]);  // of what is written, not of a product that was not rounded yet
      }
      place.store(grad[k], grad_x + k * to_next);
    }
    grad_y += kInFlight * to_next;
    y += kInFlight * to_next;
    grad_x += kInFlight * to_next;
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) sums_of_rows[place.row][place.col_of_tile + e * place.kStep] = sums[e];
  __syncthreads();

  // from here on a column has kGroups threads
  const int col_of_tile = static_cast<int>(threadIdx.x) % kTileCols, group = static_cast<int>(threadIdx.x) / kTileCols;
  const int64_t col = static_cast<int64_t>(place.tile) * kTileCols + col_of_tile;
  const bool inside = col < num_cols;
  if (group == 0 && inside) {
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowsAtATime; ++r) sum += sums_of_rows[r][col_of_tile];
    partials[place.chunk * num_cols + col] = sum;
  }
  const unsigned chunks = gridDim.x / tiles;
  if (!is_last_block(counters + place.tile, chunks)) return;
  double total = 0.0;
  for (int64_t first = group; inside && first < chunks; first += kPartialsInFlight * kGroups) {
    float x[kPartialsInFlight];
#pragma unroll
    for (int i = 0; i < kPartialsInFlight; ++i) {  // past the L1 cache, which does not see what other processors wrote
      const int64_t chunk = first + i * kGroups;
      x[i] = chunk < chunks ? __ldcg(partials + chunk * num_cols + col) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPartialsInFlight; ++i) total += static_cast<double>(x[i]);
  }
  totals[group][col_of_tile] = total;
  __syncthreads();
  if (group != 0 || !inside) return;
  for (int g = 1; g < kGroups; ++g) total += totals[g][col_of_tile];
  grad_bias[col] = static_cast<float>(total);
}

// --- kernel launcher -------------------------------------------------------------------------------------------------

int64_t tiles_of(int64_t num_cols) { return blocks_of(num_cols, kTileCols); }

// Of the backward pass: by the shape alone.
int64_t rows_of_chunk(int64_t num_rows, int64_t num_cols) {
  const int64_t chunks = kBlocks / tiles_of(num_cols), rounds = blocks_of(num_rows, kRoundRows);
  return chunks < 2 ? rounds * kRoundRows : blocks_of(rounds, chunks) * kRoundRows;
}

int64_t chunks_of(int64_t num_rows, int64_t num_cols) { return blocks_of(num_rows, rows_of_chunk(num_rows, num_cols)); }

// Whether four neighbours of a row can be accessed as one, in all of them.
template <class... Addresses>
bool fits_vector(int64_t num_cols, Addresses... addresses) {
  return num_cols % kPerThread == 0 && ((reinterpret_cast<uintptr_t>(addresses) % sizeof(Pack) == 0) && ...);
}

}  // namespace

void add_bias_and_activate(Activation activation, int64_t num_rows, int64_t num_cols, float* x, const float* bias,
                           const Stream& stream) {
  const int64_t tiles = tiles_of(num_cols), blocks = blocks_of(num_rows, kRoundRows) * tiles;
  with_activation(activation, [&](auto function) {
    using Function = decltype(function);
    const auto kernel = fits_vector(num_cols, x, bias) ? add_bias_and_activate_kernel<Function, true>
                                                       : add_bias_and_activate_kernel<Function, false>;
    launch("add_bias_and_activate_kernel", kernel, blocks, kThreads, stream, num_rows, num_cols,
           static_cast<unsigned>(tiles), x, bias);
  });
}

int64_t activation_partials(int64_t num_rows, int64_t num_cols) { return chunks_of(num_rows, num_cols) * num_cols; }

int64_t activation_counters(int64_t num_cols) { return tiles_of(num_cols); }

void add_bias_and_activate_backward(Activation activation, int64_t num_rows, int64_t num_cols, const float* grad_y,
                                    const float* y, float* grad_x, float* grad_bias, float* partials,
                                    unsigned* counters, const Stream& stream) {
  const int64_t tiles = tiles_of(num_cols), blocks = chunks_of(num_rows, num_cols) * tiles;
  with_activation(activation, [&](auto function) {
    using Function = decltype(function);
    const auto kernel = fits_vector(num_cols, grad_y, y, grad_x)
                            ? add_bias_and_activate_backward_kernel<Function, true>
                            : add_bias_and_activate_backward_kernel<Function, false>;
    launch("add_bias_and_activate_backward_kernel", kernel, blocks, kThreads, stream, num_rows, num_cols,
           static_cast<unsigned>(tiles), rows_of_chunk(num_rows, num_cols), grad_y, y, grad_x, grad_bias, partials,
           counters);
  });
}

}  // namespace pyfast_ppo::cuda
