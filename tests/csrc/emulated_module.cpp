// The CUDA operations on the CPU, as a Python module: its kernels are compiled against tests/csrc/emulation.
#include "cuda/bindings.h"

PYBIND11_MODULE(cuda_on_cpu, m) { pyfast_ppo::cuda::bind(m); }
