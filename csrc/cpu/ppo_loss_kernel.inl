// The kernel, once per instruction set (for_each_isa.h). Rows go through in tiles small enough for the L1 cache, each
// treated as one flat array of rows * A elements: loops over it are as long as SIMD wants them, whatever A is. Row sums
// stand apart.

#include "tile.inl"

template <class T>
struct PpoLossKernel {
  using Call = PpoLossCall<T>;

  // --- per-tile memory of one thread
  // -------------------------------------------------------------------------------------

  struct Scratch {
    // flat arrays of tile_rows * A elements; the first five only hold inputs that are not contiguous T already
    T *mean, *std, *actions, *old_mean, *old_std;
    T *z, *term, *inv_std, *log_std, *kl_d_mean, *kl_d_log_std, *coefficient, *grad_mean, *grad_std, *column_sums;
    // arrays of tile_rows elements
    T *values, *old_log_prob, *advantages, *returns, *old_values;
    T *row_sum, *log_ratio, *row_coefficient, *grad_values;

    static constexpr int64_t kFlat = 15, kPerRow = 9;

    Scratch(const Call& call, T* memory) {
      T** flat[] = {&mean,    &std,       &actions,      &old_mean,    &old_std,   &z,        &term,       &inv_std,
                    &log_std, &kl_d_mean, &kl_d_log_std, &coefficient, &grad_mean, &grad_std, &column_sums};
      for (T** array : flat) {
        *array = memory;
        memory += call.tile_elements + kLanes;
      }
      T** per_row[] = {&values,  &old_log_prob, &advantages,      &returns,    &old_values,
                       &row_sum, &log_ratio,    &row_coefficient, &grad_values};
      for (T** array : per_row) {
        *array = memory;
        memory += call.tile_rows;
      }
    }
  };

  // --- tables: a shared row, repeated to the length of a tile
  // -------------------------------------------------------------

  static void fill_tables(Call& call) {
    const PpoLossArgs& args = call.args;
    const int64_t A = args.num_actions;
    if (call.std_per_row) return;
    read_into(args.std, A, call.std_row);
    for (int64_t j = 0; j < A; ++j) call.inv_std[j] = reciprocal_or_nan(call.std_row[j]);
    call.sum_log_std = 0.0;
    for (int64_t j = 0; j < A; ++j) {  // a float that is subnormal is a normal double
      const T std = call.std_row[j];
      const double log_std = log_or_nan(static_cast<double>(std));
      call.sum_log_std += is_positive_normal(std) ? log_std : std::numeric_limits<double>::quiet_NaN();
    }
    repeat_row(call.std_row, A, call.tile_rows, call.std_tile);
    repeat_row(call.inv_std, A, call.tile_rows, call.inv_std);
    if (call.old_std_per_row) return;
    read_into(args.old_std, A, call.old_std_row);
    for (int64_t j = 0; j < A; ++j) {
      const T new_std = call.std_row[j], old_std = call.old_std_row[j];
      call.inv_old_std[j] = reciprocal_or_nan(old_std);
      const RatioTerms<T> terms = args.kl_new_old ? ratio_terms(new_std, old_std, call.inv_old_std[j])
                                                  : ratio_terms(old_std, new_std, call.inv_std[j]);
      call.ratio_expm1[j] = terms.expm1;
      call.ratio_phi[j] = terms.phi;
    }
    for (T* table : {call.inv_old_std, call.ratio_expm1, call.ratio_phi}) repeat_row(table, A, call.tile_rows, table);
  }

  static void read_into(const View& view, int64_t cols, T* out) {
    const T* row = read_rows(view, 0, 1, cols, out);
    for (int64_t j = 0; j < cols; ++j) out[j] = row[j];
  }

  // --- the passes over a tile: n elements or rows; nothing that is written overlaps anything else
  // --------------------------

  // z, and the term 1/2 z^2 (+ log std) that the row sums of the log-probability are made of
  static void standardize(int64_t n, const T* __restrict actions, const T* __restrict mean, const T* __restrict inv_std,
                          T* __restrict z, T* __restrict term) {
    for (int64_t i = 0; i < n; ++i) {
      z[i] = standardized(actions[i], mean[i], inv_std[i]);
      term[i] = T(0.5) * z[i] * z[i];
    }
  }

