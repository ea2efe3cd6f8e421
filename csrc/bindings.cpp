// pyfast_ppo._C: pointers and sizes in, nothing else. No torch at build time: one binary serves every torch.
#include "bindings.h"

#include "cpu/gae.h"
#include "cpu/gaussian.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/ppo_loss.h"
#if defined(PYFAST_PPO_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using namespace pyfast_ppo;

using PyShape = std::tuple<int64_t, int64_t, bool, int>;  // N, A, use_double, num_threads

GaussianShape shape(const PyShape& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)}; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  watch_for_fork();
  m.attr("version") = PYFAST_PPO_VERSION;
  m.def("isa", [] { return isa_name(best_isa()); });
  m.def("threading", [] { return threading_name(); });
  m.attr("cuda_note") = PYFAST_PPO_CUDA_NOTE;
#if defined(PYFAST_PPO_WITH_CUDA)
  pyfast_ppo::cuda::bind(m.def_submodule("cuda"));
#endif
  m.def("ppo_loss", [](const PyPpoLossSizes& sizes, const PyPpoLossInputs& inputs,
                       const PyPpoLossCoefficients& coefficients, bool use_clipped_value_loss, bool kl_new_old,
                       const PyPpoLossOutputs& outputs, bool use_double, int num_threads) {
    const PpoLossArgs args = ppo_loss_args(sizes, inputs, coefficients, use_clipped_value_loss, kl_new_old, outputs);
    py::gil_scoped_release release;
    ppo_loss(args, use_double, num_threads);
  });
  m.def("gae", [](const PyGaeSizes& sizes, const PyGaeInputs& inputs, double gamma, double lam, bool normalize,
                  const PyGaeOutputs& outputs, bool use_double, int num_threads) {
    const GaeArgs args = gae_args(sizes, inputs, gamma, lam, normalize, outputs);
    py::gil_scoped_release release;
    gae(args, use_double, num_threads);
  });
  m.def("gaussian_log_prob",
        [](const PyShape& s, const PyView& actions, const PyView& mean, const PyView& std, const PyOutput& out) {
          py::gil_scoped_release release;
          gaussian_log_prob(shape(s), view(actions), view(mean), view(std), output(out));
        });
  m.def("gaussian_log_prob_backward", [](const PyShape& s, const PyView& actions, const PyView& mean, const PyView& std,
                                         const PyView& grad, const PyOutput& grad_mean, const PyOutput& grad_std) {
    py::gil_scoped_release release;
    gaussian_log_prob_backward(shape(s), view(actions), view(mean), view(std), view(grad), output(grad_mean),
                               output(grad_std));
  });
  m.def("gaussian_entropy", [](const PyShape& s, const PyView& std, const PyOutput& out) {
    py::gil_scoped_release release;
    gaussian_entropy(shape(s), view(std), output(out));
  });
  m.def("gaussian_entropy_backward",
        [](const PyShape& s, const PyView& std, const PyView& grad, const PyOutput& grad_std) {
          py::gil_scoped_release release;
          gaussian_entropy_backward(shape(s), view(std), view(grad), output(grad_std));
        });
  m.def("gaussian_kl", [](const PyShape& s, const PyView& mean_p, const PyView& std_p, const PyView& mean_q,
                          const PyView& std_q, const PyOutput& out) {
    py::gil_scoped_release release;
    gaussian_kl(shape(s), view(mean_p), view(std_p), view(mean_q), view(std_q), output(out));
  });
  m.def("gaussian_kl_backward",
        [](const PyShape& s, const PyView& mean_p, const PyView& std_p, const PyView& mean_q, const PyView& std_q,
           const PyView& grad, const PyOutput& grad_mean_p, const PyOutput& grad_std_p, const PyOutput& grad_std_q) {
          py::gil_scoped_release release;
          gaussian_kl_backward(shape(s), view(mean_p), view(std_p), view(mean_q), view(std_q), view(grad),
                               output(grad_mean_p), output(grad_std_p), output(grad_std_q));
        });
}
