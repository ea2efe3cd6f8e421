// A group of lanes takes a row: as many as it has actions, rounded up to a power of two, at most a warp.
#include "gaussian.h"

#include "../math/gaussian.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace pyfast_ppo::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRowsOfBlock = 128;  // of the backward pass
constexpr int kMost = 4;           // inputs

struct Call {
  GaussianShape shape;
  View inputs[kMost];
  int lanes;  // of a row
  Output out;
  KlLoss kl_loss;
  View old_log_prob;
  Output coefficient;
  View grad;
  Output gradients[3];
  bool of_shared_row[3];
};

template <class T>
__device__ __forceinline__ T read(const View& view, int64_t row, int64_t col) {
  return read_element<T>(view.data, view.dtype, row * view.row_stride + col * view.col_stride);
}

// What becomes of the sum of a row's terms.
struct WritesSum {
  template <class T>
  __device__ static void finish(const Call& call, int64_t row, T sum) {
    write_element(call.out, row, sum);
  }
};

template <class T>
struct Terms {
  T value;
  T gradients[3];
};

struct LogProb : WritesSum {
  static constexpr int kInputs = 3, kGradients = 2;
  static constexpr int kStdOf[] = {-1, 2};  // the input that a gradient belongs to, if that may be a shared row
  static constexpr double kConstant = -kHalfLog2Pi;
  template <class T>
  __device__ static Terms<T> terms(const T (&in)[kMost]) {
    const LogProbTerms<T> t = log_prob_terms(in[0], in[1], in[2]);
    return {t.value, {t.d_mean, t.d_std, T(0)}};
  }
};

struct KlLossOfLogProb : LogProb {
  template <class T>
  __device__ static void finish(const Call& call, int64_t row, T sum) {
    const KlLossTerms<T> terms = kl_loss_terms(call.kl_loss, sum - read<T>(call.old_log_prob, row, 0));
    write_element(call.out, row, terms.value);
    write_element(call.coefficient, row, terms.coefficient);
  }
};

struct Entropy : WritesSum {
  static constexpr int kInputs = 1, kGradients = 1;
  static constexpr int kStdOf[] = {-1};
  static constexpr double kConstant = kHalfLog2PiE;
  template <class T>
  __device__ static Terms<T> terms(const T (&in)[kMost]) {
    const EntropyTerms<T> t = entropy_terms(in[0]);
    return {t.value, {t.d_std, T(0), T(0)}};
  }
};

struct Kl : WritesSum {
  static constexpr int kInputs = 4, kGradients = 3;
  static constexpr int kStdOf[] = {-1, 1, 3};
  static constexpr double kConstant = 0.0;
  template <class T>
  __device__ static Terms<T> terms(const T (&in)[kMost]) {
    const KlOfStdsTerms<T> t = kl_of_stds_terms(in[0], in[1], in[2], in[3]);
    return {t.value, {t.d_mean_p, t.d_std_p, t.d_std_q}};
  }
};

template <class Function, class T>
__device__ __forceinline__ Terms<T> terms_at(const Call& call, int64_t row, int64_t col) {
  T in[kMost];
#pragma unroll
  for (int i = 0; i < Function::kInputs; ++i) in[i] = read<T>(call.inputs[i], row, col);
  return Function::terms(in);
}

// --- CUDA kernels ----------------------------------------------------------------------------------------------------

template <class Function, class T>
__global__ void __launch_bounds__(kThreads, 2) gaussian_kernel(const __grid_constant__ Call call) {
  const int lane = threadIdx.x % call.lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / call.lanes) + threadIdx.x / call.lanes;
  const bool inside = row < call.shape.num_rows;
  T sum = T(0);
  for (int64_t j = lane; inside && j < call.shape.num_actions; j += call.lanes) {
    sum += terms_at<Function, T>(call, row, j).value;
  }
  for (int offset = call.lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  const T constant = static_cast<T>(Function::kConstant * static_cast<double>(call.shape.num_actions));
  if (inside && lane == 0) Function::template finish<T>(call, row, sum + constant);
}

