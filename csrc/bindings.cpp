// pyfast_ppo._C: pointers and sizes in, nothing else. No torch at build time: one binary serves every torch.
//
// A tensor comes as (address, dtype code, row stride, column stride), an output as (address, dtype code). The caller
// keeps them alive and has checked shapes, dtypes and devices (pyfast_ppo/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/gae.h"
#include "cpu/gaussian.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/ppo_loss.h"

namespace py = pybind11;

namespace {

using pyfast_ppo::DType;
using pyfast_ppo::Output;
using pyfast_ppo::View;
using PyView = std::tuple<uintptr_t, int, int64_t, int64_t>;
using PyOutput = std::tuple<uintptr_t, int>;

View view(const PyView& v) {
  return {reinterpret_cast<const void*>(std::get<0>(v)), static_cast<DType>(std::get<1>(v)), std::get<2>(v),
          std::get<3>(v)};
}

Output output(const PyOutput& o) {
  return {reinterpret_cast<void*>(std::get<0>(o)), static_cast<DType>(std::get<1>(o))};
}

// A number, or where one stands in memory.
using PyCoefficient = std::tuple<uintptr_t, int, double>;

double coefficient(const PyCoefficient& c) {
  if (std::get<0>(c) == 0) return std::get<2>(c);
  return pyfast_ppo::read_number(
      {reinterpret_cast<const void*>(std::get<0>(c)), static_cast<DType>(std::get<1>(c)), 1, 1});
}

void ppo_loss(std::tuple<int64_t, int64_t, int64_t> sizes,  // N, num_original, A
              const PyView& mean, const PyView& std, const PyView& values, const PyView& actions,
              const PyView& old_log_prob, const PyView& old_mean, const PyView& old_std, const PyView& advantages,
              const PyView& returns, const PyView& old_values,
              const std::array<PyCoefficient, 4>& coefficients,  // clip_param, value_loss_, entropy_, kl_coef
              bool use_clipped_value_loss, bool kl_new_old, const PyOutput& metrics, const PyOutput& grad_mean,
              const PyOutput& grad_std, const PyOutput& grad_values, bool use_double, int num_threads) {
  pyfast_ppo::PpoLossArgs args;
  std::tie(args.num_rows, args.num_original, args.num_actions) = sizes;
  args.mean = view(mean), args.std = view(std), args.values = view(values);
  args.actions = view(actions), args.old_log_prob = view(old_log_prob);
  args.old_mean = view(old_mean), args.old_std = view(old_std);
  args.advantages = view(advantages), args.returns = view(returns), args.old_values = view(old_values);
  args.clip_param = coefficient(coefficients[0]), args.value_loss_coef = coefficient(coefficients[1]);
  args.entropy_coef = coefficient(coefficients[2]), args.kl_coef = coefficient(coefficients[3]);
  args.use_clipped_value_loss = use_clipped_value_loss, args.kl_new_old = kl_new_old;
  args.metrics = output(metrics);
  args.grad_mean = output(grad_mean), args.grad_std = output(grad_std), args.grad_values = output(grad_values);
  py::gil_scoped_release release;
  pyfast_ppo::ppo_loss(args, use_double, num_threads);
}

void gae(std::tuple<int64_t, int64_t> sizes,  // T, E
         const PyView& rewards, const PyView& values, const PyView& dones, const PyView& last_values,
         const PyView& time_outs, const PyView& final_values, double gamma, double lam, bool normalize,
         uintptr_t advantages, uintptr_t returns, bool use_double, int num_threads) {
  pyfast_ppo::GaeArgs args;
  std::tie(args.num_steps, args.num_envs) = sizes;
  args.rewards = view(rewards), args.values = view(values), args.dones = view(dones);
  args.last_values = view(last_values), args.time_outs = view(time_outs), args.final_values = view(final_values);
  args.gamma = gamma, args.lam = lam, args.normalize = normalize;
  args.advantages = reinterpret_cast<void*>(advantages), args.returns = reinterpret_cast<void*>(returns);
  py::gil_scoped_release release;
  pyfast_ppo::gae(args, use_double, num_threads);
}

using PyShape = std::tuple<int64_t, int64_t, bool, int>;  // N, A, use_double, num_threads

pyfast_ppo::GaussianShape shape(const PyShape& s) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  pyfast_ppo::watch_for_fork();
  m.attr("version") = PYFAST_PPO_VERSION;
  m.def("isa", [] { return pyfast_ppo::isa_name(pyfast_ppo::best_isa()); });
  m.def("threading", [] { return pyfast_ppo::threading_name(); });
  m.def("ppo_loss", &ppo_loss);
  m.def("gae", &gae);
  m.def("gaussian_log_prob",
        [](const PyShape& s, const PyView& actions, const PyView& mean, const PyView& std, const PyOutput& out) {
          py::gil_scoped_release release;
          pyfast_ppo::gaussian_log_prob(shape(s), view(actions), view(mean), view(std), output(out));
        });
  m.def("gaussian_log_prob_backward", [](const PyShape& s, const PyView& actions, const PyView& mean, const PyView& std,
                                         const PyView& grad, const PyOutput& grad_mean, const PyOutput& grad_std) {
    py::gil_scoped_release release;
    pyfast_ppo::gaussian_log_prob_backward(shape(s), view(actions), view(mean), view(std), view(grad),
                                           output(grad_mean), output(grad_std));
  });
  m.def("gaussian_entropy", [](const PyShape& s, const PyView& std, const PyOutput& out) {
    py::gil_scoped_release release;
    pyfast_ppo::gaussian_entropy(shape(s), view(std), output(out));
  });
  m.def("gaussian_entropy_backward",
        [](const PyShape& s, const PyView& std, const PyView& grad, const PyOutput& grad_std) {
          py::gil_scoped_release release;
          pyfast_ppo::gaussian_entropy_backward(shape(s), view(std), view(grad), output(grad_std));
        });
  m.def("gaussian_kl", [](const PyShape& s, const PyView& mean_p, const PyView& std_p, const PyView& mean_q,
                          const PyView& std_q, const PyOutput& out) {
    py::gil_scoped_release release;
    pyfast_ppo::gaussian_kl(shape(s), view(mean_p), view(std_p), view(mean_q), view(std_q), output(out));
  });
  m.def("gaussian_kl_backward",
        [](const PyShape& s, const PyView& mean_p, const PyView& std_p, const PyView& mean_q, const PyView& std_q,
           const PyView& grad, const PyOutput& grad_mean_p, const PyOutput& grad_std_p, const PyOutput& grad_std_q) {
          py::gil_scoped_release release;
          pyfast_ppo::gaussian_kl_backward(shape(s), view(mean_p), view(std_p), view(mean_q), view(std_q), view(grad),
                                           output(grad_mean_p), output(grad_std_p), output(grad_std_q));
        });
}
