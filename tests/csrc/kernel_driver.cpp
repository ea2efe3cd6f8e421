// Runs every kernel on random arguments, for test_sanitizers.py and test_cuda_kernels.py: buffers end at the last
// element that a kernel may touch, so that the sanitizer sees any other access; each element of each output must have
// been written. The CPU's kernels, or with PYFAST_PPO_EMULATED_CUDA the GPU's on the CPU.
//
//   kernel_driver random SEED CASES MAX_THREADS   random arguments; prints a hash of all that was written
//   kernel_driver short KERNEL BUFFER             one case, in which that buffer is one element too short: must be
//   caught kernel_driver names                           the buffers of every kernel, one "KERNEL BUFFER" a line
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#if defined(PYFAST_PPO_EMULATED_CUDA)
#include "cuda_calls.h"
#else
#include "cpu/adam.h"
#include "cpu/activation.h"
#include "cpu/gae.h"
#include "cpu/gaussian.h"
#include "cpu/ppo_loss.h"
#include "schedule.h"
#endif

namespace {

using namespace pyfast_ppo;

constexpr int kBytes[] = {4, 8, 2, 2, 1};   // by DType
constexpr unsigned char kUnwritten = 0xff;  // a NaN of any type that no arithmetic yields

uint64_t written_hash = 14695981039346656037u;  // of all outputs so far

// What to make of a case: sizes, faults, and which buffer is too short (and on which the whole run depends).
struct Plan {
  std::mt19937_64 random;
  std::string short_buffer;         // the name of one that is too short, or empty
  std::vector<std::string>* names;  // where names are collected, or null
  double fault_share;               // of NaN, infinity and numbers <= 0 among the inputs
  bool any_layout;                  // strides and small types at random, else contiguous float32

  int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); }
  bool chance(double share) { return std::uniform_real_distribution<double>(0, 1)(random) < share; }
};

class Buffers {
 public:
  explicit Buffers(Plan& plan) : plan_(plan) {}
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  ~Buffers() {
    for (const Buffer& b : buffers_) std::free(b.memory);
  }