  static void standardize(int64_t n, const T* __restrict actions, const T* __restrict mean, const T* __restrict std,
                          T* __restrict z, T* __restrict term, T* __restrict inv_std, T* __restrict log_std) {
    for (int64_t i = 0; i < n; ++i) {
      inv_std[i] = reciprocal_or_nan(std[i]);
      log_std[i] = log_or_nan(std[i]);
      z[i] = standardized(actions[i], mean[i], inv_std[i]);
      term[i] = T(0.5) * z[i] * z[i] + log_std[i];
    }
  }

  // The KL, and weight times its derivatives if they are asked for. The ratio of the stds comes from a table, or from
  // the stds of each row.
  template <bool kNewOld, bool kDerivatives>
  static void kl_from_table(int64_t n, const T* __restrict mean, const T* __restrict old_mean,
                            const T* __restrict inv_std_q, const T* __restrict ratio_expm1,
                            const T* __restrict ratio_phi, T weight, LaneSum<T>& sum, T* __restrict d_mean,
                            T* __restrict d_log_std) {
    LaneSum<T> values;
    for_each_lane(n, [&](int64_t i, int k) {
      const KlTerms<T> kl = kNewOld ? kl_terms(mean[i], old_mean[i], inv_std_q[i], {ratio_expm1[i], ratio_phi[i]})
                                    : kl_terms(old_mean[i], mean[i], inv_std_q[i], {ratio_expm1[i], ratio_phi[i]});
      values.lanes[k] += kl.value;
      if constexpr (kDerivatives) write_kl_derivatives<kNewOld>(kl, weight, d_mean[i], d_log_std[i]);
    });
    sum = values;
  }

  template <bool kNewOld, bool kDerivatives>
  static void kl_from_stds(int64_t n, const T* __restrict mean, const T* __restrict std, const T* __restrict inv_std,
                           const T* __restrict old_mean, const T* __restrict old_std, T weight, LaneSum<T>& sum,
                           T* __restrict d_mean, T* __restrict d_log_std) {
    LaneSum<T> values;
    for_each_lane(n, [&](int64_t i, int k) {
      const T inv_std_q = kNewOld ? reciprocal_or_nan(old_std[i]) : inv_std[i];
      const RatioTerms<T> ratio =
          kNewOld ? ratio_terms(std[i], old_std[i], inv_std_q) : ratio_terms(old_std[i], std[i], inv_std_q);
      const KlTerms<T> kl =
          kNewOld ? kl_terms(mean[i], old_mean[i], inv_std_q, ratio) : kl_terms(old_mean[i], mean[i], inv_std_q, ratio);
      values.lanes[k] += kl.value;
      if constexpr (kDerivatives) write_kl_derivatives<kNewOld>(kl, weight, d_mean[i], d_log_std[i]);
    });
    sum = values;
  }

  template <bool kNewOld>
  static PYFAST_PPO_INLINE void write_kl_derivatives(const KlTerms<T>& kl, T weight, T& d_mean, T& d_log_std) {
    d_mean = weight * (kNewOld ? kl.d_mean_p : -kl.d_mean_p);
    d_log_std = weight * (kNewOld ? kl.d_log_std_p : kl.d_log_std_q);
  }

  // In double: for many actions the two terms are large and their difference is small.
  static void subtract_old(int64_t rows, const T* __restrict row_sum, const T* __restrict old_log_prob,
                           double log_normalizer, T* __restrict log_ratio) {
    for (int64_t r = 0; r < rows; ++r) {
      log_ratio[r] = static_cast<T>(-static_cast<double>(row_sum[r]) - (log_normalizer + old_log_prob[r]));
    }
  }

  struct RowSums {
    LaneSum<T> surrogate, value_loss, approx_kl, outside, coefficient;
    LaneMax<T> ratio;
    LaneSum<T> not_finite;  // of this tile: 0 if all scalars are finite, else NaN; x - x is 0 for every finite x
  };

