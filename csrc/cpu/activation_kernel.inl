// The kernels, once per instruction set (for_each_isa.h), on some rows.

template <class Function>
inline void activate_rows(float* x, const float* bias, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) x[r * cols + c] = Function::value(x[r * cols + c] + bias[c]);
  }
}

// grad: of y, then of x. Adds to sums, [cols].
template <class Function>
inline void activate_backward_row(float* __restrict grad, const float* __restrict y, float* __restrict sums,
                                  int64_t cols) {
  for (int64_t c = 0; c < cols; ++c) {
    grad[c] = Function::gradient(grad[c], y[c]);
    sums[c] += grad[c];
  }
}

template <class Function>
inline void activate_backward_rows(const float* grad_y, const float* y, float* grad_x, float* sums, int64_t rows,
                                   int64_t cols) {
  for (int64_t c = 0; c < cols; ++c) sums[c] = 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    if (grad_x != grad_y) std::memcpy(grad_x + r * cols, grad_y + r * cols, static_cast<size_t>(cols) * sizeof(float));
    activate_backward_row<Function>(grad_x + r * cols, y + r * cols, sums, cols);
  }
}
