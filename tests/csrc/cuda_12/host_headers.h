// What the .cu files take from the host's headers, for NVRTC: it knows neither the standard library nor host code. The
// launchers are compiled as device code (-default-device), so that they name the kernels that there have to be.
#pragma once

using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

namespace std {

using ::memcpy;

class string;  // only named

inline float copysign(float x, float y) { return ::copysignf(x, y); }
inline float fabs(float x) { return ::fabsf(x); }
inline double fabs(double x) { return ::fabs(x); }
inline float exp(float x) { return ::expf(x); }
inline double exp(double x) { return ::exp(x); }
inline float expm1(float x) { return ::expm1f(x); }
inline double expm1(double x) { return ::expm1(x); }
inline float log(float x) { return ::logf(x); }
inline double log(double x) { return ::log(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline double sqrt(double x) { return ::sqrt(x); }

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float min() { return 0x1p-126f; }
  static constexpr float max() { return 0x1.fffffep127f; }
  static float quiet_NaN() { return __int_as_float(0x7fc00000); }
  static float infinity() { return __int_as_float(0x7f800000); }
};
template <>
struct numeric_limits<double> {
  static constexpr double min() { return 0x1p-1022; }
  static constexpr double max() { return 0x1.fffffffffffffp1023; }
  static double quiet_NaN() { return __longlong_as_double(0x7ff8000000000000); }
  static double infinity() { return __longlong_as_double(0x7ff0000000000000); }
};

template <bool kCondition, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool kCondition, class A, class B>
using conditional_t = typename conditional<kCondition, A, B>::type;

}  // namespace std
