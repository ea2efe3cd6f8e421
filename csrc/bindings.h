// How tensors and numbers come from Python: pointers and sizes. The caller keeps them alive and has checked shapes,
// dtypes and devices (pyfast_ppo/ops).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "gae.h"
#include "ppo_loss.h"
#include "tensor.h"

namespace pyfast_ppo {

using PyView = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, dtype code, row stride, column stride
using PyOutput = std::tuple<uintptr_t, int>;                  // address, dtype code
using PyCoefficient = std::tuple<uintptr_t, int, double>;     // a number, or where one stands: address, dtype code

inline View view(const PyView& v) {
  return {reinterpret_cast<const void*>(std::get<0>(v)), static_cast<DType>(std::get<1>(v)), std::get<2>(v),
          std::get<3>(v)};
}

inline Output output(const PyOutput& o) {
  return {reinterpret_cast<void*>(std::get<0>(o)), static_cast<DType>(std::get<1>(o))};
}

inline Coefficient coefficient(const PyCoefficient& c) {
  return {reinterpret_cast<const void*>(std::get<0>(c)), static_cast<DType>(std::get<1>(c)), std::get<2>(c)};
}

// What the loss takes, on any device.
using PyPpoLossSizes = std::tuple<int64_t, int64_t, int64_t>;  // N, num_original, A
using PyPpoLossInputs = std::array<PyView, 10>;                // in the order of PpoLossArgs
using PyPpoLossCoefficients = std::array<PyCoefficient, 4>;    // clip_param, value_loss_coef, entropy_coef, kl_coef
using PyPpoLossOutputs = std::array<PyOutput, 4>;              // metrics, grad_mean, grad_std, grad_values

inline PpoLossArgs ppo_loss_args(const PyPpoLossSizes& sizes, const PyPpoLossInputs& inputs,
                                 const PyPpoLossCoefficients& coefficients, bool use_clipped_value_loss,
                                 bool kl_new_old, const PyPpoLossOutputs& outputs) {
  PpoLossArgs args;
  std::tie(args.num_rows, args.num_original, args.num_actions) = sizes;
  View* const views[] = {&args.mean,     &args.std,     &args.values,     &args.actions, &args.old_log_prob,
                         &args.old_mean, &args.old_std, &args.advantages, &args.returns, &args.old_values};
  for (size_t i = 0; i < inputs.size(); ++i) *views[i] = view(inputs[i]);
  args.clip_param = coefficient(coefficients[0]), args.value_loss_coef = coefficient(coefficients[1]);
  args.entropy_coef = coefficient(coefficients[2]), args.kl_coef = coefficient(coefficients[3]);
  args.use_clipped_value_loss = use_clipped_value_loss, args.kl_new_old = kl_new_old;
  args.metrics = output(outputs[0]), args.grad_mean = output(outputs[1]);
  args.grad_std = output(outputs[2]), args.grad_values = output(outputs[3]);
  return args;
}

// What the returns take, on any device.
using PyGaeSizes = std::tuple<int64_t, int64_t>;  // T, E
using PyGaeInputs = std::array<PyView, 6>;        // in the order of GaeArgs; address 0: there is none
using PyGaeOutputs = std::array<uintptr_t, 2>;    // advantages, returns

inline GaeArgs gae_args(const PyGaeSizes& sizes, const PyGaeInputs& inputs, double gamma, double lam, bool normalize,
                        const PyGaeOutputs& outputs) {
  GaeArgs args;
  std::tie(args.num_steps, args.num_envs) = sizes;
  View* const views[] = {&args.rewards,     &args.values,    &args.dones,
                         &args.last_values, &args.time_outs, &args.final_values};
  for (size_t i = 0; i < inputs.size(); ++i) *views[i] = view(inputs[i]);
  args.gamma = gamma, args.lam = lam, args.normalize = normalize;
  args.advantages = reinterpret_cast<void*>(outputs[0]), args.returns = reinterpret_cast<void*>(outputs[1]);
  return args;
}

}  // namespace pyfast_ppo
