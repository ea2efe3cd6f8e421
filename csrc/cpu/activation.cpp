#include "activation.h"

#include <cstring>
#include <vector>

#include "../math/activation.h"
#include "isa.h"
#include "parallel.h"

#define PYFAST_PPO_KERNEL "activation_kernel.inl"
#include "for_each_isa.h"

namespace pyfast_ppo {

namespace {

constexpr int64_t kTaskElements = 16384;

// As many rows as one task takes: of this shape, for any number of threads.
int64_t rows_of_task(int64_t num_cols) { return num_cols >= kTaskElements ? 1 : kTaskElements / num_cols; }

int64_t rows_from(int64_t first, int64_t per_task, int64_t num_rows) {
  return num_rows - first < per_task ? num_rows - first : per_task;
}

}  // namespace

void add_bias_and_activate(Activation activation, int64_t num_rows, int64_t num_cols, float* x, const float* bias,
                           int num_threads) {
  const int64_t per_task = rows_of_task(num_cols);
  with_activation(activation, [&](auto function) {
    using Function = decltype(function);
    for_each_task<float>((num_rows + per_task - 1) / per_task, num_threads, 0, [&](int64_t task, float*) {
      const int64_t first = task * per_task, rows = rows_from(first, per_task, num_rows);
      PYFAST_PPO_DISPATCH(float, activate_rows<Function>(x + first * num_cols, bias, rows, num_cols));
    });
  });
}

void add_bias_and_activate_backward(Activation activation, int64_t num_rows, int64_t num_cols, const float* grad_y,
                                    const float* y, float* grad_x, float* grad_bias, int num_threads) {
  const int64_t per_task = rows_of_task(num_cols), tasks = (num_rows + per_task - 1) / per_task;
  std::vector<float> partials(static_cast<size_t>(tasks * num_cols));
  with_activation(activation, [&](auto function) {
    using Function = decltype(function);
    for_each_task<float>(tasks, num_threads, 0, [&](int64_t task, float*) {
      const int64_t first = task * per_task, rows = rows_from(first, per_task, num_rows), offset = first * num_cols;
      float* const sums = partials.data() + task * num_cols;
      PYFAST_PPO_DISPATCH(
          float, activate_backward_rows<Function>(grad_y + offset, y + offset, grad_x + offset, sums, rows, num_cols));
    });
  });
  for (int64_t c = 0; c < num_cols; ++c) {
    double sum = 0.0;
    for (int64_t task = 0; task < tasks; ++task) sum += partials[static_cast<size_t>(task * num_cols + c)];
    grad_bias[c] = static_cast<float>(sum);
  }
}

}  // namespace pyfast_ppo
