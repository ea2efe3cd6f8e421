#include "gae.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../math/gae.h"
#include "isa.h"
#include "parallel.h"

namespace pyfast_ppo {

namespace {

constexpr int64_t kSmallestBlock = 128;  // environments of one task: memory is read in pieces of that many numbers,
constexpr int64_t kLargestBlock = 2048;  // so the more the better, as long as there are tasks for all threads
constexpr int64_t kGaeScratch = 7;       // arrays of that length that a task needs
constexpr int64_t kFlatBlock = 4096;     // elements of one task of the normalisation

// Of a range of numbers: sums of their deviations from a number near their mean.
struct Moments {
  double count, center, deviations, squares;
};

}  // namespace
}  // namespace pyfast_ppo

#define PYFAST_PPO_KERNEL "gae_kernel.inl"
#include "for_each_isa.h"

namespace pyfast_ppo {

namespace {

// As rsl_rl: (A - mean) / (std + 1e-8) with the unbiased std; sums in a fixed order.
template <class T>
void normalize(T* advantages, int64_t count, int num_threads) {
  const int64_t blocks = (count + kFlatBlock - 1) / kFlatBlock;
  const auto for_each_block = [&](const auto& task) {
    for_each_task<T>(blocks, num_threads, 0, [&](int64_t i, T*) {
      task(i, advantages + i * kFlatBlock, i + 1 < blocks ? kFlatBlock : count - i * kFlatBlock);
    });
  };
  std::vector<Moments> moments(static_cast<size_t>(blocks));
  for_each_block([&](int64_t i, const T* x, int64_t n) { moments[i] = PYFAST_PPO_DISPATCH(T, moments_of(x, n)); });
  double sum = 0.0, squares = 0.0;
  for (const Moments& block : moments) sum += block.count * block.center + block.deviations;
  const double mean = sum / static_cast<double>(count);
  for (const Moments& block : moments) {  // (x - mean)^2 = ((x - center) + shift)^2
    const double shift = block.center - mean;
    squares += block.squares + shift * (2.0 * block.deviations + block.count * shift);
  }
  if (squares < 0.0) squares = 0.0;  // by rounding, where all are equal
  const T scale = static_cast<T>(std::sqrt(squares / static_cast<double>(count - 1)) + 1e-8);
  for_each_block(
      [&](int64_t, T* x, int64_t n) { PYFAST_PPO_DISPATCH(T, normalize_range(x, n, static_cast<T>(mean), scale)); });
}

template <class T>
void run(const GaeArgs& args, int num_threads) {
  const int64_t share = args.num_envs / (2 * std::max<int64_t>(num_threads, 1)) / kSmallestBlock * kSmallestBlock;
  const int64_t block = std::clamp(share, kSmallestBlock, kLargestBlock);
  for_each_task<T>((args.num_envs + block - 1) / block, num_threads, kGaeScratch * block, [&](int64_t i, T* scratch) {
    const int64_t env = i * block, n = std::min(block, args.num_envs - env);
    PYFAST_PPO_DISPATCH(T, run_gae_block(args, env, n, scratch));
  });
  if (args.normalize) normalize<T>(static_cast<T*>(args.advantages), args.num_steps * args.num_envs, num_threads);
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
