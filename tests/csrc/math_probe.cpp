// csrc/math on arrays, for test_math.py: compiled as the kernels are, as loops, once per instruction set.
#include <cstdint>

#include "../math/gaussian.h"
#include "../math/ppo.h"
#include "../tensor.h"

#define PYFAST_PPO_KERNEL "math_probe.inl"
#include "for_each_isa.h"

using namespace pyfast_ppo;

namespace {

template <class T, class Probe>
void cast_and_call(const Probe& probe, int64_t n, const void* const* in, void* const* out) {
  probe(n, reinterpret_cast<const T* const*>(in), reinterpret_cast<T* const*>(out));
}

}  // namespace

#if defined(PYFAST_PPO_X86)
#define CALL(isa, function)                           \
  if (isa == static_cast<int>(Isa::kBaseline)) {      \
    baseline::function;                               \
  } else if (isa == static_cast<int>(Isa::kAvx2)) {   \
    avx2::function;                                   \
  } else if (isa == static_cast<int>(Isa::kAvx512)) { \
    avx512::function;                                 \
  }
#else
#define CALL(isa, function) baseline::function;
#endif

#define EXPORT(name)                                                                                                 \
  extern "C" void name(int isa, int use_double, int64_t n, const void* const* in, void* const* out) {                \
    if (use_double) {                                                                                                \
      cast_and_call<double>([isa](int64_t m, const double* const* x, double* const* y) { CALL(isa, name(m, x, y)) }, \
                            n, in, out);                                                                             \
    } else {                                                                                                         \
      cast_and_call<float>([isa](int64_t m, const float* const* x, float* const* y) { CALL(isa, name(m, x, y)) }, n, \
                           in, out);                                                                                 \
    }                                                                                                                \
  }

EXPORT(probe_exp)
EXPORT(probe_log)
EXPORT(probe_ratio)
EXPORT(probe_surrogate)
EXPORT(probe_clipped_value)
EXPORT(probe_plain_value)
EXPORT(probe_kl)

extern "C" void probe_half_to_float(int isa, int64_t n, const uint16_t* in, float* out) {
  CALL(isa, widen(n, reinterpret_cast<const Float16*>(in), out))
}
extern "C" void probe_bfloat16_to_float(int isa, int64_t n, const uint16_t* in, float* out) {
  CALL(isa, widen(n, reinterpret_cast<const BFloat16*>(in), out))
}
extern "C" void probe_float_to_half(int isa, int64_t n, const float* in, uint16_t* out) {
  CALL(isa, narrow(n, in, reinterpret_cast<Float16*>(out)))
}
extern "C" void probe_float_to_bfloat16(int isa, int64_t n, const float* in, uint16_t* out) {
  CALL(isa, narrow(n, in, reinterpret_cast<BFloat16*>(out)))
}
