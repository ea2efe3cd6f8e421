// The activation of a layer with its bias, forward and backward, in one pass over memory each.
#pragma once

#include <cstdint>

namespace pyfast_ppo {

// elu(x) = x above 0, e^x - 1 below. All matrices are [num_rows, num_cols], contiguous float32.

// x[r, c] = elu(x[r, c] + bias[c])
void add_bias_and_elu(int64_t num_rows, int64_t num_cols, float* x, const float* bias, int num_threads);

// With y what add_bias_and_elu left: grad_x[r, c] = grad_y[r, c] elu'(x), and grad_bias[c] its sum over rows, in an
// order that depends on the shape alone. grad_x may be grad_y.
void add_bias_and_elu_backward(int64_t num_rows, int64_t num_cols, const float* grad_y, const float* y, float* grad_x,
                               float* grad_bias, int num_threads);

}  // namespace pyfast_ppo
