// What a kernel knows of a tensor: an address, an element type, two strides.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/elementary.h"

namespace pyfast_ppo {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kUInt8 = 4 };

// A matrix in memory; strides count elements. row_stride 0: one row shared by all.
struct View {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

// A contiguous output matrix.
struct Output {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// A number, or a tensor's first element, read when the kernel runs.
struct Coefficient {
  const void* data = nullptr;  // null: the number counts
  DType dtype = DType::kFloat64;
  double number = 0.0;
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Element>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::kFloat64;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}
template <>
constexpr DType dtype_of<Float16>() {
  return DType::kFloat16;
}

constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : (dtype == DType::kUInt8 ? 1 : 2));
}

PYFAST_PPO_INLINE float to_float(float x) { return x; }
PYFAST_PPO_INLINE double to_float(double x) { return x; }
PYFAST_PPO_INLINE float to_float(uint8_t x) { return x; }
PYFAST_PPO_INLINE float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
PYFAST_PPO_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + 0x38000000u;  // the exponent is rebased
  // 2^-14 + m 2^-24 - 2^-14: no product of a subnormal, which a process that flushes those to zero would lose
  const uint32_t subnormal = float_bits(float_from_bits(magnitude + 0x38800000u) - 6.103515625e-05f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep an exponent of all ones
  const uint32_t finite = magnitude >= 0x00800000u ? normal : subnormal;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
}

PYFAST_PPO_INLINE void from_float(float x, float* out) { *out = x; }
PYFAST_PPO_INLINE void from_float(double x, double* out) { *out = x; }
PYFAST_PPO_INLINE void from_float(double x, float* out) { *out = static_cast<float>(x); }
PYFAST_PPO_INLINE void from_float(float x, double* out) { *out = x; }
PYFAST_PPO_INLINE void from_float(float x, BFloat16* out) {  // round to nearest, ties to even
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
PYFAST_PPO_INLINE void from_float(float x, Float16* out) {  // round to nearest, ties to even
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // below 2^-14 the addition of 1/2 makes the hardware round at the subnormals' last place
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  out->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}
PYFAST_PPO_INLINE void from_float(double x, BFloat16* out) { from_float(static_cast<float>(x), out); }
PYFAST_PPO_INLINE void from_float(double x, Float16* out) { from_float(static_cast<float>(x), out); }

// One element of any type; index counts elements.
template <class T>
PYFAST_PPO_INLINE T read_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<T>(static_cast<const float*>(data)[index]);
    case DType::kFloat64:
      return static_cast<T>(static_cast<const double*>(data)[index]);
    case DType::kBFloat16:
      return static_cast<T>(to_float(static_cast<const BFloat16*>(data)[index]));
    case DType::kFloat16:
      return static_cast<T>(to_float(static_cast<const Float16*>(data)[index]));
    default:
      return static_cast<T>(static_cast<const uint8_t*>(data)[index]);
  }
}

PYFAST_PPO_INLINE double value_of(const Coefficient& coefficient) {
  return coefficient.data == nullptr ? coefficient.number
                                     : read_element<double>(coefficient.data, coefficient.dtype, 0);
}

// No output is one of bytes.
template <class T>
PYFAST_PPO_INLINE void write_element(const Output& output, int64_t index, T x) {
  switch (output.dtype) {
    case DType::kFloat32:
      return from_float(x, static_cast<float*>(output.data) + index);
    case DType::kFloat64:
      return from_float(x, static_cast<double*>(output.data) + index);
    case DType::kBFloat16:
      return from_float(x, static_cast<BFloat16*>(output.data) + index);
    default:
      return from_float(x, static_cast<Float16*>(output.data) + index);
  }
}

}  // namespace pyfast_ppo
