// The activation of a layer with its bias, as csrc/cpu/elu.h has it, one launch forward and one backward.
#pragma once

#include <cstdint>

#include "launch.h"

namespace pyfast_ppo::cuda {

// All matrices are [num_rows, num_cols], contiguous float32, and all addresses the device's. Asynchronous; the same
// arguments give the same bits. Throws std::runtime_error if the launch fails.

// x[r, c] = elu(x[r, c] + bias[c])
void add_bias_and_elu(int64_t num_rows, int64_t num_cols, float* x, const float* bias, const Stream& stream);

// What a launch of the backward pass needs as scratch memory: partial sums, float32, and counters that are 0 before the
// launch; they are so after it.
int64_t elu_partials(int64_t num_rows, int64_t num_cols);
int64_t elu_counters(int64_t num_cols);

// With y what add_bias_and_elu left: grad_x[r, c] = grad_y[r, c] elu'(x), and grad_bias[c] its sum over rows, in an
// order that depends on the shape alone. grad_x may be grad_y.
void add_bias_and_elu_backward(int64_t num_rows, int64_t num_cols, const float* grad_y, const float* y, float* grad_x,
                               float* grad_bias, float* partials, unsigned* counters, const Stream& stream);

}  // namespace pyfast_ppo::cuda