  // The surrogate and the value loss of each row, and weight times their derivatives.
  template <bool kClipped>
  static void losses(int64_t rows, const T* __restrict log_ratio, const T* __restrict advantages,
                     const T* __restrict values, const T* __restrict old_values, const T* __restrict returns, T clip,
                     ClipRange<T> range, T weight, T value_weight, RowSums& total, T* __restrict coefficient,
                     T* __restrict grad_values) {
    RowSums sums = total;
    sums.not_finite = {};
    for_each_lane(rows, [&](int64_t r, int k) {
      const SurrogateTerms<T> surrogate = surrogate_terms(log_ratio[r], advantages[r], range);
      const ValueTerms<T> value = kClipped ? clipped_value_terms(values[r], old_values[r], returns[r], clip)
                                           : plain_value_terms(values[r], returns[r]);
      coefficient[r] = weight * surrogate.d_log_prob;
      grad_values[r] = value_weight * value.d_value;
      sums.surrogate.lanes[k] += surrogate.loss;
      sums.value_loss.lanes[k] += value.loss;
      sums.approx_kl.lanes[k] += surrogate.approx_kl;
      sums.outside.lanes[k] += surrogate.outside;
      sums.coefficient.lanes[k] += coefficient[r];
      sums.ratio.lanes[k] = surrogate.ratio > sums.ratio.lanes[k] ? surrogate.ratio : sums.ratio.lanes[k];
      sums.not_finite.lanes[k] += (log_ratio[r] - log_ratio[r]) + (advantages[r] - advantages[r]) +
                                  (values[r] - values[r]) + (old_values[r] - old_values[r]) + (returns[r] - returns[r]);
    });
    total = sums;
  }

  // The gradients of the mean, and of the std: per row, or this element's share of the sum over rows of d / d log std.
  template <bool kWithKl>
  static void gradients(int64_t n, const T* __restrict z, const T* __restrict inv_std, const T* __restrict coefficient,
                        const T* __restrict kl_d_mean, const T* __restrict kl_d_log_std, T* __restrict grad_mean,
                        T* __restrict column_sums) {
    for (int64_t i = 0; i < n; ++i) {
      const T weighted = coefficient[i] * z[i];
      grad_mean[i] = inv_std[i] * weighted + (kWithKl ? kl_d_mean[i] : T(0));
      column_sums[i] += weighted * z[i] + (kWithKl ? kl_d_log_std[i] : T(0));
    }
  }

  template <bool kWithKl>
  static void gradients_per_row(int64_t n, const T* __restrict z, const T* __restrict inv_std,
                                const T* __restrict coefficient, const T* __restrict kl_d_mean,
                                const T* __restrict kl_d_log_std, T entropy_weight, T* __restrict grad_mean,
                                T* __restrict grad_std) {
    for (int64_t i = 0; i < n; ++i) {
      const T weighted = coefficient[i] * z[i];
      grad_mean[i] = inv_std[i] * weighted + (kWithKl ? kl_d_mean[i] : T(0));
      grad_std[i] =
          (weighted * z[i] - coefficient[i] + (kWithKl ? kl_d_log_std[i] : T(0)) - entropy_weight) * inv_std[i];
    }
  }

  // --- one chunk of rows
  // --------------------------------------------------------------------------------------------------

