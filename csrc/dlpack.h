// The part of DLPack's C interface by which a library lets others look into its tensors without a Python call
// (https://dmlc.github.io/dlpack/latest/c_api.html, version 1.2). torch >= 2.10 offers it.
#pragma once

#include <cstdint>

namespace pyfast_ppo::dlpack {

struct Device {
  int32_t type;
  int32_t id;
};

constexpr int32_t kCpu = 1, kCuda = 2;  // types of devices

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major_version, minor_version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null; -1 with a Python exception set
  void* current_work_stream;
};

constexpr char kCapsule[] = "dlpack_exchange_api", kAttribute[] = "__dlpack_c_exchange_api__";
constexpr uint32_t kMajorVersion = 1;

}  // namespace pyfast_ppo::dlpack
