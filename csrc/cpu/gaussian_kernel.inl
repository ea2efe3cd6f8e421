// The kernels, once per instruction set (for_each_isa.h), on one tile of rows as a flat array.

#include "tile.inl"

// memory: kGaussianScratch arrays of tile_elements + kLanes
template <class T>
struct GaussianTile {
  const GaussianCall& call;
  int64_t row, rows, n;
  T* memory;

  GaussianTile(const GaussianCall& c, int64_t tile, T* m) : call(c), row(tile * c.tile_rows), memory(m) {
    rows = c.shape.num_rows - row < c.tile_rows ? c.shape.num_rows - row : c.tile_rows;
    n = rows * c.shape.num_actions;
  }

  T* array(int i) const { return memory + i * (call.tile_elements + kLanes); }
  const T* read(const View& view, int i) const { return read_rows(view, row, rows, call.shape.num_actions, array(i)); }
  const T* read_grad(int i, int scratch) const {  // [N], repeated for each action
    repeat_each(read_rows(call.grad, row, rows, 1, array(scratch)), rows, call.shape.num_actions, array(i));
    return array(i);
  }
  T* row_sums(const T* terms, T constant, int scratch) const {
    T* sums = array(scratch);
    sum_each_row(terms, rows, call.shape.num_actions, sums);
    for (int64_t r = 0; r < rows; ++r) sums[r] += constant;
    return sums;
  }
  void write_row_sums(const T* terms, T constant, int scratch) const {
    write_back(call.out[0], row, rows, row_sums(terms, constant, scratch));
  }
  // Where a gradient is computed: the output itself, or scratch for write_gradient.
  T* gradient_target(int output, int scratch) const {
    if (call.out[output].data == nullptr || call.shared[output]) return array(scratch);
    return write_target(call.out[output], row * call.shape.num_actions, array(scratch));
  }
  // A gradient [N, A], or this tile's share of the sum over rows for a shared std.
  void write_gradient(const T* gradient, int output) const {
    if (call.out[output].data == nullptr) return;
    if (call.shared[output]) {
      double* partial = call.partials + (tile_index() * kGaussianOutputs + output) * call.shape.num_actions;
      for (int64_t j = 0; j < call.shape.num_actions; ++j) partial[j] = 0.0;
      add_columns(gradient, rows, call.shape.num_actions, partial);
    } else {
      write_back(call.out[output], row * call.shape.num_actions, n, gradient);
    }
  }
  int64_t tile_index() const { return row / call.tile_rows; }
};

// use(i, terms) for each element i: the log-probability's terms, without the logarithm of a std that all rows share.
template <class T, class Use>
PYFAST_PPO_INLINE void for_each_log_prob(const GaussianTile<T>& tile, const Use& use) {
  const GaussianCall& call = tile.call;
  const T* __restrict actions = tile.read(call.in[0], 0);
  const T* __restrict mean = tile.read(call.in[1], 1);
  if (call.inv_std != nullptr) {
    const T* __restrict inv_std = static_cast<const T*>(call.inv_std);
    for (int64_t i = 0; i < tile.n; ++i) use(i, log_prob_terms(actions[i], mean[i], inv_std[i], T(0)));
  } else {
    const T* __restrict std = tile.read(call.in[2], 2);
    for (int64_t i = 0; i < tile.n; ++i) use(i, log_prob_terms(actions[i], mean[i], std[i]));
  }
}

// One for each row, in scratch array 4.
template <class T>
T* log_probs(const GaussianTile<T>& tile) {
  T* __restrict terms = tile.array(3);
  for_each_log_prob(tile, [&](int64_t i, const LogProbTerms<T>& of_element) { terms[i] = of_element.value; });
  const double constant = tile.call.sum_log_std + kHalfLog2Pi * static_cast<double>(tile.call.shape.num_actions);
  return tile.row_sums(terms, static_cast<T>(-constant), 4);
}

template <class T>
void gaussian_log_prob_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  write_back(call.out[0], tile.row, tile.rows, log_probs(tile));
}

template <KlLoss which, class T>
void kl_losses(const T* log_prob, const T* old_log_prob, int64_t rows, T* value, T* coefficient) {
  for (int64_t r = 0; r < rows; ++r) {
    const KlLossTerms<T> terms = kl_loss_terms(which, log_prob[r] - old_log_prob[r]);
    value[r] = terms.value;
    coefficient[r] = terms.coefficient;
  }
}

