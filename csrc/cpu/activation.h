// The activation of a layer with its bias, forward and backward, in one pass over memory each.
#pragma once

#include <cstdint>

#include "../math/activation.h"

namespace pyfast_ppo {

// All matrices are [num_rows, num_cols], contiguous float32; f is the activation.

// x[r, c] = f(x[r, c] + bias[c])
void add_bias_and_activate(Activation activation, int64_t num_rows, int64_t num_cols, float* x, const float* bias,
                           int num_threads);

// With y what add_bias_and_activate left: grad_x[r, c] = grad_y[r, c] f'(x), and grad_bias[c] its sum over rows, in an
// order that depends on the shape alone. grad_x may be grad_y.
void add_bias_and_activate_backward(Activation activation, int64_t num_rows, int64_t num_cols, const float* grad_y,
                                    const float* y, float* grad_x, float* grad_bias, int num_threads);

}  // namespace pyfast_ppo
