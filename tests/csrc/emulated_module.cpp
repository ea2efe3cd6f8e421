// The CUDA operations on the CPU, as a Python module: its kernels are compiled against tests/csrc/emulation.
#include <cuda_runtime.h>

#include "cuda/bindings.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
  pyfast_ppo::cuda::bind(m);
  // called in place of each kernel: (its address, blocks, threads, [the bytes of each argument])
  m.def("launch_with", [](const pybind11::object& launcher) {
    const pybind11::handle kept = pybind11::object(launcher).release();  // for as long as the process lives
    emulation::launcher = [kept](uintptr_t kernel, unsigned blocks, unsigned threads,
                                 const std::vector<std::string>& arguments) {
      const pybind11::gil_scoped_acquire gil;
      pybind11::list bytes;
      for (const std::string& argument : arguments) bytes.append(pybind11::bytes(argument));
      kept(kernel, blocks, threads, bytes);
    };
  });
  // false: kernels are launched, but do nothing; for measuring what a launch costs the host
  m.def("run_kernels", [](bool run) { emulation::Machine::get().idle = !run; });
  m.def("num_launches", [] { return emulation::Machine::get().num_launches; });
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
