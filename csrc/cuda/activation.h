// The activation of a layer with its bias, as csrc/cpu/activation.h has it, one launch forward and one backward.
#pragma once

#include <cstdint>

#include "../math/activation.h"
#include "launch.h"

namespace pyfast_ppo::cuda {

// f is the activation. All matrices are [num_rows, num_cols], contiguous float32, and all addresses the device's.
// Asynchronous; the same arguments give the same bits. Throws std::runtime_error if the launch fails.

// x[r, c] = f(x[r, c] + bias[c])
void add_bias_and_activate(Activation activation, int64_t num_rows, int64_t num_cols, float* x, const float* bias,
                           const Stream& stream);

// What a launch of the backward pass needs as scratch memory: partial sums, float32, and counters that are 0 before the
// launch; they are so after it.
int64_t activation_partials(int64_t num_rows, int64_t num_cols);
int64_t activation_counters(int64_t num_cols);

// With y what add_bias_and_activate left: grad_x[r, c] = grad_y[r, c] f'(x), and grad_bias[c] its sum over rows, in an
// order that depends on the shape alone. grad_x may be grad_y.
void add_bias_and_activate_backward(Activation activation, int64_t num_rows, int64_t num_cols, const float* grad_y,
                                    const float* y, float* grad_x, float* grad_bias, float* partials,
                                    unsigned* counters, const Stream& stream);

}  // namespace pyfast_ppo::cuda