template <class Function, class T>
__global__ void __launch_bounds__(kThreads, 2) gaussian_backward_kernel(const __grid_constant__ Call call) {
  __shared__ T sums_of_groups[Function::kGradients][kThreads];
  const int64_t A = call.shape.num_actions;
  const int lane = threadIdx.x % call.lanes, group = threadIdx.x / call.lanes, groups = kThreads / call.lanes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock;
  const int64_t end = min(begin + kRowsOfBlock, call.shape.num_rows);
  for (int64_t first = 0; first < A; first += call.lanes) {
    const int64_t j = first + lane;
    T sums[Function::kGradients] = {};
    for (int64_t row = begin + group; j < A && row < end; row += groups) {
      const T grad = read<T>(call.grad, row, 0);
      const Terms<T> terms = terms_at<Function, T>(call, row, j);
#pragma unroll
      for (int i = 0; i < Function::kGradients; ++i) {
        const T gradient = grad * terms.gradients[i];
        if (call.of_shared_row[i]) {
          sums[i] += gradient;
        } else {
          write_element(call.gradients[i], row * A + j, gradient);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Function::kGradients; ++i) sums_of_groups[i][threadIdx.x] = sums[i];
    __syncthreads();
    if (group == 0 && j < A) {
#pragma unroll
      for (int i = 0; i < Function::kGradients; ++i) {
        if (!call.of_shared_row[i]) continue;
        T sum = T(0);
        for (int g = 0; g < groups; ++g) sum += sums_of_groups[i][g * call.lanes + lane];
        write_element(call.gradients[i], blockIdx.x * A + j, sum);
      }
    }
    __syncthreads();
  }
}

// --- kernel launcher -------------------------------------------------------------------------------------------------

template <class Function>
Call make_call(const GaussianShape& shape, const View* inputs) {
  Call call{};
  call.shape = shape;
  for (int i = 0; i < Function::kInputs; ++i) call.inputs[i] = inputs[i];
  for (call.lanes = 1; call.lanes < shape.num_actions && call.lanes < kWarp; call.lanes *= 2) {
  }
  return call;
}

template <class Function>
void run_call(const Call& call, const Stream& stream) {
  const GaussianShape& shape = call.shape;
  const auto kernel = shape.use_double ? gaussian_kernel<Function, double> : gaussian_kernel<Function, float>;
  launch("gaussian_kernel", kernel, blocks_of(shape.num_rows, kThreads / call.lanes), kThreads, stream, call);
}

template <class Function>
void run(const GaussianShape& shape, const View* inputs, const Output& out, const Stream& stream) {
  Call call = make_call<Function>(shape, inputs);
  call.out = out;
  run_call<Function>(call, stream);
}

template <class Function>
void run_backward(const GaussianShape& shape, const View* inputs, const View& grad, const Output* gradients,
                  const Stream& stream) {
  Call call = make_call<Function>(shape, inputs);
  call.grad = grad;
  for (int i = 0; i < Function::kGradients; ++i) {
    call.gradients[i] = gradients[i];
    const int std = Function::kStdOf[i];
    call.of_shared_row[i] = std >= 0 && inputs[std].row_stride == 0;
  }
  const auto kernel =
      shape.use_double ? gaussian_backward_kernel<Function, double> : gaussian_backward_kernel<Function, float>;
  launch("gaussian_backward_kernel", kernel, gaussian_blocks(shape), kThreads, stream, call);
}

}  // namespace

int64_t gaussian_blocks(const GaussianShape& shape) { return blocks_of(shape.num_rows, kRowsOfBlock); }

void gaussian(Gaussian function, const GaussianShape& shape, const View* inputs, const Output& out,
              const Stream& stream) {
  const auto run_it = function == Gaussian::kLogProb   ? run<LogProb>
                      : function == Gaussian::kEntropy ? run<Entropy>
                                                       : run<Kl>;
  run_it(shape, inputs, out, stream);
}

void gaussian_kl_loss(KlLoss which, const GaussianShape& shape, const View* inputs, const View& old_log_prob,
                      const Output& value, const Output& coefficient, const Stream& stream) {
  Call call = make_call<KlLossOfLogProb>(shape, inputs);
  call.out = value, call.coefficient = coefficient;
  call.kl_loss = which, call.old_log_prob = old_log_prob;
  run_call<KlLossOfLogProb>(call, stream);
}

void gaussian_backward(Gaussian function, const GaussianShape& shape, const View* inputs, const View& grad,
                       const Output* gradients, const Stream& stream) {
  const auto run_it = function == Gaussian::kLogProb   ? run_backward<LogProb>
                      : function == Gaussian::kEntropy ? run_backward<Entropy>
                                                       : run_backward<Kl>;
  run_it(shape, inputs, grad, gradients, stream);
}

}  // namespace pyfast_ppo::cuda
