// Log-probability, entropy and KL of diagonal Gaussians, row by row, and their gradients.
#pragma once

#include "../math/kl.h"
#include "../tensor.h"

namespace pyfast_ppo {

// All matrices are [N, A]; one with row_stride 0 is a row shared by all. Gradients have the shape of what they belong
// to.
struct GaussianShape {
  int64_t num_rows;
  int64_t num_actions;
  bool use_double;  // arithmetic in double, else in float
  int num_threads;
};

// out[r] = sum over j of log N(actions; mean, std)
void gaussian_log_prob(const GaussianShape&, View actions, View mean, View std, Output out);
// grad: [N]. grad_actions is the negative of grad_mean.
void gaussian_log_prob_backward(const GaussianShape&, View actions, View mean, View std, View grad, Output grad_mean,
                                Output grad_std);

// The same less old_log_prob [N] is a log-ratio; value[r] and coefficient[r] are those of the loss in it.
void gaussian_kl_loss(const GaussianShape&, KlLoss, View actions, View mean, View std, View old_log_prob, Output value,
                      Output coefficient);

// out[r] = sum over j of log std + 1/2 log(2 pi e)
void gaussian_entropy(const GaussianShape&, View std, Output out);
void gaussian_entropy_backward(const GaussianShape&, View std, View grad, Output grad_std);

// out[r] = KL(N(mean_p, std_p) || N(mean_q, std_q))
void gaussian_kl(const GaussianShape&, View mean_p, View std_p, View mean_q, View std_q, Output out);
// grad_mean_q is the negative of grad_mean_p.
void gaussian_kl_backward(const GaussianShape&, View mean_p, View std_p, View mean_q, View std_q, View grad,
                          Output grad_mean_p, Output grad_std_p, Output grad_std_q);

}  // namespace pyfast_ppo
