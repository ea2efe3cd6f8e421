"""Triton's kernels, compiled for a GPU that is not there, as the ``triton`` backend for CPU tensors.

Everything is as on a GPU up to the launch: the JIT, what it specialises on, the compilation. Then ``machine.cpp`` runs
the PTX. To be imported where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import torch
import triton
from ptx import Kernel, packed
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pyfast_ppo.backends import triton as backend
from pyfast_ppo.backends._scratch import ScratchPool


class Driver:
    """What the JIT asks about a GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class TritonOnPtx:
    """Takes the place of Triton's launcher.

    Attributes:
        num_processors: What the backend believes to find; it sets how many programs there are.
        seed: Of the order in which warps and blocks take turns.
        launches: In order: (name, PTX kernel, counts of the run).
        read: The kernels that were compiled, by their PTX.
        change: Applied to each PTX kernel before it runs.
    """

    def __init__(self, machine: ModuleType, capability: int = 90) -> None:
        self._machine = machine
        self.read: dict[str, Kernel] = {}
        self.num_processors = 4
        self.seed = 0
        self.launches: list[tuple[str, Kernel, Any]] = []
        self.change = lambda kernel: kernel
        triton.runtime.driver.set_active(Driver(capability))
        self._compile = functools.partial(JITFunction.run, warmup=True)
        launcher = self

        def run(function: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
            return launcher._run(function, args, grid, options)

        JITFunction.run = run
        backend.DEVICE_TYPE = "cpu"
        backend.FOR_TESTS_ONLY = True
        backend.unavailable_reason = functools.wraps(backend.unavailable_reason.__wrapped__)(lambda: None)
        backend.detail = lambda: f"Triton {triton.__version__}, PTX on the CPU, for tests"
        backend._num_processors = lambda device: self.num_processors

    def __enter__(self) -> TritonOnPtx:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def forget_tensors(self) -> None:
        """Those of a launch are its arguments; nothing else is kept."""

    def forget_scratch(self) -> None:
        backend._scratch = ScratchPool()

    def _run(self, function: JITFunction, args: tuple, grid: tuple[int, ...], options: dict[str, Any]) -> Any:
        compiled = self._compile(function, *args, grid=grid, **options)
        text = compiled.asm["ptx"]
        if text not in self.read:
            self.read[text] = Kernel(self._machine, text)
        kernel = self.change(self.read[text])
        names = [p.name for p in function.params]
        bound = inspect.signature(function.fn).bind(*args, **{k: v for k, v in options.items() if k in names})
        passed = [v for name, v in bound.arguments.items() if compiled.src.signature[name] != "constexpr"]
        # behind them: memory for Triton's own use, which these kernels do not ask for
        arguments = packed(kernel.parameters, [*passed, 0, 0])
        tensors = [v for v in passed if isinstance(v, torch.Tensor)]
        counts = kernel.run(
            grid[0],
            32 * compiled.metadata.num_warps,
            arguments,
            tensors,
            dynamic_shared=compiled.metadata.shared,
            seed=self.seed,
        )
        self.launches.append((function.fn.__name__, kernel, counts))
        return compiled