  // An input [rows, cols]; allow_shared: perhaps one row for all.
  View input(const char* name, int64_t rows, int64_t cols, bool positive, bool allow_shared = false) {
    DType dtype = DType::kFloat32;
    int64_t row_stride = cols, col_stride = 1;
    if (plan_.any_layout) {
      const DType types[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
      dtype = types[plan_.pick(0, 4)];
      if (dtype == DType::kFloat64 && !use_double) dtype = DType::kFloat32;
      switch (plan_.pick(0, 5)) {
        case 0:
          row_stride = 1, col_stride = rows;  // transposed
          break;
        case 1:
          col_stride = plan_.pick(1, 3), row_stride = cols * col_stride + plan_.pick(0, 3);  // a cut-out
          break;
        case 2:
          if (!is_std(name)) row_stride = 0;  // a std with stride 0 has a gradient of one row
          break;
        default:
          break;
      }
      if (allow_shared && plan_.chance(0.5)) row_stride = 0, col_stride = plan_.pick(0, 2);
      if (is_std(name) && !allow_shared && row_stride == 0) row_stride = cols * col_stride;
    } else if (allow_shared) {
      row_stride = 0;
    }
    const int64_t count = (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
    char* data = allocate(name, count, kBytes[static_cast<int>(dtype)]);
    const int64_t readable = is_short(name) ? count - 1 : count;
    for (int64_t i = 0; i < readable; ++i) store(data, dtype, i, value(positive));
    return {data, dtype, row_stride, col_stride};
  }

  View flags(const char* name, int64_t rows, int64_t cols) {
    char* data = allocate(name, rows * cols, 1);
    for (int64_t i = 0; i < rows * cols - (is_short(name) ? 1 : 0); ++i)
      data[i] = plan_.any_layout ? static_cast<char>(plan_.pick(0, 1)) : 1;
    return {data, DType::kUInt8, cols, 1};
  }

  Output output(const char* name, int64_t count, DType dtype) {
    const int bytes = kBytes[static_cast<int>(dtype)];
    char* data = allocate(name, count, bytes);
    if (!is_short(name)) {
      std::memset(data, kUnwritten, static_cast<size_t>(count * bytes));
      outputs_.push_back({name, data, count, bytes, nullptr});
    }
    return {data, dtype};
  }

  // Contiguous float32 that is read and changed.
  float* changed(const char* name, int64_t count, bool positive) {
    char* data = allocate(name, count, 4);
    const int64_t readable = is_short(name) ? count - 1 : count;
    for (int64_t i = 0; i < readable; ++i) store(data, DType::kFloat32, i, value(positive));
    if (!is_short(name)) outputs_.push_back({name, data, count, 4, nullptr});
    return reinterpret_cast<float*>(data);
  }

  DType gradient_dtype() {
    const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
    return plan_.any_layout ? types[plan_.pick(0, 3)] : DType::kFloat32;
  }

  DType arithmetic_dtype() const { return use_double ? DType::kFloat64 : DType::kFloat32; }

  bool all_written() const {
    for (const Buffer& b : outputs_) {
      for (int64_t i = 0; i < b.count * b.bytes; ++i) {  // FNV-1a
        written_hash = (written_hash ^ static_cast<unsigned char>(b.data[i])) * 1099511628211u;
      }
    }
    for (const Buffer& b : outputs_) {
      for (int64_t i = 0; i < b.count; ++i) {
        bool written = false;
        for (int k = 0; k < b.bytes; ++k) {
          written = written || static_cast<unsigned char>(b.data[i * b.bytes + k]) != kUnwritten;
        }
        if (!written) {
          std::fprintf(stderr, "element %lld of %s was not written\n", static_cast<long long>(i), b.name);
          return false;
        }
      }
    }
    return true;
  }

  bool use_double = false;

 private:
  struct Buffer {
    const char* name;
    char* data;
    int64_t count;
    int bytes;
    char* memory;  // what was allocated
  };

  static bool is_std(const char* name) { return std::strstr(name, "std") != nullptr; }
  bool is_short(const char* name) const { return plan_.short_buffer == name; }

  char* allocate(const char* name, int64_t count, int bytes) {
    if (plan_.names != nullptr) plan_.names->push_back(name);
    const int64_t size = (is_short(name) ? count - 1 : count) * bytes;
    // of no bytes at all the sanitizer would make one
    char* memory = static_cast<char*>(std::malloc(static_cast<size_t>(size > 0 ? size : 8)));
    char* data = size > 0 ? memory : memory + 8;
    buffers_.push_back({name, data, count, bytes, memory});
    return data;
  }

  double value(bool positive) {
    if (plan_.chance(plan_.fault_share)) {
      const double faults[] = {std::numeric_limits<double>::quiet_NaN(),
                               std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity(),
                               0.0,
                               -1.0,
                               1e30,
                               1e-40};
      return faults[plan_.pick(0, 6)];
    }
    const double x = std::normal_distribution<double>()(plan_.random);
    return positive ? 0.1 + x * x : x;
  }

  static void store(char* data, DType dtype, int64_t i, double x) {
    switch (dtype) {
      case DType::kFloat32:
        from_float(x, reinterpret_cast<float*>(data) + i);
        break;
      case DType::kFloat64:
        from_float(x, reinterpret_cast<double*>(data) + i);
        break;
      case DType::kBFloat16:
        from_float(x, reinterpret_cast<BFloat16*>(data) + i);
        break;
      case DType::kFloat16:
        from_float(x, reinterpret_cast<Float16*>(data) + i);
        break;
      case DType::kUInt8:
        data[i] = x != 0.0;
        break;
    }
  }

  Plan& plan_;
  std::vector<Buffer> buffers_, outputs_;
};

// --- one call of each kernel; false if an output was not written
// ----------------------------------------------------------

struct Sizes {
  int64_t rows, cols;
  int threads;
};

int64_t gradient_size(const View& view, int64_t rows, int64_t cols) {
  return view.row_stride == 0 ? cols : rows * cols;
}

bool run_ppo_loss(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  b.use_double = plan.any_layout && plan.chance(0.3);
  PpoLossArgs args;
  args.num_rows = n.rows, args.num_actions = n.cols;
  args.num_original = plan.any_layout && plan.chance(0.5) ? plan.pick(1, n.rows) : n.rows;
  const int64_t old_rows = args.num_original;  // rows beyond are not to be looked at
  const bool shared_std = plan.any_layout && plan.chance(0.5), shared_old_std = plan.any_layout && plan.chance(0.5);
  args.mean = b.input("mean", n.rows, n.cols, false);
  args.std = b.input("std", n.rows, n.cols, true, shared_std);
  args.values = b.input("values", n.rows, 1, false);
  args.actions = b.input("actions", n.rows, n.cols, false);
  args.old_log_prob = b.input("old_log_prob", n.rows, 1, false);
  args.old_mean = b.input("old_mean", old_rows, n.cols, false);
  args.old_std = b.input("old_std", old_rows, n.cols, true, shared_old_std);
  args.advantages = b.input("advantages", n.rows, 1, false);
  args.returns = b.input("returns", n.rows, 1, false);
  args.old_values = b.input("old_values", n.rows, 1, false);
  args.clip_param.number = 0.2, args.value_loss_coef.number = 0.5, args.entropy_coef.number = 0.01;
  args.kl_coef.number = plan.chance(0.5) ? 0.3 : 0.0;
  args.use_clipped_value_loss = plan.chance(0.5), args.kl_new_old = plan.chance(0.5);
  args.metrics = b.output("metrics", kNumMetrics, b.arithmetic_dtype());
  args.grad_mean = b.output("grad_mean", n.rows * n.cols, b.gradient_dtype());
  args.grad_std = b.output("grad_std", gradient_size(args.std, n.rows, n.cols), b.gradient_dtype());
  args.grad_values = b.output("grad_values", n.rows, b.gradient_dtype());
  ppo_loss(args, b.use_double, n.threads);
  return b.all_written();
}

bool run_gae(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  b.use_double = plan.any_layout && plan.chance(0.3);
  GaeArgs args;
  args.num_steps = n.rows, args.num_envs = n.cols;
  args.rewards = b.input("rewards", n.rows, n.cols, false);
  args.values = b.input("values", n.rows, n.cols, false);
  args.dones = b.flags("dones", n.rows, n.cols);
  args.last_values = b.input("last_values", 1, n.cols, false);
  if (!plan.any_layout || plan.chance(0.7)) args.time_outs = b.flags("time_outs", n.rows, n.cols);
  if (args.time_outs.data != nullptr && (!plan.any_layout || plan.chance(0.7))) {
    args.final_values = b.input("final_values", n.rows, n.cols, false);
  }
  args.gamma = 0.99, args.lam = 0.95, args.normalize = plan.chance(0.5);
  args.advantages = b.output("advantages", n.rows * n.cols, b.arithmetic_dtype()).data;
  args.returns = b.output("returns", n.rows * n.cols, b.arithmetic_dtype()).data;
  gae(args, b.use_double, n.threads);
  return b.all_written();
}

GaussianShape gaussian_shape(Plan& plan, const Sizes& n, Buffers& b) {
  b.use_double = plan.any_layout && plan.chance(0.3);
  return {n.rows, n.cols, b.use_double, n.threads};
}

bool run_log_prob(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  const GaussianShape shape = gaussian_shape(plan, n, b);
  const View actions = b.input("actions", n.rows, n.cols, false), mean = b.input("mean", n.rows, n.cols, false);
  const View std = b.input("std", n.rows, n.cols, true, plan.any_layout);
  gaussian_log_prob(shape, actions, mean, std, b.output("out", n.rows, b.arithmetic_dtype()));
  const View grad = b.input("grad", n.rows, 1, false);
  const Output grad_mean = b.output("grad_mean", n.rows * n.cols, b.gradient_dtype());
  const Output grad_std = b.output("grad_std", gradient_size(std, n.rows, n.cols), b.gradient_dtype());
  gaussian_log_prob_backward(shape, actions, mean, std, grad, grad_mean, grad_std);
  return b.all_written();
}

bool run_kl_loss(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  const GaussianShape shape = gaussian_shape(plan, n, b);
  const View actions = b.input("actions", n.rows, n.cols, false), mean = b.input("mean", n.rows, n.cols, false);
  const View std = b.input("std", n.rows, n.cols, true, plan.any_layout);
  const View old_log_prob = b.input("old_log_prob", n.rows, 1, false);
  const Output value = b.output("value", n.rows, b.arithmetic_dtype());
  const Output coefficient = b.output("coefficient", n.rows, b.arithmetic_dtype());
  const auto which = static_cast<KlLoss>(plan.pick(0, kNumKlLosses - 1));
  gaussian_kl_loss(shape, which, actions, mean, std, old_log_prob, value, coefficient);
  return b.all_written();
}

bool run_entropy(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  const GaussianShape shape = gaussian_shape(plan, n, b);
  const View std = b.input("std", n.rows, n.cols, true);
  gaussian_entropy(shape, std, b.output("out", n.rows, b.arithmetic_dtype()));
  const View grad = b.input("grad", n.rows, 1, false);
  gaussian_entropy_backward(shape, std, grad, b.output("grad_std", n.rows * n.cols, b.gradient_dtype()));
  return b.all_written();
}

bool run_kl(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  const GaussianShape shape = gaussian_shape(plan, n, b);
  const View mean_p = b.input("mean_p", n.rows, n.cols, false), mean_q = b.input("mean_q", n.rows, n.cols, false);
  const View std_p = b.input("std_p", n.rows, n.cols, true, plan.any_layout);
  const View std_q = b.input("std_q", n.rows, n.cols, true, plan.any_layout);
  gaussian_kl(shape, mean_p, std_p, mean_q, std_q, b.output("out", n.rows, b.arithmetic_dtype()));
  const View grad = b.input("grad", n.rows, 1, false);
  const Output grad_mean_p = b.output("grad_mean_p", n.rows * n.cols, b.gradient_dtype());
  const Output grad_std_p = b.output("grad_std_p", gradient_size(std_p, n.rows, n.cols), b.gradient_dtype());
  const Output grad_std_q = b.output("grad_std_q", gradient_size(std_q, n.rows, n.cols), b.gradient_dtype());
  gaussian_kl_backward(shape, mean_p, std_p, mean_q, std_q, grad, grad_mean_p, grad_std_p, grad_std_q);
  return b.all_written();
}

bool run_adam(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  AdamArgs args;
  args.rule = {0.9, 0.999, 1e-8, plan.chance(0.5) ? 0.1 : 0.0, plan.chance(0.5)};
  args.max_norm = 1.0f, args.skip_nonfinite = plan.chance(0.7);
  args.rate = {b.changed("rate", 1, true), DType::kFloat32, 0.0};
  args.skip = nullptr;
  if (!plan.any_layout || plan.chance(0.5)) args.skip = static_cast<const uint8_t*>(b.flags("skip", 1, 1).data);
  args.lost = static_cast<uint8_t*>(b.output("lost", 1, DType::kUInt8).data);
  const int64_t counts[] = {n.rows * n.cols, n.cols, 1, n.rows};
  const bool skipped = args.skip != nullptr && !plan.any_layout;  // then the elements are not looked at
  if (skipped && plan.short_buffer != "skip") args.skip = nullptr;
  args.num_tensors = 4, args.num_modules = 2;
  for (int i = 0; i < args.num_tensors; ++i) {
    float* const step = b.changed("step", 1, true);
    if (plan.short_buffer != "step") *step = static_cast<float>(plan.pick(0, 1000));
    args.tensors[i] = {b.changed("parameter", counts[i], false),
                       b.changed("gradient", counts[i], false),
                       b.changed("exp_avg", counts[i], false),
                       b.changed("exp_avg_sq", counts[i], true),
                       step,
                       counts[i],
                       i / 2};
  }
  adam_step(args, n.threads);
  return b.all_written();
}

bool run_rate(Plan& plan, const Sizes&) {
  Buffers b(plan);
  RateArgs args;
  args.rule = {0.01, 1e-5, 1e-2, 1.5, 0.0};
  args.kl = {b.changed("kl", 1, true), DType::kFloat32, 0.0};
  args.rate = {b.changed("rate", 1, true), DType::kFloat32, 0.0};
  args.lost = static_cast<const uint8_t*>(b.flags("lost", 1, 1).data);
  args.next = static_cast<double*>(b.output("next", 1, DType::kFloat64).data);
#if defined(PYFAST_PPO_EMULATED_CUDA)
  cuda::adapt_rate(args, kStream);
#else
  adapt_rate(args);
#endif
  return b.all_written();
}

template <Activation kActivation>
bool run_activation(Plan& plan, const Sizes& n) {
  Buffers b(plan);
  const bool any_layout = plan.any_layout;
  plan.any_layout = false;  // contiguous float32 is all that it takes
  float* x = static_cast<float*>(const_cast<void*>(b.input("x", n.rows, n.cols, false).data));
  const float* bias = static_cast<const float*>(b.input("bias", 1, n.cols, false).data);
  add_bias_and_activate(kActivation, n.rows, n.cols, x, bias, n.threads);
  const float* grad = static_cast<const float*>(b.input("grad", n.rows, n.cols, false).data);
  float* grad_x = static_cast<float*>(b.output("grad_x", n.rows * n.cols, DType::kFloat32).data);
  float* grad_bias = static_cast<float*>(b.output("grad_bias", n.cols, DType::kFloat32).data);
  add_bias_and_activate_backward(kActivation, n.rows, n.cols, grad, x, grad_x, grad_bias, n.threads);
  plan.any_layout = any_layout;
  return b.all_written();
}

struct Kernel {
  const char* name;
  bool (*run)(Plan&, const Sizes&);
};

constexpr Kernel kKernels[] = {{"elu", run_activation<Activation::kElu>},
                               {"relu", run_activation<Activation::kRelu>},
                               {"tanh", run_activation<Activation::kTanh>},
                               {"ppo_loss", run_ppo_loss},
                               {"gae", run_gae},
                               {"log_prob", run_log_prob},
                               {"kl_loss", run_kl_loss},
                               {"entropy", run_entropy},
                               {"kl", run_kl},
                               {"adam", run_adam},
                               {"rate", run_rate}};

// Small ones, the borders of tiles and chunks, and rows longer than a tile.
Sizes random_sizes(Plan& plan, int max_threads) {
  Sizes n;
  n.threads = static_cast<int>(plan.pick(1, max_threads));
  switch (plan.pick(0, 4)) {
    case 0:
      n.rows = plan.pick(1, 3), n.cols = plan.pick(1, 2100);
      break;
    case 1:
      n.rows = plan.pick(1, 2100), n.cols = plan.pick(1, 3);
      break;
    case 2:
      n.cols = plan.pick(1, 40), n.rows = 8 * (1024 / n.cols) + plan.pick(-2, 2);
      break;
    default:
      n.rows = plan.pick(1, 60), n.cols = plan.pick(1, 40);
      break;
  }
  return n;
}

int run_random(uint64_t seed, int cases, int max_threads) {
  for (int i = 0; i < cases; ++i) {
    Plan plan{std::mt19937_64(seed * 1000003 + static_cast<uint64_t>(i)), "", nullptr, i % 3 == 0 ? 0.01 : 0.0, true};
    for (const Kernel& kernel : kKernels) {
      const Sizes n = random_sizes(plan, max_threads);
      if (!kernel.run(plan, n)) {
        std::fprintf(stderr, "%s, %lld x %lld, %d threads, case %d of seed %llu\n", kernel.name,
                     static_cast<long long>(n.rows), static_cast<long long>(n.cols), n.threads, i,
                     static_cast<unsigned long long>(seed));
        return 1;
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(written_hash));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const Sizes small{19, 5, 1};
  if (mode == "random" && argc == 5) {
    return run_random(std::strtoull(argv[2], nullptr, 10), std::atoi(argv[3]), std::atoi(argv[4]));
  }
  if (mode == "names") {
    for (const Kernel& kernel : kKernels) {
      std::vector<std::string> names;
      Plan plan{std::mt19937_64(1), "", &names, 0.0, false};
      kernel.run(plan, small);
      for (const std::string& name : names) std::printf("%s %s\n", kernel.name, name.c_str());
    }
    return 0;
  }
  if (mode == "short" && argc == 4) {
    for (const Kernel& kernel : kKernels) {
      Plan plan{std::mt19937_64(1), argv[3], nullptr, 0.0, false};
      if (argv[2] == std::string(kernel.name)) kernel.run(plan, small);
    }
    return 0;  // reached only if nothing was caught
  }
  std::fprintf(stderr, "usage: see the head of kernel_driver.cpp\n");
  return 2;
}
