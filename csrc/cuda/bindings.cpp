// pyfast_ppo._C.cuda
#include "bindings.h"

#include "../bindings.h"
#include "gae.h"
#include "gaussian.h"
#include "launch.h"
#include "ppo_loss.h"

namespace py = pybind11;

namespace pyfast_ppo::cuda {

namespace {

using PyGather = std::tuple<uintptr_t, int64_t>;     // address of int64 row numbers or 0, rows there are
using PyScratch = std::tuple<uintptr_t, uintptr_t>;  // partial sums, counter
using PyStream = std::tuple<int, uintptr_t>;         // device, stream
using PyShape = std::tuple<int64_t, int64_t, bool>;  // N, A, use_double

Stream stream(const PyStream& s) { return {std::get<0>(s), reinterpret_cast<void*>(std::get<1>(s))}; }

GaussianShape shape(const PyShape& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

// A function of 3, 1 or 4 inputs with 2, 1 or 3 gradients (see Gaussian).
void bind_gaussian(py::module_& m, const std::string& name, Gaussian function) {
  m.def(name.c_str(),
        [function](const PyShape& s, const std::vector<PyView>& inputs, const PyOutput& out, const PyStream& where) {
          std::vector<View> views;
          for (const PyView& v : inputs) views.push_back(view(v));
          gaussian(function, shape(s), views.data(), output(out), stream(where));
        });
  m.def((name + "_backward").c_str(), [function](const PyShape& s, const std::vector<PyView>& inputs,
                                                 const PyView& grad, const std::vector<PyOutput>& gradients,
                                                 const std::array<bool, 3>& of_shared_row, const PyStream& where) {
    std::vector<View> views;
    std::vector<Output> outputs;
    for (const PyView& v : inputs) views.push_back(view(v));
    for (const PyOutput& o : gradients) outputs.push_back(output(o));
    gaussian_backward(function, shape(s), views.data(), view(grad), outputs.data(), of_shared_row.data(),
                      stream(where));
  });
}

}  // namespace

void bind(py::module_ m) {
  m.def("unavailable_reason", &unavailable_reason);
  m.def("ppo_loss_partials", &ppo_loss_partials);
  m.def("ppo_loss",
        [](const PyPpoLossSizes& sizes, const PyPpoLossInputs& inputs, const PyPpoLossCoefficients& coefficients,
           bool use_clipped_value_loss, bool kl_new_old, const PyPpoLossOutputs& outputs, bool use_double,
           const PyGather& gather, const PyScratch& scratch, const PyStream& where) {
          ppo_loss(ppo_loss_args(sizes, inputs, coefficients, use_clipped_value_loss, kl_new_old, outputs),
                   {reinterpret_cast<const int64_t*>(std::get<0>(gather)), std::get<1>(gather)}, use_double,
                   {reinterpret_cast<void*>(std::get<0>(scratch)), reinterpret_cast<unsigned*>(std::get<1>(scratch))},
                   stream(where));
        });
  m.def("gae_moments", &gae_moments);
  m.def("gae", [](const PyGaeSizes& sizes, const PyGaeInputs& inputs, double gamma, double lam, bool normalize,
                  const PyGaeOutputs& outputs, bool use_double, uintptr_t moments, const PyStream& where) {
    gae(gae_args(sizes, inputs, gamma, lam, normalize, outputs), use_double, reinterpret_cast<void*>(moments),
        stream(where));
  });
  m.def("gaussian_blocks", [](const PyShape& s) { return gaussian_blocks(shape(s)); });
  bind_gaussian(m, "gaussian_log_prob", Gaussian::kLogProb);
  bind_gaussian(m, "gaussian_entropy", Gaussian::kEntropy);
  bind_gaussian(m, "gaussian_kl", Gaussian::kKl);
}

}  // namespace pyfast_ppo::cuda
