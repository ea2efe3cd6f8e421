#pragma once

#include <pybind11/pybind11.h>

namespace pyfast_ppo::cuda {

// Defines the CUDA operations in a Python module.
void bind(pybind11::module_ m);

}  // namespace pyfast_ppo::cuda
