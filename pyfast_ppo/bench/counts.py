"""What one call does, counted with torch's profiler: launches, host syncs, and the memory that it holds at most."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_GPU_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaGraphLaunch",
)
_GPU_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_CALL = "pyfast_ppo call"
_CPU_SYNC = "aten::_local_scalar_dense"
_READS_ON_THE_CPU_ONLY = ("Optimizer.step#", "aten::std")  # what they read there is no wait where there is a GPU


@dataclass(frozen=True)
class Counts:
    """See ``harness.METHOD`` for what is counted on which device."""

    launches: int
    syncs: int
    peak_bytes: int | None  # None: not known


@dataclass(frozen=True)
class Work:
    """Of one line of a profile; see ``operations.py``."""

    launches: int
    syncs: int
    moved_bytes: int


def count(call: Callable[[], object], device: str) -> Counts:
    """Counts one call, which should have been made before: a first call compiles, allocates and looks around."""
    return _count_on_gpu(call) if device == "cuda" else _count_on_cpu(call)


def _count_on_gpu(call: Callable[[], object]) -> Counts:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    names = _cuda_names(call)
    peak = torch.cuda.max_memory_allocated() - before
    launches = sum(name in _GPU_LAUNCHES for name in names)
    return Counts(launches, sum(name in _GPU_SYNCS for name in names), peak)


def cuda_calls(call: Callable[[], object]) -> list[str]:
    """What one call asks of CUDA, each name with what it counts as: shows when another CUDA has other names."""
    return [
        f"{number} {name} ({'launch' if name in _GPU_LAUNCHES else 'sync' if name in _GPU_SYNCS else 'not counted'})"
        for name, number in Counter(_cuda_names(call)).items()
    ]


def _cuda_names(call: Callable[[], object]) -> list[str]:
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with silent(), profile(activities=activities) as found, record_function(_CALL):
        call()
    return _names_within_call(found.profiler.kineto_results.events())


def _names_within_call(events: list) -> list[str]:
    """Of CUDA's functions, without the profiler's own wait for the device, which comes after the call."""
    on_host = [e for e in events if e.device_type() == DeviceType.CPU]
    (end,) = [e.start_ns() + e.duration_ns() for e in on_host if e.name() == _CALL]
    return [e.name() for e in on_host if e.name().startswith("cu") and e.start_ns() <= end]


def _count_on_cpu(call: Callable[[], object]) -> Counts:
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    operations = [e for e in events if e.name().startswith("aten::")]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    free = [
        (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith(_READS_ON_THE_CPU_ONLY)
    ]
    reads = [e.start_ns() for e in operations if e.name() == _CPU_SYNC]
    syncs = sum(not any(start <= read <= end for start, end in free) for read in reads)
    return Counts(_leaves(operations), syncs, peak)


@contextmanager
def silent() -> Iterator[None]:
    """The profiler's library writes to the standard error by itself, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _leaves(operations: list) -> int:
    """Operations with no other one inside of them."""
    ordered = sorted(operations, key=lambda e: (e.start_thread_id(), e.start_ns(), -e.duration_ns()))
    holding = sum(
        a.start_thread_id() == b.start_thread_id() and b.start_ns() < a.start_ns() + a.duration_ns()
        for a, b in pairwise(ordered)
    )
    return len(ordered) - holding
