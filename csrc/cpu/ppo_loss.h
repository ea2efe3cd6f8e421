// The PPO loss of rsl_rl with its metrics and all gradients, in one pass over the rows.
#pragma once

#include "tensor.h"

namespace pyfast_ppo {

struct PpoLossArgs {
  int64_t num_rows;      // N
  int64_t num_original;  // only the first rows enter the entropy and the KL
  int64_t num_actions;   // A

  View mean, std, values;                         // [N, A], [A] or [N, A], [N]
  View actions, old_log_prob, old_mean, old_std;  // [N, A], [N], [num_original, A], [A] or [num_original, A]
  View advantages, returns, old_values;           // [N]

  double clip_param, value_loss_coef, entropy_coef, kl_coef;
  bool use_clipped_value_loss;
  bool kl_new_old;  // KL(new || old) in place of KL(old || new)

  Output metrics;      // [kNumMetrics]
  Output grad_mean;    // [N, A]
  Output grad_std;     // as std
  Output grad_values;  // [N]
};

// The order of the metrics in the output.
enum Metric {
  kLoss,
  kSurrogate,
  kValueLoss,
  kEntropy,
  kKl,
  kApproxKl,
  kClipFraction,
  kMaxRatio,
  kNonfinite,
  kNumMetrics
};

// The first element of a tensor.
double read_number(const View& view);

// Arithmetic in double if any tensor is float64, else in float. The same arguments give the same bits for any
// num_threads.
void ppo_loss(const PpoLossArgs& args, bool use_double, int num_threads);

}  // namespace pyfast_ppo
