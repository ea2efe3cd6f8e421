// What the objects of csrc/cuda know once they are linked with a CUDA runtime.
#include <cuda_runtime_api.h>

#include "cuda/launch.h"

#define SHOWN extern "C" __attribute__((visibility("default")))

SHOWN int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

SHOWN const char* unavailable_reason() {
  static const std::string reason = pyfast_ppo::cuda::unavailable_reason();
  return reason.c_str();
}
