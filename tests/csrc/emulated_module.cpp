// The CUDA operations on the CPU, as a Python module: its kernels are compiled against tests/csrc/emulation.
#include <cuda_runtime.h>

#include "cuda/bindings.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
  pyfast_ppo::cuda::bind(m);
  // false: kernels are launched, but do nothing; for measuring what a launch costs the host
  m.def("run_kernels", [](bool run) { emulation::Machine::get().idle = !run; });
  // the numbers of CUDA's errors (0: none), the driver's version, and how many GPUs there are
  m.def(
      "pretend",
      [](int launch, int devices, int code, int driver, int num_devices) {
        emulation::pretence = {static_cast<cudaError_t>(launch), static_cast<cudaError_t>(devices),
                               static_cast<cudaError_t>(code), driver, num_devices};
      },
      pybind11::arg("launch") = 0, pybind11::arg("devices") = 0, pybind11::arg("code") = 0,
      pybind11::arg("driver") = 13000, pybind11::arg("num_devices") = 1);
}
