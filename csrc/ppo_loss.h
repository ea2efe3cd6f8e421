// The PPO loss of rsl_rl with its metrics and all gradients, in one pass over the rows: what goes in and what comes
// out.
#pragma once

#include "math/gaussian.h"
#include "tensor.h"

namespace pyfast_ppo {

struct PpoLossArgs {
  int64_t num_rows;      // N
  int64_t num_original;  // only the first rows enter the entropy and the KL
  int64_t num_actions;   // A

  View mean, std, values;                         // [N, A], [A] or [N, A], [N]
  View actions, old_log_prob, old_mean, old_std;  // [N, A], [N], [num_original, A], [A] or [num_original, A]
  View advantages, returns, old_values;           // [N]

  Coefficient clip_param, value_loss_coef, entropy_coef, kl_coef;
  bool use_clipped_value_loss;
  bool kl_new_old;  // KL(new || old) in place of KL(old || new)

  Output metrics;      // [kNumMetrics]
  Output grad_mean;    // [N, A]
  Output grad_std;     // as std
  Output grad_values;  // [N]
};

// The order of the metrics in the output: that of reference.METRICS.
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

// The number of rows by which the sum of a metric is divided; 1 for those that are no means.
PYFAST_PPO_INLINE double rows_of_metric(int metric, const PpoLossArgs& args) {
  if (metric == kMaxRatio || metric == kNonfinite) return 1.0;
  return static_cast<double>(metric == kEntropy || metric == kKl ? args.num_original : args.num_rows);
}

// Completes the metrics, in their place: the mean of log std, summed over actions, becomes the entropy; the loss is
// made of the others. The coefficients are those of value loss, entropy and KL. With a coefficient of 0 a KL that
// overflowed is left out, as it is of the gradients; one of faulty rows shows.
PYFAST_PPO_INLINE void finish_metrics(double* metrics, int64_t num_actions, double of_value, double of_entropy,
                                      double of_kl) {
  metrics[kEntropy] += kHalfLog2PiE * static_cast<double>(num_actions);
  metrics[kMaxRatio] += 0.0 * metrics[kApproxKl];  // NaN if a ratio was
  const double kl = of_kl != 0.0 || metrics[kNonfinite] > 0.0 ? of_kl * metrics[kKl] : 0.0;
  metrics[kLoss] = metrics[kSurrogate] + of_value * metrics[kValueLoss] - of_entropy * metrics[kEntropy] + kl;
}

}  // namespace pyfast_ppo