  // kStdPerRow: std is [N, A]; old_std is then read per row, too. kOldStdPerRow: old_std is [N, A].
  template <bool kStdPerRow, bool kOldStdPerRow, bool kNewOld>
  static void run_chunk(const Call& call, int64_t chunk, Scratch& s) {
    const PpoLossArgs& args = call.args;
    const int64_t A = args.num_actions;
    const int64_t begin = chunk * call.chunk_rows;
    const int64_t end = begin + call.chunk_rows < args.num_rows ? begin + call.chunk_rows : args.num_rows;
    const bool kl_gradient = call.kl_coef != 0.0;  // else a KL that overflows must not reach the gradients
    const T kl_weight = static_cast<T>(call.kl_coef / static_cast<double>(args.num_original));
    const T entropy_weight = static_cast<T>(call.entropy_coef / static_cast<double>(args.num_original));
    const T row_weight = static_cast<T>(1.0 / static_cast<double>(args.num_rows));
    const T value_weight = static_cast<T>(call.value_loss_coef / static_cast<double>(args.num_rows));
    const ClipRange<T> range = clip_range<T>(call.clip_param);
    const T clip = static_cast<T>(call.clip_param);
    const double log_normalizer =
        (kStdPerRow ? 0.0 : call.sum_log_std) + kHalfLog2Pi * static_cast<double>(A) + clip_fault(call.clip_param);

    RowSums sums;
    LaneSum<T> log_std_sum, kl_sum;
    int64_t nonfinite = 0;
    for (int64_t i = 0; i < call.tile_elements; ++i) s.column_sums[i] = T(0);

    for (int64_t row = begin; row < end; row += call.tile_rows) {
      const int64_t rows = end - row < call.tile_rows ? end - row : call.tile_rows;
      const int64_t n = rows * A;
      const int64_t original = args.num_original - row;
      const int64_t rows_kl = original < 0 ? 0 : (original < rows ? original : rows);
      const int64_t n_kl = rows_kl * A;
      const T* mean = read_rows(args.mean, row, rows, A, s.mean);
      const T* actions = read_rows(args.actions, row, rows, A, s.actions);
      const T* std = kStdPerRow ? read_rows(args.std, row, rows, A, s.std) : call.std_tile;
      const T* inv_std = kStdPerRow ? s.inv_std : call.inv_std;

      if constexpr (kStdPerRow) {
        standardize(n, actions, mean, std, s.z, s.term, s.inv_std, s.log_std);
        log_std_sum.add(s.log_std, n_kl);
      } else {
        standardize(n, actions, mean, inv_std, s.z, s.term);
      }
      sum_each_row(s.term, rows, A, s.row_sum);

      LaneSum<T> tile_kl;
      if (n_kl > 0) {
        const T* old_mean = read_rows(args.old_mean, row, rows_kl, A, s.old_mean);
        if constexpr (kOldStdPerRow) {
          const T* old_std = read_rows(args.old_std, row, rows_kl, A, s.old_std);
          const auto kl = kl_gradient ? kl_from_stds<kNewOld, true> : kl_from_stds<kNewOld, false>;
          kl(n_kl, mean, std, inv_std, old_mean, old_std, kl_weight, tile_kl, s.kl_d_mean, s.kl_d_log_std);
        } else {
          const auto kl = kl_gradient ? kl_from_table<kNewOld, true> : kl_from_table<kNewOld, false>;
          kl(n_kl, mean, old_mean, kNewOld ? call.inv_old_std : call.inv_std, call.ratio_expm1, call.ratio_phi,
             kl_weight, tile_kl, s.kl_d_mean, s.kl_d_log_std);
        }
        kl_sum.add(tile_kl);
      }

      const T* old_log_prob = read_rows(args.old_log_prob, row, rows, 1, s.old_log_prob);
      const T* advantages = read_rows(args.advantages, row, rows, 1, s.advantages);
      const T* values = read_rows(args.values, row, rows, 1, s.values);
      const T* old_values = read_rows(args.old_values, row, rows, 1, s.old_values);
      const T* returns = read_rows(args.returns, row, rows, 1, s.returns);
      subtract_old(rows, s.row_sum, old_log_prob, log_normalizer, s.log_ratio);
      T* grad_values = write_target(args.grad_values, row, s.grad_values);
      const auto row_losses = args.use_clipped_value_loss ? losses<true> : losses<false>;
      row_losses(rows, s.log_ratio, advantages, values, old_values, returns, clip, range, row_weight, value_weight,
                 sums, s.row_coefficient, grad_values);
      write_back(args.grad_values, row, rows, grad_values);
      const double kl_total = tile_kl.total();
      if (sums.not_finite.total() != 0.0 || kl_total - kl_total != 0.0) {
        nonfinite += count_nonfinite(args, row, rows, rows_kl, s.log_ratio, advantages, values, old_values, returns);
      }

      repeat_each(s.row_coefficient, rows, A, s.coefficient);
      T* grad_mean = write_target(args.grad_mean, row * A, s.grad_mean);
      T* grad_std = kStdPerRow ? write_target(args.grad_std, row * A, s.grad_std) : nullptr;
      const int64_t n_with_kl = kl_gradient ? n_kl : 0;
      const int64_t bounds[] = {0, n_with_kl, n_kl, n};  // with the KL and the entropy, with the entropy, with neither
      for (int part = 0; part < 3; ++part) {
        const int64_t i = bounds[part], count = bounds[part + 1] - i;
        if constexpr (kStdPerRow) {
          const auto part_gradients = part == 0 ? gradients_per_row<true> : gradients_per_row<false>;
          part_gradients(count, s.z + i, inv_std + i, s.coefficient + i, s.kl_d_mean + i, s.kl_d_log_std + i,
                         part < 2 ? entropy_weight : T(0), grad_mean + i, grad_std + i);
        } else {
          const auto part_gradients = part == 0 ? gradients<true> : gradients<false>;
          part_gradients(count, s.z + i, inv_std + i, s.coefficient + i, s.kl_d_mean + i, s.kl_d_log_std + i,
                         grad_mean + i, s.column_sums + i);
        }
      }
      write_back(args.grad_mean, row * A, n, grad_mean);
      if (kStdPerRow) write_back(args.grad_std, row * A, n, grad_std);
    }

    double* partial = call.partials + chunk * call.partial_size;
    partial[kLoss] = 0.0;
    partial[kSurrogate] = sums.surrogate.total();
    partial[kValueLoss] = sums.value_loss.total();
    partial[kEntropy] = log_std_sum.total();
    partial[kKl] = kl_sum.total();
    partial[kApproxKl] = sums.approx_kl.total();
    partial[kClipFraction] = sums.outside.total();
    partial[kMaxRatio] = sums.ratio.total();
    partial[kNonfinite] = static_cast<double>(nonfinite);
    partial[kNumMetrics] = sums.coefficient.total();
    if (!kStdPerRow) add_columns(s.column_sums, call.tile_rows, A, partial + kNumMetrics + 1);
  }