template <class T, int... each>
auto kl_losses_of(KlLoss which, std::integer_sequence<int, each...>) {
  static constexpr decltype(&kl_losses<KlLoss{}, T>) kLosses[] = {kl_losses<static_cast<KlLoss>(each), T>...};
  return kLosses[static_cast<int>(which)];
}

template <class T>
void gaussian_kl_loss_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  const T* log_prob = log_probs(tile);
  const T* old_log_prob = read_rows(call.in[3], tile.row, tile.rows, 1, tile.array(5));
  T *value = tile.array(6), *coefficient = tile.array(7);
  const auto losses = kl_losses_of<T>(call.kl_loss, std::make_integer_sequence<int, kNumKlLosses>{});
  losses(log_prob, old_log_prob, tile.rows, value, coefficient);
  write_back(call.out[0], tile.row, tile.rows, value);
  write_back(call.out[1], tile.row, tile.rows, coefficient);
}

template <class T>
void gaussian_log_prob_backward_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  const T* __restrict grad = tile.read_grad(3, 4);
  T* __restrict grad_mean = tile.gradient_target(0, 4);
  T* __restrict grad_std = tile.gradient_target(1, 5);
  for_each_log_prob(tile, [&](int64_t i, const LogProbTerms<T>& of_element) {
    grad_mean[i] = grad[i] * of_element.d_mean;
    grad_std[i] = grad[i] * of_element.d_std;
  });
  tile.write_gradient(grad_mean, 0);
  tile.write_gradient(grad_std, 1);
}

template <class T>
void gaussian_entropy_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  const T* std = tile.read(call.in[0], 0);
  T* terms = tile.array(1);
  for (int64_t i = 0; i < tile.n; ++i) terms[i] = entropy_terms(std[i]).value;
  tile.write_row_sums(terms, static_cast<T>(kHalfLog2PiE * static_cast<double>(call.shape.num_actions)), 2);
}

template <class T>
void gaussian_entropy_backward_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  const T *std = tile.read(call.in[0], 0), *grad = tile.read_grad(1, 2);
  T* grad_std = tile.array(2);
  for (int64_t i = 0; i < tile.n; ++i) grad_std[i] = grad[i] * entropy_terms(std[i]).d_std;
  tile.write_gradient(grad_std, 0);
}

template <class T>
void gaussian_kl_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  const T *mean_p = tile.read(call.in[0], 0), *std_p = tile.read(call.in[1], 1);
  const T *mean_q = tile.read(call.in[2], 2), *std_q = tile.read(call.in[3], 3);
  T* terms = tile.array(4);
  for (int64_t i = 0; i < tile.n; ++i) {
    terms[i] = kl_of_stds_terms(mean_p[i], std_p[i], mean_q[i], std_q[i]).value;
  }
  tile.write_row_sums(terms, T(0), 5);
}

template <class T>
void kl_gradients(int64_t n, const T* __restrict mean_p, const T* __restrict std_p, const T* __restrict mean_q,
                  const T* __restrict std_q, const T* __restrict grad, T* __restrict grad_mean_p,
                  T* __restrict grad_std_p, T* __restrict grad_std_q) {
  for (int64_t i = 0; i < n; ++i) {
    const KlOfStdsTerms<T> kl = kl_of_stds_terms(mean_p[i], std_p[i], mean_q[i], std_q[i]);
    grad_mean_p[i] = grad[i] * kl.d_mean_p;
    grad_std_p[i] = grad[i] * kl.d_std_p;
    grad_std_q[i] = grad[i] * kl.d_std_q;
  }
}

template <class T>
void gaussian_kl_backward_tile(const GaussianCall& call, int64_t index, T* memory) {
  const GaussianTile<T> tile(call, index, memory);
  T* const gradients[] = {tile.gradient_target(0, 5), tile.gradient_target(1, 6), tile.gradient_target(2, 7)};
  kl_gradients(tile.n, tile.read(call.in[0], 0), tile.read(call.in[1], 1), tile.read(call.in[2], 2),
               tile.read(call.in[3], 3), tile.read_grad(4, 5), gradients[0], gradients[1], gradients[2]);
  for (int i = 0; i < 3; ++i) tile.write_gradient(gradients[i], i);
}
