// How tensors and numbers come from Python: as torch's own objects, which are looked into through DLPack's C interface,
// or where a torch has none through their Python methods. Nothing of torch is needed to build this. The caller has
// checked shapes, dtypes and devices (pyfast_ppo/ops).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "adam.h"
#include "dlpack.h"
#include "gae.h"
#include "math/activation.h"
#include "ppo_loss.h"
#include "schedule.h"
#include "tensor.h"

namespace pyfast_ppo {

namespace py = pybind11;

// What the kernels have to know of a torch.Tensor.
struct TensorObject {
  void* data;
  DType dtype;
  dlpack::Device device;               // its type is 0 where the tensor was read through its methods
  int64_t dims, shape[2], strides[2];  // dims may be more, but only two are kept
};

// torch's own objects, looked up once.
struct Torch {
  PyObject *tensor_type, *parameter_type;
  const dlpack::ExchangeApi* api = nullptr;  // null: this torch has none
  std::array<std::pair<PyObject*, DType>, 6> dtypes;
  PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const stride = PyUnicode_InternFromString("stride");
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* const grad = PyUnicode_InternFromString("grad");

  static const Torch& get() {
    static const Torch* const torch = new Torch();  // never freed: at exit Python is gone before it
    return *torch;
  }

 private:
  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor_type = py::object(torch.attr("Tensor")).release().ptr();
    parameter_type = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
    const std::pair<const char*, DType> names[] = {{"float32", DType::kFloat32},   {"float64", DType::kFloat64},
                                                   {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16},
                                                   {"uint8", DType::kUInt8},       {"bool", DType::kUInt8}};
    for (size_t i = 0; i < dtypes.size(); ++i) {
      dtypes[i] = {py::object(torch.attr(names[i].first)).release().ptr(), names[i].second};
    }
    const py::object capsule = py::getattr(torch.attr("Tensor"), dlpack::kAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return;
    const auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    if (found->major_version == dlpack::kMajorVersion && found->tensor_from_object != nullptr) api = found;
  }
};

inline bool dtype_of_code(dlpack::DataType type, DType* out) {
  const auto is = [type](uint8_t code, uint8_t bits) { return type.code == code && type.bits == bits; };
  if (is(dlpack::kFloat, 32)) return *out = DType::kFloat32, true;
  if (is(dlpack::kFloat, 64)) return *out = DType::kFloat64, true;
  if (is(dlpack::kBfloat, 16)) return *out = DType::kBFloat16, true;
  if (is(dlpack::kFloat, 16)) return *out = DType::kFloat16, true;
  if (is(dlpack::kUInt, 8) || is(dlpack::kBool, 8)) return *out = DType::kUInt8, true;
  return false;
}

// Without a Python call; false where that cannot be done.
inline bool look_into(py::handle tensor, dlpack::Tensor* out) {
  const Torch& torch = Torch::get();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (torch.api == nullptr || (type != torch.tensor_type && type != torch.parameter_type)) return false;
  if (torch.api->tensor_from_object(tensor.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

inline bool read_quickly(py::handle tensor, TensorObject* out) {
  dlpack::Tensor found;
  if (!look_into(tensor, &found) || !dtype_of_code(found.dtype, &out->dtype)) return false;
  if (found.strides == nullptr && found.ndim > 0) return false;
  out->data = static_cast<char*>(found.data) + found.byte_offset;
  out->device = found.device;
  out->dims = found.ndim;
  for (int i = 0; i < 2; ++i) {
    out->shape[i] = i < found.ndim ? found.shape[i] : 1;
    out->strides[i] = i < found.ndim ? found.strides[i] : 1;
  }
  return true;
}

inline py::object own(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline void* address_of(py::handle tensor) {
  dlpack::Tensor found;
  if (look_into(tensor, &found)) return static_cast<char*>(found.data) + found.byte_offset;
  return PyLong_AsVoidPtr(own(PyObject_CallMethodNoArgs(tensor.ptr(), Torch::get().data_ptr)).ptr());
}

inline TensorObject read_in_any_way(py::handle tensor) {
  TensorObject out{};
  if (read_quickly(tensor, &out)) return out;
  const Torch& torch = Torch::get();
  const py::object dtype = own(PyObject_GetAttr(tensor.ptr(), torch.dtype));
  const auto* known = std::find_if(torch.dtypes.begin(), torch.dtypes.end(),
                                   [&](const auto& entry) { return entry.first == dtype.ptr(); });
  if (known == torch.dtypes.end()) throw py::type_error("no kernel takes a " + py::str(dtype).cast<std::string>());
  out.dtype = known->second;
  try {
    out.data = address_of(tensor);
  } catch (py::error_already_set& error) {  // torch's, of a batch under vmap
    if (!error.matches(PyExc_RuntimeError)) throw;
  }
  const py::tuple strides = own(PyObject_CallMethodNoArgs(tensor.ptr(), torch.stride));
  const py::tuple shape = own(PyObject_GetAttr(tensor.ptr(), torch.shape));
  out.dims = static_cast<int64_t>(strides.size());
  for (int i = 0; i < 2; ++i) {
    out.shape[i] = i < out.dims ? shape[i].cast<int64_t>() : 1;
    out.strides[i] = i < out.dims ? strides[i].cast<int64_t>() : 1;
  }
  return out;
}

// Whether there are elements, but no memory to find them in: subclasses that hold other tensors, tensors that only
// know their shape, storage that was freed. A view into such storage has its offset for an address; nothing is mapped
// in the first page.
inline bool is_no_address(const void* data) { return reinterpret_cast<uintptr_t>(data) < 4096; }

inline bool lacks_memory(const TensorObject& t) { return is_no_address(t.data) && t.shape[0] * t.shape[1] != 0; }

[[noreturn]] inline void refuse_without_memory(const char* name) {
  throw py::value_error(std::string(name) +
                        " has no memory of its own: of a DTensor pass the local tensor; a FakeTensor and a batch of "
                        "gradients under vmap need backend='eager'; or its storage was freed");
}

inline TensorObject read_tensor(py::handle tensor, const char* name) {
  const TensorObject t = read_in_any_way(tensor);
  if (lacks_memory(t)) refuse_without_memory(name);
  return t;
}

// [N, A], [N], or nothing at all where it is None; shared_row: one dimension means a row [A] that all rows share.
inline View view(py::handle tensor, const char* name, bool shared_row = false) {
  if (tensor.is_none()) return {};
  const TensorObject t = read_tensor(tensor, name);
  if (t.dims == 2) return {t.data, t.dtype, t.strides[0], t.strides[1]};
  return {t.data, t.dtype, shared_row ? 0 : t.strides[0], shared_row ? t.strides[0] : 1};
}

inline Output output(py::handle tensor) {
  const TensorObject t = read_tensor(tensor, "an output");
  return {t.data, t.dtype};
}

inline Coefficient coefficient(py::handle value, const char* name) {
  if (PyFloat_Check(value.ptr())) return {nullptr, DType::kFloat64, PyFloat_AS_DOUBLE(value.ptr())};
  const TensorObject t = read_tensor(value, name);
  return {t.data, t.dtype, 0.0};
}

// Whether torch's negative bit is set: what stands in memory has the other sign. Only views of the imaginary part of
// conjugated tensors come with it, whose elements lie at least two apart.
inline bool is_negated(py::handle tensor, const TensorObject& t) {
  if ((t.shape[0] > 1 && t.strides[0] == 1) || (t.shape[1] > 1 && t.strides[1] == 1)) return false;
  return own(PyObject_CallMethodNoArgs(tensor.ptr(), Torch::get().is_neg)).ptr() == Py_True;
}

// Whether the loss's ten inputs, in the order of PpoLossArgs, are right and as kernels take them, so that there is
// nothing to reshape and nothing to complain about: matrices [N, A], vectors [N] or [N, 1], stds [A] or contiguous
// [N, A], floating point, in memory, with their own sign, on one device. 0: that is not so, or was not found out. Else
// 32 or 64: the bits of the arithmetic.
inline int plain_bits(const py::tuple& inputs) {
  TensorObject t[10];
  if (inputs.size() != 10) return 0;
  int bits = 32;
  for (size_t i = 0; i < 10; ++i) {
    if (!read_quickly(inputs[i], &t[i]) || t[i].dtype == DType::kUInt8) return 0;
    if (lacks_memory(t[i]) || is_negated(inputs[i], t[i])) return 0;
    if (t[i].device.type != t[0].device.type || t[i].device.id != t[0].device.id) return 0;
    if (t[i].dtype == DType::kFloat64) bits = 64;
  }
  const int64_t N = t[0].shape[0], A = t[0].shape[1];
  const auto is_matrix = [&](const TensorObject& x) { return x.dims == 2 && x.shape[0] == N && x.shape[1] == A; };
  const auto is_vector = [&](const TensorObject& x) {
    return x.shape[0] == N && (x.dims == 1 || (x.dims == 2 && x.shape[1] == 1));
  };
  const auto is_std = [&](const TensorObject& x) {
    return x.dims == 1 ? x.shape[0] == A : is_matrix(x) && x.strides[0] == A && x.strides[1] == 1;
  };
  const bool plain = N > 0 && A > 0 && is_matrix(t[0]) && is_std(t[1]) && is_vector(t[2]) && is_matrix(t[3]) &&
                     is_vector(t[4]) && is_matrix(t[5]) && is_std(t[6]) && is_vector(t[7]) && is_vector(t[8]) &&
                     is_vector(t[9]);
  return plain ? bits : 0;
}

// What the loss takes, on any device: sizes (N, num_original, A), inputs in the order of PpoLossArgs, coefficients
// (clip_param, value_loss_coef, entropy_coef, kl_coef), outputs (metrics, grad_mean, grad_std, grad_values).
inline PpoLossArgs ppo_loss_args(const std::tuple<int64_t, int64_t, int64_t>& sizes, const py::tuple& inputs,
                                 const py::tuple& coefficients, bool use_clipped_value_loss, bool kl_new_old,
                                 const py::tuple& outputs) {
  PpoLossArgs args;
  std::tie(args.num_rows, args.num_original, args.num_actions) = sizes;
  View* const views[] = {&args.mean,     &args.std,     &args.values,     &args.actions, &args.old_log_prob,
                         &args.old_mean, &args.old_std, &args.advantages, &args.returns, &args.old_values};
  const char* const names[] = {"mean",     "std",     "values",     "actions", "old_log_prob",
                               "old_mean", "old_std", "advantages", "returns", "old_values"};
  for (size_t i = 0; i < 10; ++i) {
    *views[i] = view(inputs[i], names[i], views[i] == &args.std || views[i] == &args.old_std);
  }
  args.clip_param = coefficient(coefficients[0], "clip_param");
  args.value_loss_coef = coefficient(coefficients[1], "value_loss_coef");
  args.entropy_coef = coefficient(coefficients[2], "entropy_coef");
  args.kl_coef = coefficient(coefficients[3], "kl_coef");
  args.use_clipped_value_loss = use_clipped_value_loss, args.kl_new_old = kl_new_old;
  args.metrics = output(outputs[0]), args.grad_mean = output(outputs[1]);
  args.grad_std = output(outputs[2]), args.grad_values = output(outputs[3]);
  return args;
}

// What the returns take, on any device: sizes (T, E), inputs in the order of GaeArgs, outputs (advantages, returns).
inline GaeArgs gae_args(const std::tuple<int64_t, int64_t>& sizes, const py::tuple& inputs, double gamma, double lam,
                        bool normalize, const py::tuple& outputs) {
  GaeArgs args;
  std::tie(args.num_steps, args.num_envs) = sizes;
  View* const views[] = {&args.rewards,     &args.values,    &args.dones,
                         &args.last_values, &args.time_outs, &args.final_values};
  const char* const names[] = {"rewards", "values", "dones", "last_values", "time_outs", "final_values"};
  for (size_t i = 0; i < 6; ++i) *views[i] = view(inputs[i], names[i], views[i] == &args.last_values);
  args.gamma = gamma, args.lam = lam, args.normalize = normalize;
  args.advantages = output(outputs[0]).data, args.returns = output(outputs[1]).data;
  return args;
}

// Whether the tensor is contiguous float32 with memory of its own, of `count` elements unless that is negative, on
// `device` unless that has no type yet; then its address, and what was left open.
inline bool read_floats(py::handle tensor, float** data, int64_t* count, dlpack::Device* device) {
  dlpack::Tensor found;
  dlpack::Device where;
  int64_t elements = 1;
  if (look_into(tensor, &found)) {
    DType dtype;
    if (!dtype_of_code(found.dtype, &dtype) || dtype != DType::kFloat32) return false;
    for (int i = found.ndim - 1; i >= 0; --i) {
      if (found.shape[i] != 1 && found.strides != nullptr && found.strides[i] != elements) return false;
      elements *= found.shape[i];
    }
    where = found.device;
    *data = reinterpret_cast<float*>(static_cast<char*>(found.data) + found.byte_offset);
  } else {
    const Torch& torch = Torch::get();
    if (own(PyObject_GetAttr(tensor.ptr(), torch.dtype)).ptr() != torch.dtypes[0].first) return false;
    if (!tensor.attr("is_contiguous")().cast<bool>()) return false;
    elements = tensor.attr("numel")().cast<int64_t>();
    const int number = tensor.attr("get_device")().cast<int>();  // of a GPU; -1: the CPU
    where = number < 0 ? dlpack::Device{dlpack::kCpu, 0} : dlpack::Device{dlpack::kCuda, number};
    *data = static_cast<float*>(address_of(tensor));
  }
  if (*count >= 0 && elements != *count) return false;
  if (device->type != 0 && (device->type != where.type || device->id != where.id)) return false;
  if (is_no_address(*data) && elements != 0) return false;
  *count = elements;
  *device = where;
  return true;
}

// The address of contiguous float32 of `count` elements, on the device of the tensors before it.
inline float* floats(py::handle tensor, const char* name, int64_t count, dlpack::Device* device) {
  float* data;
  if (read_floats(tensor, &data, &count, device)) return data;
  throw py::value_error(std::string(name) + " must be contiguous float32 of " + std::to_string(count) +
                        " elements in memory, on the device of the other tensors");
}

inline Activation activation_of(const std::string& name) {
  if (name == "elu") return Activation::kElu;
  if (name == "relu") return Activation::kRelu;
  if (name == "tanh") return Activation::kTanh;
  throw std::invalid_argument("the activation must be elu, relu or tanh, got " + name);
}

// What the forward and the backward pass of a hidden layer's activation take, on any device; x is [num_rows, num_cols].
struct ActivationArgs {
  int64_t num_rows, num_cols;
  float* x;
  const float* bias;
};

inline ActivationArgs activation_args(int64_t num_rows, int64_t num_cols, const py::object& x, const py::object& bias) {
  dlpack::Device device{};
  return {num_rows, num_cols, floats(x, "x", num_rows * num_cols, &device), floats(bias, "bias", num_cols, &device)};
}

struct ActivationBackwardArgs {
  int64_t num_rows, num_cols;
  const float *grad_y, *y;
  float *grad_x, *grad_bias;
};

inline ActivationBackwardArgs activation_backward_args(int64_t num_rows, int64_t num_cols, const py::object& grad_y,
                                                       const py::object& y, const py::object& grad_x,
                                                       const py::object& grad_bias) {
  const int64_t count = num_rows * num_cols;
  dlpack::Device device{};
  return {num_rows,
          num_cols,
          floats(grad_y, "the incoming gradient", count, &device),
          floats(y, "y", count, &device),
          floats(grad_x, "grad_x", count, &device),
          floats(grad_bias, "grad_bias", num_cols, &device)};
}

// What a step of Adam takes, on any device. Rows: (parameter, exp_avg, exp_avg_sq, step, number of its module), in the
// order of the modules; parameters without a gradient are left out. The rule: beta1, beta2, eps, weight_decay, and
// whether that is decoupled. False where a tensor is not as the kernels take it, or all are empty: the caller then has
// to go another way.
inline bool adam_args(const py::list& rows, const std::tuple<double, double, double, double, bool>& rule,
                      double max_norm, const py::object& rate, const py::object& skip, bool skip_nonfinite,
                      const py::object& lost, AdamArgs* args) {
  dlpack::Device device{};
  int64_t elements = 0;
  args->num_tensors = args->num_modules = 0;
  for (const py::handle entry : rows) {
    const auto row = py::reinterpret_borrow<py::tuple>(entry);
    const py::object gradient = own(PyObject_GetAttr(py::handle(row[0]).ptr(), Torch::get().grad));
    if (gradient.is_none()) continue;
    if (args->num_tensors == kMaxAdamTensors || py::handle(row[1]).is_none()) return false;
    AdamTensor& t = args->tensors[args->num_tensors++];
    int64_t one = 1;
    t.count = -1;
    if (!read_floats(row[0], &t.parameter, &t.count, &device)) return false;
    if (!read_floats(gradient, &t.gradient, &t.count, &device)) return false;
    if (!read_floats(row[1], &t.exp_avg, &t.count, &device)) return false;
    if (!read_floats(row[2], &t.exp_avg_sq, &t.count, &device)) return false;
    if (!read_floats(row[3], &t.step, &one, &device)) return false;
    t.module = row[4].cast<int>();
    args->num_modules = t.module + 1;
    elements += t.count;
  }
  if (elements == 0 || args->num_modules > kMaxAdamModules) return false;
  std::tie(args->rule.beta1, args->rule.beta2, args->rule.eps, args->rule.weight_decay, args->rule.decoupled) = rule;
  args->max_norm = static_cast<float>(max_norm);
  args->skip_nonfinite = skip_nonfinite;
  args->rate = coefficient(rate, "the learning rate");
  args->skip = skip.is_none() ? nullptr : static_cast<const uint8_t*>(address_of(skip));
  args->lost = static_cast<uint8_t*>(address_of(lost));
  return true;
}

// What the rule of the learning rate takes, on any device: desired_kl, min_rate, max_rate, factor, rise_above.
inline RateArgs rate_args(const std::tuple<double, double, double, double, double>& rule, const py::object& kl,
                          const py::object& rate, const py::object& lost, const py::object& next) {
  RateArgs args;
  std::tie(args.rule.desired_kl, args.rule.min_rate, args.rule.max_rate, args.rule.factor, args.rule.rise_above) = rule;
  args.kl = coefficient(kl, "kl");
  args.rate = coefficient(rate, "the learning rate");
  args.lost = lost.is_none() ? nullptr : static_cast<const uint8_t*>(address_of(lost));
  args.next = static_cast<double*>(address_of(next));
  return args;
}

}  // namespace pyfast_ppo
