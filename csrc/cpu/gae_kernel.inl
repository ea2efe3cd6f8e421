// The kernel, once per instruction set (for_each_isa.h): a block of environments at a time, from the last step to the
// first.

#include "tile.inl"

// One step of n environments. `advantage` and `next_value` belong to the step after it, and to this one afterwards.
template <bool kTimeOuts, class T>
void gae_step(int64_t n, T gamma, T gamma_lam, const T* __restrict rewards, const T* __restrict values,
              const uint8_t* __restrict dones, const uint8_t* __restrict time_outs, const T* __restrict final_values,
              T* __restrict advantage, T* __restrict next_value, T* __restrict advantages, T* __restrict returns) {
  for (int64_t e = 0; e < n; ++e) {
    const bool done = dones[e] != 0;
    T at_end = T(0);
    if constexpr (kTimeOuts) at_end = time_outs[e] != 0 ? final_values[e] : T(0);
    const T delta = delta_of(rewards[e], gamma, done ? at_end : next_value[e], values[e]);
    advantages[e] = advantage[e] = advantage_of(delta, done ? T(0) : gamma_lam, advantage[e]);
    returns[e] = advantage[e] + values[e];
    next_value[e] = values[e];
  }
}

// Environments [env, env + n). `memory`: n numbers for each of kGaeScratch arrays.
template <class T>
void run_gae_block(const GaeArgs& args, int64_t env, int64_t n, T* memory) {
  T* s[kGaeScratch];
  for (int64_t i = 0; i < kGaeScratch; ++i) s[i] = memory + i * n;
  T *advantage = s[0], *next_value = s[1];
  const T gamma = static_cast<T>(args.gamma), gamma_lam = static_cast<T>(args.gamma * args.lam);
  const auto step_of = [&](const View& view, int64_t t, T* scratch) {
    View column = view;  // step t of these environments, as n rows of one column
    column.data = element(view, t * view.row_stride + env * view.col_stride);
    column.row_stride = view.col_stride;
    return read_rows(column, 0, n, 1, scratch);
  };
  const auto flags_of = [&](const View& view, int64_t t, T* scratch) -> const uint8_t* {
    const auto* flags = static_cast<const uint8_t*>(view.data) + t * view.row_stride + env * view.col_stride;
    if (view.col_stride == 1) return flags;
    auto* copy = reinterpret_cast<uint8_t*>(scratch);
    for (int64_t e = 0; e < n; ++e) copy[e] = flags[e * view.col_stride];
    return copy;
  };
  const T* last = step_of(args.last_values, 0, s[2]);
  for (int64_t e = 0; e < n; ++e) {
    next_value[e] = last[e];
    advantage[e] = T(0);
  }
  for (int64_t t = args.num_steps - 1; t >= 0; --t) {
    const T* rewards = step_of(args.rewards, t, s[2]);
    const T* values = step_of(args.values, t, s[3]);
    const uint8_t* dones = flags_of(args.dones, t, s[4]);
    T* advantages = static_cast<T*>(args.advantages) + t * args.num_envs + env;
    T* returns = static_cast<T*>(args.returns) + t * args.num_envs + env;
    if (args.time_outs.data == nullptr) {
      gae_step<false, T>(n, gamma, gamma_lam, rewards, values, dones, nullptr, nullptr, advantage, next_value,
                         advantages, returns);
    } else {
      const uint8_t* time_outs = flags_of(args.time_outs, t, s[5]);
      const T* final_values = args.final_values.data != nullptr ? step_of(args.final_values, t, s[6]) : values;
      gae_step<true, T>(n, gamma, gamma_lam, rewards, values, dones, time_outs, final_values, advantage, next_value,
                        advantages, returns);
    }
  }
}

template <class T>
Moments moments_of(const T* x, int64_t count) {
  LaneSum<T> sum, deviations, squares;
  sum.add(x, count);
  const T center = static_cast<T>(sum.total() / static_cast<double>(count));
  for_each_lane(count, [&](int64_t i, int k) { deviations.lanes[k] += x[i] - center; });
  for_each_lane(count, [&](int64_t i, int k) { squares.lanes[k] += (x[i] - center) * (x[i] - center); });
  return {static_cast<double>(count), center, deviations.total(), squares.total()};
}

template <class T>
void normalize_range(T* x, int64_t count, T mean, T scale) {
  for (int64_t i = 0; i < count; ++i) x[i] = (x[i] - mean) / scale;
}
