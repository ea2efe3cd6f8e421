"""Where there is no GPU, the CUDA kernels are compiled for the CPU (tests/csrc/emulation), through the same tests."""

from __future__ import annotations

from types import ModuleType

import native_module

from pyfast_ppo.backends import cuda

CSRC, TESTS = native_module.ROOT / "csrc", native_module.ROOT / "tests" / "csrc"
SOURCES = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "cuda" / "bindings.cpp", TESTS / "emulated_module.cpp"]
ORIGINAL = {"unavailable_reason": cuda.unavailable_reason}


def install() -> ModuleType:
    """Makes the emulated kernels the ``cuda`` backend, for CPU tensors. Returns them."""
    cuda._cuda = native_module.load("cuda_on_cpu", SOURCES, [CSRC, TESTS], [CSRC, TESTS / "emulation"])
    cuda.DEVICE_TYPE = "cpu"
    cuda.FOR_TESTS_ONLY = True
    cuda.unavailable_reason = lambda: None
    cuda.detail = lambda: "emulated on the CPU, for tests"
    return cuda._cuda