  // Rows of this tile with an input or a log-ratio that is not finite, or a std that is not a positive normal number.
  static int64_t count_nonfinite(const PpoLossArgs& args, int64_t row, int64_t rows, int64_t rows_kl,
                                 const T* log_ratio, const T* advantages, const T* values, const T* old_values,
                                 const T* returns) {
    const auto is_finite = [](T x) { return x - x == T(0); };
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      // log_ratio is not finite if mean, std, action or old_log_prob is not, or std is not positive
      bool finite = is_finite(log_ratio[r]) && is_finite(advantages[r]) && is_finite(values[r]) &&
                    is_finite(old_values[r]) && is_finite(returns[r]);
      if (r < rows_kl) {
        T one_mean[1], one_std[1];
        for (int64_t j = 0; j < args.num_actions; ++j) {
          View old_mean = args.old_mean;
          View old_std = args.old_std;
          old_mean.data = element(old_mean, (row + r) * old_mean.row_stride + j * old_mean.col_stride);
          old_std.data = element(old_std, (row + r) * old_std.row_stride + j * old_std.col_stride);
          const T m = *read_rows(old_mean, 0, 1, 1, one_mean);
          const T q = *read_rows(old_std, 0, 1, 1, one_std);
          finite = finite && is_finite(m) && is_positive_normal(q);
        }
      }
      count += finite ? 0 : 1;
    }
    return count;
  }
};

template <class T>
void fill_ppo_loss_tables(PpoLossCall<T>& call) {
  PpoLossKernel<T>::fill_tables(call);
}

template <class T>
int64_t ppo_loss_scratch_size(const PpoLossCall<T>& call) {
  using Scratch = typename PpoLossKernel<T>::Scratch;
  return Scratch::kFlat * (call.tile_elements + kLanes) + Scratch::kPerRow * call.tile_rows;
}

template <class T>
void run_ppo_loss_chunk(const PpoLossCall<T>& call, int64_t chunk, T* memory) {
  using Kernel = PpoLossKernel<T>;
  typename Kernel::Scratch scratch(call, memory);
  const bool new_old = call.args.kl_new_old;
  if (call.std_per_row) {
    new_old ? Kernel::template run_chunk<true, true, true>(call, chunk, scratch)
            : Kernel::template run_chunk<true, true, false>(call, chunk, scratch);
  } else if (call.old_std_per_row) {
    new_old ? Kernel::template run_chunk<false, true, true>(call, chunk, scratch)
            : Kernel::template run_chunk<false, true, false>(call, chunk, scratch);
  } else {
    new_old ? Kernel::template run_chunk<false, false, true>(call, chunk, scratch)
            : Kernel::template run_chunk<false, false, false>(call, chunk, scratch);
  }
}
