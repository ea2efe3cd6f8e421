#pragma once

#include "../ppo_loss.h"
#include "launch.h"

namespace pyfast_ppo::cuda {

// Which row of the rollout's tensors (actions, old_*, advantages, returns) belongs to row i.
struct Gather {
  const int64_t* index = nullptr;  // [N] on the device; null: row i itself
  int64_t num_rows = 0;            // of the rollout's tensors; an index beyond counts as a row that is not finite
};

struct Scratch {
  void* partials;     // ppo_loss_partials() numbers of the arithmetic's type
  unsigned* counter;  // 0 before a launch and after it
};

// How many partial sums a launch for A actions may leave on this device, whatever N is.
int64_t ppo_loss_partials(int64_t num_actions, int device);

// All addresses are the device's. Arithmetic in double if any tensor is float64, else in float. Asynchronous; the same
// arguments give the same bits. Throws std::runtime_error if the launch fails.
void ppo_loss(const PpoLossArgs& args, const Gather& gather, bool use_double, const Scratch& scratch,
              const Stream& stream);

}  // namespace pyfast_ppo::cuda
