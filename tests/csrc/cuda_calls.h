// The GPU's kernels under the names and with the arguments of the CPU's, for kernel_driver.cpp. Scratch memory is just
// as large as it has to be, so that the sanitizer sees an access beyond it, too.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu/gaussian.h"
#include "cuda/adam.h"
#include "cuda/activation.h"
#include "cuda/gae.h"
#include "cuda/gaussian.h"
#include "cuda/ppo_loss.h"
#include "cuda/schedule.h"

namespace pyfast_ppo {

constexpr cuda::Stream kStream{0, nullptr};

inline size_t bytes(int64_t count, bool use_double) { return static_cast<size_t>(count) * (use_double ? 8 : 4); }

inline void ppo_loss(const PpoLossArgs& args, bool use_double, int threads) {
  std::vector<char> partials(bytes(cuda::ppo_loss_partials(args.num_actions, 0), use_double));
  unsigned counter = 0;
  // for some of the cases: the rows of the rollout in another order, the original ones among themselves
  std::vector<int64_t> index(static_cast<size_t>(threads % 2 ? 0 : args.num_rows));
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i);
  if (!index.empty()) std::reverse(index.begin(), index.begin() + args.num_original);
  const cuda::Gather gather{index.empty() ? nullptr : index.data(), args.num_rows};
  cuda::ppo_loss(args, gather, use_double, {partials.data(), &counter}, kStream);
  if (counter != 0) std::abort();
}

inline void adam_step(const AdamArgs& args, int) {
  int64_t elements = 0;
  for (int i = 0; i < args.num_tensors; ++i) elements += args.tensors[i].count;
  std::vector<double> partials(static_cast<size_t>(cuda::adam_partials(elements, args.num_tensors)));
  unsigned counter = 0;
  cuda::adam_step(args, {partials.data(), &counter}, kStream);
  if (counter != 0) std::abort();
}

inline void add_bias_and_activate(Activation activation, int64_t num_rows, int64_t num_cols, float* x,
                                  const float* bias, int) {
  cuda::add_bias_and_activate(activation, num_rows, num_cols, x, bias, kStream);
}

inline void add_bias_and_activate_backward(Activation activation, int64_t num_rows, int64_t num_cols,
                                           const float* grad_y, const float* y, float* grad_x, float* grad_bias, int) {
  std::vector<float> partials(static_cast<size_t>(cuda::activation_partials(num_rows, num_cols)));
  std::vector<unsigned> counters(static_cast<size_t>(cuda::activation_counters(num_cols)));
  cuda::add_bias_and_activate_backward(activation, num_rows, num_cols, grad_y, y, grad_x, grad_bias, partials.data(),
                                       counters.data(), kStream);
  if (std::any_of(counters.begin(), counters.end(), [](unsigned counter) { return counter != 0; })) std::abort();
}

inline void gae(const GaeArgs& args, bool use_double, int) {
  std::vector<char> moments(bytes(cuda::gae_moments(args.num_envs), use_double));
  cuda::gae(args, use_double, moments.data(), kStream);
}

inline cuda::GaussianShape cuda_shape(const GaussianShape& shape) {
  return {shape.num_rows, shape.num_actions, shape.use_double};
}

// Adds up the sums of the blocks, where a std is a row for all.
inline void backward(cuda::Gaussian function, const GaussianShape& shape, const std::vector<View>& inputs,
                     const View& grad, std::vector<Output> gradients, const std::vector<int>& input_of) {
  const cuda::GaussianShape cuda_s = cuda_shape(shape);
  const int64_t blocks = cuda::gaussian_blocks(cuda_s), A = shape.num_actions;
  std::vector<std::vector<char>> sums(gradients.size());
  const std::vector<Output> wanted = gradients;
  const DType dtype = shape.use_double ? DType::kFloat64 : DType::kFloat32;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (input_of[i] < 0 || inputs[input_of[i]].row_stride != 0) continue;
    sums[i].resize(bytes(blocks * A, shape.use_double));
    gradients[i] = {sums[i].data(), dtype};
  }
  cuda::gaussian_backward(function, cuda_s, inputs.data(), grad, gradients.data(), kStream);
  for (size_t i = 0; i < gradients.size(); ++i) {
    for (int64_t j = 0; !sums[i].empty() && j < A; ++j) {
      double sum = 0.0;
      for (int64_t b = 0; b < blocks; ++b) sum += read_element<double>(sums[i].data(), dtype, b * A + j);
      write_element(wanted[i], j, sum);
    }
  }
}

inline void gaussian_log_prob(const GaussianShape& shape, View actions, View mean, View std, Output out) {
  const View inputs[] = {actions, mean, std};
  cuda::gaussian(cuda::Gaussian::kLogProb, cuda_shape(shape), inputs, out, kStream);
}

inline void gaussian_log_prob_backward(const GaussianShape& shape, View actions, View mean, View std, View grad,
                                       Output grad_mean, Output grad_std) {
  backward(cuda::Gaussian::kLogProb, shape, {actions, mean, std}, grad, {grad_mean, grad_std}, {-1, 2});
}

inline void gaussian_kl_loss(const GaussianShape& shape, KlLoss which, View actions, View mean, View std,
                             View old_log_prob, Output value, Output coefficient) {
  const View inputs[] = {actions, mean, std};
  cuda::gaussian_kl_loss(which, cuda_shape(shape), inputs, old_log_prob, value, coefficient, kStream);
}

inline void gaussian_entropy(const GaussianShape& shape, View std, Output out) {
  cuda::gaussian(cuda::Gaussian::kEntropy, cuda_shape(shape), &std, out, kStream);
}

inline void gaussian_entropy_backward(const GaussianShape& shape, View std, View grad, Output grad_std) {
  backward(cuda::Gaussian::kEntropy, shape, {std}, grad, {grad_std}, {-1});
}

inline void gaussian_kl(const GaussianShape& shape, View mean_p, View std_p, View mean_q, View std_q, Output out) {
  const View inputs[] = {mean_p, std_p, mean_q, std_q};
  cuda::gaussian(cuda::Gaussian::kKl, cuda_shape(shape), inputs, out, kStream);
}

inline void gaussian_kl_backward(const GaussianShape& shape, View mean_p, View std_p, View mean_q, View std_q,
                                 View grad, Output grad_mean_p, Output grad_std_p, Output grad_std_q) {
  backward(cuda::Gaussian::kKl, shape, {mean_p, std_p, mean_q, std_q}, grad, {grad_mean_p, grad_std_p, grad_std_q},
           {-1, 1, 3});
}

}  // namespace pyfast_ppo
