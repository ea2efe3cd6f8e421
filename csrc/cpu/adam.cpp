#include "adam.h"

#include <cmath>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace pyfast_ppo {

namespace {

constexpr int64_t kChunk = 8192;          // elements of one task
constexpr int64_t kSquaresInFloat = 256;  // that are added before they are added up in double

}  // namespace
}  // namespace pyfast_ppo

#define PYFAST_PPO_KERNEL "adam_kernel.inl"
#include "for_each_isa.h"

namespace pyfast_ppo {

void adam_step(AdamArgs args, int num_threads) {
  cut(args, kChunk);
  // work(chunk, tensor, its number, first element, number of elements)
  const auto for_each_chunk = [&](const auto& work) {
    for_each_task<float>(num_chunks(args), num_threads, 0, [&](int64_t chunk, float*) {
      const int i = tensor_of_chunk(args, static_cast<int>(chunk));
      const AdamTensor& tensor = args.tensors[i];
      const int64_t begin = (chunk - args.first_chunk[i]) * kChunk, left = tensor.count - begin;
      work(chunk, tensor, i, begin, left < kChunk ? left : kChunk);
    });
  };

  std::vector<double> squares(static_cast<size_t>(num_chunks(args)));
  for_each_chunk([&](int64_t chunk, const AdamTensor& tensor, int, int64_t begin, int64_t count) {
    squares[static_cast<size_t>(chunk)] = PYFAST_PPO_DISPATCH(float, sum_of_squares(tensor.gradient + begin, count));
  });

  float clip[kMaxAdamModules];
  bool finite = true;
  for (int module = 0; module < args.num_modules; ++module) {
    double sum = 0.0;
    const int end = args.first_chunk_of_module[module + 1];
    for (int i = args.first_chunk_of_module[module]; i < end; ++i) sum += squares[static_cast<size_t>(i)];
    const float norm = static_cast<float>(std::sqrt(sum));
    finite = finite && std::isfinite(norm);
    clip[module] = clip_factor(norm, args.max_norm);
  }
  const bool lost = args.skip_nonfinite && !finite;
  *args.lost = lost;
  if (lost || (args.skip != nullptr && *args.skip != 0)) return;

  const double rate = value_of(args.rate);
  const AdamWeights weights = adam_weights(args.rule, rate);
  AdamScales scales[kMaxAdamTensors];
  for (int i = 0; i < args.num_tensors; ++i) {
    scales[i] = adam_scales(args.rule, rate, static_cast<uint32_t>(*args.tensors[i].step += 1.0f));
  }
  for_each_chunk([&](int64_t, const AdamTensor& tensor, int i, int64_t begin, int64_t count) {
    PYFAST_PPO_DISPATCH(float, adam_range(tensor, begin, count, weights, scales[i], clip[tensor.module]));
  });
}

}  // namespace pyfast_ppo
