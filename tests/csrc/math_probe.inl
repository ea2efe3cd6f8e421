// The loops of math_probe.cpp, once per instruction set (for_each_isa.h).

template <class T>
void probe_exp(int64_t n, const T* const* in, T* const* out) {
  for (int64_t i = 0; i < n; ++i) {
    const ExpTerms<T> e = exp_terms(in[0][i]);
    out[0][i] = e.exp, out[1][i] = e.expm1_minus_x;
  }
}

template <class T>
void probe_log(int64_t n, const T* const* in, T* const* out) {
  for (int64_t i = 0; i < n; ++i) out[0][i] = log_or_nan(in[0][i]);
}

template <class T>
void probe_ratio(int64_t n, const T* const* in, T* const* out) {  // p, q
  for (int64_t i = 0; i < n; ++i) {
    const RatioTerms<T> r = ratio_terms(in[0][i], in[1][i], reciprocal_or_nan(in[1][i]));
    out[0][i] = r.expm1, out[1][i] = r.phi;
  }
}

template <class T>
void probe_surrogate(int64_t n, const T* const* in, T* const* out) {  // log-ratio, advantage, lo, hi
  for (int64_t i = 0; i < n; ++i) {
    const SurrogateTerms<T> s = surrogate_terms(in[0][i], in[1][i], {in[2][i], in[3][i]});
    out[0][i] = s.ratio, out[1][i] = s.loss, out[2][i] = s.d_log_prob, out[3][i] = s.approx_kl, out[4][i] = s.outside;
  }
}

template <class T>
void probe_clipped_value(int64_t n, const T* const* in, T* const* out) {  // value, old value, target, clip
  for (int64_t i = 0; i < n; ++i) {
    const ValueTerms<T> v = clipped_value_terms(in[0][i], in[1][i], in[2][i], in[3][i]);
    out[0][i] = v.loss, out[1][i] = v.d_value;
  }
}

template <class T>
void probe_plain_value(int64_t n, const T* const* in, T* const* out) {  // value, target
  for (int64_t i = 0; i < n; ++i) {
    const ValueTerms<T> v = plain_value_terms(in[0][i], in[1][i]);
    out[0][i] = v.loss, out[1][i] = v.d_value;
  }
}

template <class T>
void probe_kl(int64_t n, const T* const* in, T* const* out) {  // mean_p, std_p, mean_q, std_q
  for (int64_t i = 0; i < n; ++i) {
    const T inv_q = reciprocal_or_nan(in[3][i]);
    const KlTerms<T> kl = kl_terms(in[0][i], in[2][i], inv_q, ratio_terms(in[1][i], in[3][i], inv_q));
    out[0][i] = kl.value, out[1][i] = kl.d_mean_p, out[2][i] = kl.d_log_std_p, out[3][i] = kl.d_log_std_q;
  }
}

template <class Small>
void widen(int64_t n, const Small* in, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

template <class Small>
void narrow(int64_t n, const float* in, Small* out) {
  for (int64_t i = 0; i < n; ++i) from_float(in[i], out + i);
}
