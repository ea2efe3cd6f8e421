// Log-probability, entropy and KL of diagonal Gaussians, row by row, and their gradients.
#pragma once

#include "../math/kl.h"
#include "../tensor.h"
#include "launch.h"

namespace pyfast_ppo::cuda {

// Inputs are [N, A]; one with row_stride 0 is a row shared by all.
struct GaussianShape {
  int64_t num_rows;
  int64_t num_actions;
  bool use_double;  // arithmetic in double, else in float
};

enum class Gaussian {
  kLogProb,  // of actions, mean, std; gradients of mean (that of actions is its negative) and std
  kEntropy,  // of std; gradient of std
  kKl        // of mean_p, std_p, mean_q, std_q; gradients of mean_p (that of mean_q is its negative), std_p, std_q
};

// out: [N]. Asynchronous, like all of these; throws std::runtime_error if the launch fails.
void gaussian(Gaussian function, const GaussianShape& shape, const View* inputs, const Output& out,
              const Stream& stream);

// The log-probability of actions, mean, std less old_log_prob [N] is a log-ratio; value and coefficient, [N], are those
// of the loss in it.
void gaussian_kl_loss(KlLoss which, const GaussianShape& shape, const View* inputs, const View& old_log_prob,
                      const Output& value, const Output& coefficient, const Stream& stream);

// grad: [N]. A gradient is [N, A], or, of a std that is a shared row, [gaussian_blocks(shape), A]: sums over the rows
// of each block, to be added up.
int64_t gaussian_blocks(const GaussianShape& shape);
void gaussian_backward(Gaussian function, const GaussianShape& shape, const View* inputs, const View& grad,
                       const Output* gradients, const Stream& stream);

}  // namespace pyfast_ppo::cuda
