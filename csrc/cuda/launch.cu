#include "launch.cuh"

#include <mutex>
#include <vector>

namespace pyfast_ppo::cuda {

namespace {

// Does nothing: whether it can be found says whether this binary has code for the GPU.
__global__ void probe_kernel() {}

int num_processors(int device) {
  static std::mutex mutex;
  static std::vector<int> known;  // by device; 0: not asked yet
  const std::lock_guard<std::mutex> lock(mutex);
  if (device >= static_cast<int>(known.size())) known.resize(static_cast<size_t>(device) + 1, 0);
  int& count = known[static_cast<size_t>(device)];
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  }
  return count;
}

}  // namespace

int64_t resident_blocks(int device, int blocks_per_processor) {
  return static_cast<int64_t>(num_processors(device)) * blocks_per_processor;
}

std::string unavailable_reason() {
  int driver = 0, runtime = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver) {
    return "the driver is too old: it is for CUDA " + version(driver) + ", the kernels were built with CUDA " +
           version(runtime) + "; update the driver";
  }
  const auto says = [](cudaError_t error) { return std::string("CUDA says: ") + cudaGetErrorString(error); };
  if (status != cudaSuccess) return says(status);
  if (devices == 0) return "there is no GPU";
  cudaFuncAttributes attributes;
  const cudaError_t found = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (found == cudaSuccess) return "";
  cudaGetLastError();
  switch (found) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
      return std::string("the kernels were not built for this GPU (") + cudaGetErrorString(found) +
             "); install again with PYFAST_PPO_CUDA_ARCHS=native";
    default:  // another process has the GPU for itself, no memory is left on it, ...
      return says(found);
  }
}

}  // namespace pyfast_ppo::cuda
