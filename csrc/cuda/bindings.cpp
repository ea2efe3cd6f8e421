// pyfast_ppo._C.cuda
#include "bindings.h"

#include "../bindings.h"
#include "activation.h"
#include "adam.h"
#include "gae.h"
#include "gaussian.h"
#include "launch.h"
#include "ppo_loss.h"
#include "schedule.h"

namespace pyfast_ppo::cuda {

namespace {

using PyStream = std::tuple<int, uintptr_t>;         // device, stream
using PyShape = std::tuple<int64_t, int64_t, bool>;  // N, A, use_double
using WithoutGil = py::gil_scoped_release;           // around a launch, which waits where many are queued

Stream stream(const PyStream& s) { return {std::get<0>(s), reinterpret_cast<void*>(std::get<1>(s))}; }

GaussianShape shape(const PyShape& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

using Names = std::vector<const char*>;

std::vector<View> views(const py::tuple& tensors, const Names& names) {
  std::vector<View> found;
  for (size_t i = 0; i < names.size(); ++i) found.push_back(view(tensors[i], names[i], true));
  return found;
}

// Of 3, 1 or 4 inputs with 2, 1 or 3 gradients (see Gaussian).
void bind_gaussian(py::module_& m, const std::string& name, Gaussian function, const Names& names) {
  m.def(name.c_str(),
        [function, names](const PyShape& s, const py::tuple& inputs, const py::object& out, const PyStream& where) {
          const std::vector<View> found = views(inputs, names);
          const Output to = output(out);
          const WithoutGil other_threads_run;
          gaussian(function, shape(s), found.data(), to, stream(where));
        });
  m.def((name + "_backward").c_str(),
        [function, names](const PyShape& s, const py::tuple& inputs, const py::object& grad, const py::tuple& gradients,
                          const PyStream& where) {
          std::vector<Output> outputs;
          for (const py::handle tensor : gradients) outputs.push_back(output(tensor));
          const std::vector<View> found = views(inputs, names);
          const View of_output = view(grad, "the incoming gradient");
          const WithoutGil other_threads_run;
          gaussian_backward(function, shape(s), found.data(), of_output, outputs.data(), stream(where));
        });
}

}  // namespace

void bind(py::module_ m) {
  m.def("unavailable_reason", &unavailable_reason);
  m.def("ppo_loss_partials", &ppo_loss_partials);
  m.def("ppo_loss", [](const std::tuple<int64_t, int64_t, int64_t>& sizes, const py::tuple& inputs,
                       const py::tuple& coefficients, bool use_clipped_value_loss, bool kl_new_old,
                       const py::tuple& outputs, bool use_double, const py::object& row_index, int64_t num_rollout_rows,
                       const py::tuple& scratch, const PyStream& where) {
    Gather gather;
    if (!row_index.is_none()) gather = {static_cast<const int64_t*>(address_of(row_index)), num_rollout_rows};
    if (!row_index.is_none() && gather.index == nullptr) refuse_without_memory("row_index");
    const PpoLossArgs args = ppo_loss_args(sizes, inputs, coefficients, use_clipped_value_loss, kl_new_old, outputs);
    const Scratch memory{address_of(scratch[0]), static_cast<unsigned*>(address_of(scratch[1]))};
    const WithoutGil other_threads_run;
    ppo_loss(args, gather, use_double, memory, stream(where));
  });
  m.def("gae_moments", &gae_moments);
  m.def("gae",
        [](const std::tuple<int64_t, int64_t>& sizes, const py::tuple& inputs, double gamma, double lam, bool normalize,
           const py::tuple& outputs, bool use_double, const py::object& moments, const PyStream& where) {
          const GaeArgs args = gae_args(sizes, inputs, gamma, lam, normalize, outputs);
          void* const memory = address_of(moments);
          const WithoutGil other_threads_run;
          gae(args, use_double, memory, stream(where));
        });
  m.def("adam_partials", [](const py::list& rows) {
    int64_t elements = 0;
    for (const py::handle row : rows) {
      float* data;
      int64_t count = -1;
      dlpack::Device device{};
      if (read_floats(py::reinterpret_borrow<py::tuple>(row)[0], &data, &count, &device)) elements += count;
    }
    return adam_partials(elements, static_cast<int64_t>(rows.size()));
  });
  m.def("adam_step", [](const py::list& rows, const std::tuple<double, double, double, double, bool>& rule,
                        double max_norm, const py::object& rate, const py::object& skip, bool skip_nonfinite,
                        const py::object& lost, const py::tuple& scratch, const PyStream& where) {
    AdamArgs args;
    if (!adam_args(rows, rule, max_norm, rate, skip, skip_nonfinite, lost, &args)) return false;
    const Scratch memory{address_of(scratch[0]), static_cast<unsigned*>(address_of(scratch[1]))};
    const WithoutGil other_threads_run;
    adam_step(args, memory, stream(where));
    return true;
  });
  m.def("adapt_rate",
        [](const std::tuple<double, double, double, double, double>& rule, const py::object& kl, const py::object& rate,
           const py::object& lost, const py::object& next, const PyStream& where) {
          const RateArgs args = rate_args(rule, kl, rate, lost, next);
          const WithoutGil other_threads_run;
          adapt_rate(args, stream(where));
        });
  m.def("activation_partials", &activation_partials);
  m.def("activation_counters", &activation_counters);
  m.def("add_bias_and_activate", [](const std::string& activation, const std::tuple<int64_t, int64_t>& sizes,
                                    const py::object& x, const py::object& bias, const PyStream& where) {
    const Activation function = activation_of(activation);
    const ActivationArgs args = activation_args(std::get<0>(sizes), std::get<1>(sizes), x, bias);
    const WithoutGil other_threads_run;
    add_bias_and_activate(function, args.num_rows, args.num_cols, args.x, args.bias, stream(where));
  });
  m.def("add_bias_and_activate_backward",
        [](const std::string& activation, const std::tuple<int64_t, int64_t>& sizes, const py::object& grad_y,
           const py::object& y, const py::object& grad_x, const py::object& grad_bias, const py::tuple& scratch,
           const PyStream& where) {
          const Activation function = activation_of(activation);
          const ActivationBackwardArgs args =
              activation_backward_args(std::get<0>(sizes), std::get<1>(sizes), grad_y, y, grad_x, grad_bias);
          float* const partials = static_cast<float*>(address_of(scratch[0]));
          unsigned* const counters = static_cast<unsigned*>(address_of(scratch[1]));
          const WithoutGil other_threads_run;
          add_bias_and_activate_backward(function, args.num_rows, args.num_cols, args.grad_y, args.y, args.grad_x,
                                         args.grad_bias, partials, counters, stream(where));
        });
  m.def("gaussian_blocks", [](const PyShape& s) { return gaussian_blocks(shape(s)); });
  m.def("gaussian_kl_loss", [](const PyShape& s, int which, const py::tuple& inputs, const py::object& old_log_prob,
                               const py::object& value, const py::object& coefficient, const PyStream& where) {
    const std::vector<View> found = views(inputs, {"actions", "mean", "std"});
    const View old = view(old_log_prob, "old_log_prob");
    const Output to = output(value), to_coefficient = output(coefficient);
    const WithoutGil other_threads_run;
    gaussian_kl_loss(static_cast<KlLoss>(which), shape(s), found.data(), old, to, to_coefficient, stream(where));
  });
  bind_gaussian(m, "gaussian_log_prob", Gaussian::kLogProb, {"actions", "mean", "std"});
  bind_gaussian(m, "gaussian_entropy", Gaussian::kEntropy, {"std"});
  bind_gaussian(m, "gaussian_kl", Gaussian::kKl, {"mean_p", "std_p", "mean_q", "std_q"});
}

}  // namespace pyfast_ppo::cuda
