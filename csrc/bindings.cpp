// pyfast_ppo._C. No torch at build time: one binary serves every torch.
#include "bindings.h"

#include "cpu/activation.h"
#include "cpu/adam.h"
#include "cpu/gae.h"
#include "cpu/gaussian.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/ppo_loss.h"
#if defined(PYFAST_PPO_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace {

using namespace pyfast_ppo;

using PyShape = std::tuple<int64_t, int64_t, bool, int>;  // N, A, use_double, num_threads

GaussianShape shape(const PyShape& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }

// For what the Gaussian functions take: a std may be a row [A] that all rows share.
View row_or_matrix(py::handle tensor, const char* name) { return view(tensor, name, true); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  watch_for_fork();
  m.attr("version") = PYFAST_PPO_VERSION;
  m.attr("sources") = PYFAST_PPO_SOURCES;
  m.def("isa", [] { return isa_name(best_isa()); });
  m.def("threading", [] { return threading_name(); });
  m.attr("cuda_note") = PYFAST_PPO_CUDA_NOTE;
#if defined(PYFAST_PPO_WITH_CUDA)
  pyfast_ppo::cuda::bind(m.def_submodule("cuda"));
#endif
  m.def("plain_bits", &plain_bits);
  m.def("ppo_loss", [](const std::tuple<int64_t, int64_t, int64_t>& sizes, const py::tuple& inputs,
                       const py::tuple& coefficients, bool use_clipped_value_loss, bool kl_new_old,
                       const py::tuple& outputs, bool use_double, int num_threads) {
    const PpoLossArgs args = ppo_loss_args(sizes, inputs, coefficients, use_clipped_value_loss, kl_new_old, outputs);
    py::gil_scoped_release release;
    ppo_loss(args, use_double, num_threads);
  });
  m.def("gae", [](const std::tuple<int64_t, int64_t>& sizes, const py::tuple& inputs, double gamma, double lam,
                  bool normalize, const py::tuple& outputs, bool use_double, int num_threads) {
    const GaeArgs args = gae_args(sizes, inputs, gamma, lam, normalize, outputs);
    py::gil_scoped_release release;
    gae(args, use_double, num_threads);
  });
  m.def("add_bias_and_activate", [](const std::string& activation, const std::tuple<int64_t, int64_t, int>& sizes,
                                    const py::object& x, const py::object& bias) {
    const auto [num_rows, num_cols, num_threads] = sizes;
    const Activation function = activation_of(activation);
    const ActivationArgs args = activation_args(num_rows, num_cols, x, bias);
    py::gil_scoped_release release;
    add_bias_and_activate(function, args.num_rows, args.num_cols, args.x, args.bias, num_threads);
  });
  m.def("add_bias_and_activate_backward",
        [](const std::string& activation, const std::tuple<int64_t, int64_t, int>& sizes, const py::object& grad_y,
           const py::object& y, const py::object& grad_x, const py::object& grad_bias) {
          const auto [num_rows, num_cols, num_threads] = sizes;
          const Activation function = activation_of(activation);
          const ActivationBackwardArgs args =
              activation_backward_args(num_rows, num_cols, grad_y, y, grad_x, grad_bias);
          py::gil_scoped_release release;
          add_bias_and_activate_backward(function, args.num_rows, args.num_cols, args.grad_y, args.y, args.grad_x,
                                         args.grad_bias, num_threads);
        });
  m.def("gaussian_log_prob", [](const PyShape& s, const py::object& actions, const py::object& mean,
                                const py::object& std, const py::object& out) {
    const View views[] = {row_or_matrix(actions, "actions"), row_or_matrix(mean, "mean"), row_or_matrix(std, "std")};
    const Output result = output(out);
    py::gil_scoped_release release;
    gaussian_log_prob(shape(s), views[0], views[1], views[2], result);
  });
  m.def("gaussian_log_prob_backward", [](const PyShape& s, const py::object& actions, const py::object& mean,
                                         const py::object& std, const py::object& grad, const py::object& grad_mean,
                                         const py::object& grad_std) {
    const View views[] = {row_or_matrix(actions, "actions"), row_or_matrix(mean, "mean"), row_or_matrix(std, "std")},
               grad_view = view(grad, "the incoming gradient");
    const Output results[] = {output(grad_mean), output(grad_std)};
    py::gil_scoped_release release;
    gaussian_log_prob_backward(shape(s), views[0], views[1], views[2], grad_view, results[0], results[1]);
  });
  m.def("gaussian_kl_loss",
        [](const PyShape& s, int which, const py::object& actions, const py::object& mean, const py::object& std,
           const py::object& old_log_prob, const py::object& value, const py::object& coefficient) {
          const View views[] = {row_or_matrix(actions, "actions"), row_or_matrix(mean, "mean"),
                                row_or_matrix(std, "std"), view(old_log_prob, "old_log_prob")};
          const Output results[] = {output(value), output(coefficient)};
          py::gil_scoped_release release;
          gaussian_kl_loss(shape(s), static_cast<KlLoss>(which), views[0], views[1], views[2], views[3], results[0],
                           results[1]);
        });
  m.def("gaussian_entropy", [](const PyShape& s, const py::object& std, const py::object& out) {
    const View views[] = {row_or_matrix(std, "std")};
    const Output result = output(out);
    py::gil_scoped_release release;
    gaussian_entropy(shape(s), views[0], result);
  });
  m.def("gaussian_entropy_backward",
        [](const PyShape& s, const py::object& std, const py::object& grad, const py::object& grad_std) {
          const View views[] = {row_or_matrix(std, "std")}, grad_view = view(grad, "the incoming gradient");
          const Output results[] = {output(grad_std)};
          py::gil_scoped_release release;
          gaussian_entropy_backward(shape(s), views[0], grad_view, results[0]);
        });
  m.def("gaussian_kl", [](const PyShape& s, const py::object& mean_p, const py::object& std_p, const py::object& mean_q,
                          const py::object& std_q, const py::object& out) {
    const View views[] = {row_or_matrix(mean_p, "mean_p"), row_or_matrix(std_p, "std_p"),
                          row_or_matrix(mean_q, "mean_q"), row_or_matrix(std_q, "std_q")};
    const Output result = output(out);
    py::gil_scoped_release release;
    gaussian_kl(shape(s), views[0], views[1], views[2], views[3], result);
  });
  m.def("gaussian_kl_backward",
        [](const PyShape& s, const py::object& mean_p, const py::object& std_p, const py::object& mean_q,
           const py::object& std_q, const py::object& grad, const py::object& grad_mean_p, const py::object& grad_std_p,
           const py::object& grad_std_q) {
          const View views[] = {row_or_matrix(mean_p, "mean_p"), row_or_matrix(std_p, "std_p"),
                                row_or_matrix(mean_q, "mean_q"), row_or_matrix(std_q, "std_q")},
                     grad_view = view(grad, "the incoming gradient");
          const Output results[] = {output(grad_mean_p), output(grad_std_p), output(grad_std_q)};
          py::gil_scoped_release release;
          gaussian_kl_backward(shape(s), views[0], views[1], views[2], views[3], grad_view, results[0], results[1],
                               results[2]);
        });
  m.def("adam_step", [](const py::list& rows, const std::tuple<double, double, double, double, bool>& rule,
                        double max_norm, const py::object& rate, const py::object& skip, bool skip_nonfinite,
                        const py::object& lost, int num_threads) {
    AdamArgs args;
    if (!adam_args(rows, rule, max_norm, rate, skip, skip_nonfinite, lost, &args)) return false;
    const py::gil_scoped_release release;
    adam_step(args, num_threads);
    return true;
  });
  m.def("adapt_rate",
        [](const std::tuple<double, double, double, double, double>& rule, const py::object& kl, const py::object& rate,
           const py::object& lost, const py::object& next) { adapt_rate(rate_args(rule, kl, rate, lost, next)); });
}
