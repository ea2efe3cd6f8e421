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

// The metrics from sums over rows: entropy and KL over the original rows, the others over all. sums[kEntropy] is that
// of log std over original rows and actions, sums[kMaxRatio] a maximum; sums[kLoss] is not looked at.
PYFAST_PPO_INLINE void finish_metrics(const double* sums, const PpoLossArgs& args, double* metrics) {
  const double rows = static_cast<double>(args.num_rows), original = static_cast<double>(args.num_original);
  metrics[kSurrogate] = sums[kSurrogate] / rows;
  metrics[kValueLoss] = sums[kValueLoss] / rows;
  metrics[kEntropy] = sums[kEntropy] / original + kHalfLog2PiE * static_cast<double>(args.num_actions);
  metrics[kKl] = sums[kKl] / original;
  metrics[kApproxKl] = sums[kApproxKl] / rows;
  metrics[kClipFraction] = sums[kClipFraction] / rows;
  metrics[kMaxRatio] = sums[kMaxRatio] + 0.0 * metrics[kApproxKl];  // NaN if a ratio was
  metrics[kNonfinite] = sums[kNonfinite];
  metrics[kLoss] = metrics[kSurrogate] + value_of(args.value_loss_coef) * metrics[kValueLoss] -
                   value_of(args.entropy_coef) * metrics[kEntropy] + value_of(args.kl_coef) * metrics[kKl];
}

}  // namespace pyfast_ppo
