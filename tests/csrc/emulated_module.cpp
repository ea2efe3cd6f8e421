// The CUDA operations on the CPU, as a Python module: its kernels are compiled against tests/csrc/emulation.
#include <cuda_runtime.h>

#include "cuda/bindings.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
  pyfast_ppo::cuda::bind(m);
  // false: kernels are launched, but do nothing; for measuring what a launch costs the host
  m.def("run_kernels", [](bool run) { emulation::Machine::get().idle = !run; });
}
