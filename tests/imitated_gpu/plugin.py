"""A plugin of pytest, for a process with the imitated CUDA libraries: tests find a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_on_cpu
import imitation
import native_module
import pytest
import torch

from pyfast_ppo.backends import cuda

torch.backends.cudnn.enabled = False  # there is none
seed_the_cpu = torch.manual_seed


def seed_both(seed: int) -> torch.Generator:
    imitation.manual_seed(seed)
    return seed_the_cpu(seed)


torch.manual_seed = seed_both
INCLUDES = [cuda_on_cpu.CSRC, cuda_on_cpu.TESTS]
cuda._cuda = imitation.EmulatedBackend(
    native_module.load("cuda_on_cpu", cuda_on_cpu.SOURCES, INCLUDES, [INCLUDES[0], INCLUDES[1] / "emulation"])
)
cuda.unavailable_reason = lambda: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    with imitation.ImitatedKernels():
        result = yield
    imitation.raise_what_failed()
    return result
