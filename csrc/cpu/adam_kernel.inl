// The kernels, once per instruction set (for_each_isa.h), on some elements.

inline double sum_of_squares(const float* x, int64_t count) {
  double total = 0.0;
  int64_t i = 0;
  for (; i + kSquaresInFloat <= count; i += kSquaresInFloat) {
    float lanes[kLanes] = {};
    for (int64_t k = 0; k < kSquaresInFloat; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + k + lane] * x[i + k + lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  }
  for (; i < count; ++i) total += x[i] * x[i];
  return total;
}

inline void adam_range(const AdamTensor& tensor, int64_t begin, int64_t count, const AdamWeights& weights,
                       const AdamScales& scales, float clip) {
  float* __restrict parameter = tensor.parameter + begin;
  float* __restrict gradient = tensor.gradient + begin;
  float* __restrict exp_avg = tensor.exp_avg + begin;
  float* __restrict exp_avg_sq = tensor.exp_avg_sq + begin;
  for (int64_t i = 0; i < count; ++i) {
    gradient[i] *= clip;
    const AdamElement x = adam_step(weights, scales, gradient[i], {parameter[i], exp_avg[i], exp_avg_sq[i]});
    parameter[i] = x.parameter;
    exp_avg[i] = x.exp_avg;
    exp_avg_sq[i] = x.exp_avg_sq;
  }
}
