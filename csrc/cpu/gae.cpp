#include "gae.h"

#include <cmath>
#include <vector>

#include "../math/gae.h"
#include "isa.h"
#include "parallel.h"

namespace pyfast_ppo {

namespace {

constexpr int64_t kGaeBlock = 128;    // environments of one task
constexpr int64_t kGaeScratch = 8;    // arrays of that length that a task needs
constexpr int64_t kFlatBlock = 4096;  // elements of one task of the normalisation

struct GaeCall {
  GaeArgs args;
  double* sums;  // per block: the sum of its advantages
};

}  // namespace
}  // namespace pyfast_ppo

#define PYFAST_PPO_KERNEL "gae_kernel.inl"
#include "for_each_isa.h"

namespace pyfast_ppo {

namespace {

// As rsl_rl: (A - mean) / (std + 1e-8) with the unbiased std; sums in a fixed order.
template <class T>
void normalize(const GaeArgs& args, const std::vector<double>& sums, int num_threads) {
  const int64_t count = args.num_steps * args.num_envs;
  T* advantages = static_cast<T*>(args.advantages);
  double sum = 0.0;
  for (double block_sum : sums) sum += block_sum;
  const T mean = static_cast<T>(sum / static_cast<double>(count));
  const int64_t blocks = (count + kFlatBlock - 1) / kFlatBlock;
  const auto length = [&](int64_t i) {
    return count - i * kFlatBlock < kFlatBlock ? count - i * kFlatBlock : kFlatBlock;
  };
  std::vector<double> squares(static_cast<size_t>(blocks));
  for_each_task<T>(blocks, num_threads, kFlatBlock, [&](int64_t i, T* scratch) {
    squares[i] = PYFAST_PPO_DISPATCH(T, squared_deviations(advantages + i * kFlatBlock, length(i), mean, scratch));
  });
  double variance = 0.0;
  for (double block_squares : squares) variance += block_squares;
  const T scale = static_cast<T>(std::sqrt(variance / static_cast<double>(count - 1)) + 1e-8);
  for_each_task<T>(blocks, num_threads, 0, [&](int64_t i, T*) {
    PYFAST_PPO_DISPATCH(T, normalize_range(advantages + i * kFlatBlock, length(i), mean, scale));
  });
}

template <class T>
void run(const GaeArgs& args, int num_threads) {
  const int64_t blocks = (args.num_envs + kGaeBlock - 1) / kGaeBlock;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  const GaeCall call{args, sums.data()};
  for_each_task<T>(blocks, num_threads, kGaeScratch * kGaeBlock,
                   [&](int64_t block, T* scratch) { PYFAST_PPO_DISPATCH(T, run_gae_block(call, block, scratch)); });
  if (args.normalize) normalize<T>(args, sums, num_threads);
}

}  // namespace

void gae(const GaeArgs& args, bool use_double, int num_threads) {
  if (use_double) {
    run<double>(args, num_threads);
  } else {
    run<float>(args, num_threads);
  }
}

}  // namespace pyfast_ppo
