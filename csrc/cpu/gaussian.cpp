#include "gaussian.h"

#include <utility>
#include <vector>

#include "../math/gaussian.h"
#include "isa.h"
#include "parallel.h"

namespace pyfast_ppo {

namespace {

constexpr int64_t kTileElements = 1024;
constexpr int64_t kMaxTileRows = 256;
constexpr int64_t kGaussianScratch = 8;  // arrays of a tile's length
constexpr int kGaussianOutputs = 3;

struct GaussianCall {
  GaussianShape shape;
  View in[4];
  KlLoss kl_loss;
  View grad;                      // [N], backward only
  Output out[kGaussianOutputs];   // data null: not wanted
  bool shared[kGaussianOutputs];  // the output is [A], a sum over rows
  View shared_std;                // of the log-probability, if all rows have one; data null: each has its own
  const void* inv_std;            // then: 1 / std, repeated to a tile's length, of the arithmetic's type
  double sum_log_std;
  int64_t tile_rows, tile_elements;
  double* partials;  // [tiles, kGaussianOutputs, A]
};

}  // namespace
}  // namespace pyfast_ppo

#define PYFAST_PPO_KERNEL "gaussian_kernel.inl"
#include "for_each_isa.h"

namespace pyfast_ppo {

namespace {

// What log-probabilities need of a std that all rows share, once: no division and no logarithm for each element.
template <class T>
void fill_table(GaussianCall& call, std::vector<T>& inv_std) {
  const int64_t A = call.shape.num_actions;
  inv_std.resize(static_cast<size_t>(call.tile_elements));
  const T* std = baseline::read_rows(call.shared_std, 0, 1, A, inv_std.data());
  for (int64_t j = 0; j < A; ++j) {
    call.sum_log_std += log_or_nan(std[j]);
    inv_std[j] = reciprocal_or_nan(std[j]);
  }
  baseline::repeat_row(inv_std.data(), A, call.tile_rows, inv_std.data());
  call.inv_std = inv_std.data();
}

// Runs a tile function over all rows, then adds up what tiles left for shared outputs, in their order.
template <class T, class TileFunction>
void run(GaussianCall call, const TileFunction& tile_function) {
  const int64_t N = call.shape.num_rows, A = call.shape.num_actions;
  call.tile_rows = kTileElements / A < 1 ? 1 : (kTileElements / A > kMaxTileRows ? kMaxTileRows : kTileElements / A);
  call.tile_elements = call.tile_rows * A;
  const int64_t tiles = (N + call.tile_rows - 1) / call.tile_rows;
  std::vector<T> inv_std;
  if (call.shared_std.data != nullptr) fill_table(call, inv_std);
  bool any_shared = false;
  for (bool shared : call.shared) any_shared = any_shared || shared;
  std::vector<double> partials(any_shared ? static_cast<size_t>(tiles * kGaussianOutputs * A) : 0);
  call.partials = partials.data();
  for_each_task<T>(tiles, call.shape.num_threads, kGaussianScratch * (call.tile_elements + kLanes),
                   [&](int64_t tile, T* scratch) { tile_function(call, tile, scratch); });
  for (int output = 0; output < kGaussianOutputs; ++output) {
    if (!call.shared[output] || call.out[output].data == nullptr) continue;
    std::vector<double> sums(static_cast<size_t>(A), 0.0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t j = 0; j < A; ++j) sums[j] += partials[(tile * kGaussianOutputs + output) * A + j];
    }
    baseline::write_back(call.out[output], 0, A, sums.data());
  }
}

// A template, so that what PYFAST_PPO_DISPATCH leaves out for double is not compiled.
#define PYFAST_PPO_RUN(function, call)                                                                       \
  [&](auto zero) {                                                                                           \
    using T = decltype(zero);                                                                                \
    run<T>(call, [](const GaussianCall& c, int64_t i, T* s) { PYFAST_PPO_DISPATCH(T, function(c, i, s)); }); \
  }

// Runs what PYFAST_PPO_RUN made, with the arithmetic that the call asks for.
template <class Run>
void with_arithmetic(const GaussianCall& call, const Run& run) {
  if (call.shape.use_double) {
    run(double{});
  } else {
    run(float{});
  }
}

GaussianCall make_call(const GaussianShape& shape) {
  GaussianCall call{};
  call.shape = shape;
  return call;
}

void set_std(GaussianCall& call, const View& std) { (std.row_stride == 0 ? call.shared_std : call.in[2]) = std; }

}  // namespace

void gaussian_log_prob(const GaussianShape& shape, View actions, View mean, View std, Output out) {
  GaussianCall call = make_call(shape);
  call.in[0] = actions, call.in[1] = mean, set_std(call, std), call.out[0] = out;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_log_prob_tile, call));
}

void gaussian_log_prob_backward(const GaussianShape& shape, View actions, View mean, View std, View grad,
                                Output grad_mean, Output grad_std) {
  GaussianCall call = make_call(shape);
  call.in[0] = actions, call.in[1] = mean, set_std(call, std), call.grad = grad;
  call.out[0] = grad_mean, call.out[1] = grad_std, call.shared[1] = std.row_stride == 0;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_log_prob_backward_tile, call));
}

void gaussian_kl_loss(const GaussianShape& shape, KlLoss kl_loss, View actions, View mean, View std, View old_log_prob,
                      Output value, Output coefficient) {
  GaussianCall call = make_call(shape);
  call.in[0] = actions, call.in[1] = mean, set_std(call, std), call.in[3] = old_log_prob, call.kl_loss = kl_loss;
  call.out[0] = value, call.out[1] = coefficient;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_kl_loss_tile, call));
}

void gaussian_entropy(const GaussianShape& shape, View std, Output out) {
  GaussianCall call = make_call(shape);
  call.in[0] = std, call.out[0] = out;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_entropy_tile, call));
}

void gaussian_entropy_backward(const GaussianShape& shape, View std, View grad, Output grad_std) {
  GaussianCall call = make_call(shape);
  call.in[0] = std, call.grad = grad, call.out[0] = grad_std;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_entropy_backward_tile, call));
}

void gaussian_kl(const GaussianShape& shape, View mean_p, View std_p, View mean_q, View std_q, Output out) {
  GaussianCall call = make_call(shape);
  call.in[0] = mean_p, call.in[1] = std_p, call.in[2] = mean_q, call.in[3] = std_q, call.out[0] = out;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_kl_tile, call));
}

void gaussian_kl_backward(const GaussianShape& shape, View mean_p, View std_p, View mean_q, View std_q, View grad,
                          Output grad_mean_p, Output grad_std_p, Output grad_std_q) {
  GaussianCall call = make_call(shape);
  call.in[0] = mean_p, call.in[1] = std_p, call.in[2] = mean_q, call.in[3] = std_q, call.grad = grad;
  call.out[0] = grad_mean_p, call.out[1] = grad_std_p, call.out[2] = grad_std_q;
  call.shared[1] = std_p.row_stride == 0, call.shared[2] = std_q.row_stride == 0;
  with_arithmetic(call, PYFAST_PPO_RUN(gaussian_kl_backward_tile, call));
}

}  // namespace pyfast_ppo
