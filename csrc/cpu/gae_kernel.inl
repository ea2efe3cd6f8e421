// The kernel, once per instruction set (for_each_isa.h): a block of environments at a time, from the last step to the
// first.

#include "tile.inl"

template <class T>
void run_gae_block(const GaeCall& call, int64_t block, T* memory) {
  const GaeArgs& args = call.args;
  T* s[6];
  for (int i = 0; i < 6; ++i) s[i] = memory + i * kGaeBlock;
  T *advantage = memory + 6 * kGaeBlock, *next_value = memory + 7 * kGaeBlock;
  const T gamma = static_cast<T>(args.gamma), gamma_lam = static_cast<T>(args.gamma * args.lam);
  const int64_t env = block * kGaeBlock;
  const int64_t n = args.num_envs - env < kGaeBlock ? args.num_envs - env : kGaeBlock;
  const auto step_of = [&](const View& view, int64_t t, T* scratch) {
    View column = view;  // step t of these environments, as n rows of one column
    column.data = element(view, t * view.row_stride + env * view.col_stride);
    column.row_stride = view.col_stride;
    return read_rows(column, 0, n, 1, scratch);
  };
  const T* last = step_of(args.last_values, 0, s[0]);
  for (int64_t e = 0; e < n; ++e) {
    next_value[e] = last[e];
    advantage[e] = T(0);
  }
  LaneSum<T> sum;
  for (int64_t t = args.num_steps - 1; t >= 0; --t) {
    const T* rewards = step_of(args.rewards, t, s[0]);
    const T* values = step_of(args.values, t, s[1]);
    const T* dones = step_of(args.dones, t, s[2]);
    if (args.time_outs.data != nullptr) {
      const T* time_outs = step_of(args.time_outs, t, s[3]);
      const T* final_values = args.final_values.data != nullptr ? step_of(args.final_values, t, s[4]) : values;
      for (int64_t e = 0; e < n; ++e) {
        const T at_end = time_outs[e] != T(0) ? final_values[e] : T(0);
        next_value[e] = dones[e] != T(0) ? at_end : next_value[e];
      }
    } else {
      for (int64_t e = 0; e < n; ++e) next_value[e] = dones[e] != T(0) ? T(0) : next_value[e];
    }
    T* advantages = static_cast<T*>(args.advantages) + t * args.num_envs + env;
    T* returns = static_cast<T*>(args.returns) + t * args.num_envs + env;
    for (int64_t e = 0; e < n; ++e) {
      const T delta = delta_of(rewards[e], gamma, next_value[e], values[e]);
      advantage[e] = advantage_of(delta, dones[e] != T(0) ? T(0) : gamma_lam, advantage[e]);
      advantages[e] = advantage[e];
      returns[e] = advantage[e] + values[e];
      next_value[e] = values[e];
    }
    sum.add(advantage, n);
  }
  call.sums[block] = sum.total();
}

// A range of the flat advantages, its deviations from the mean squared and summed.
template <class T>
double squared_deviations(const T* advantages, int64_t count, T mean, T* scratch) {
  for (int64_t i = 0; i < count; ++i) scratch[i] = (advantages[i] - mean) * (advantages[i] - mean);
  LaneSum<T> sum;
  sum.add(scratch, count);
  return sum.total();
}

template <class T>
void normalize_range(T* advantages, int64_t count, T mean, T scale) {
  for (int64_t i = 0; i < count; ++i) advantages[i] = (advantages[i] - mean) / scale;
}
