"""A CUDA graph: what was launched once, launched again at once."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Graph:
    """A CUDA graph. What is recorded must not wait for the device, and does nothing until it is replayed."""

    def __init__(self, device: torch.device, neighbour: Graph | None = None) -> None:
        """``neighbour``: a graph that never runs at the same time, whose temporary memory this one may use."""
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._graph = torch.cuda.CUDAGraph()
        self._pool: Any = torch.cuda.graph_pool_handle() if neighbour is None else neighbour._pool
        self._is_first = neighbour is None

    def record(self, work: Callable[[], Result]) -> Result:
        """Records what ``work`` launches, and returns what it returns: tensors that each replay fills anew.

        ``torch.cuda.graph`` would do, were it not that after work that cannot be recorded it leaves the thread on
        another stream and torch's random numbers unusable (before 2.12), and that its first recording within
        ``inference_mode`` forbids those outside of it (before 2.11).
        """
        collects_garbage = gc.isenabled()
        with torch.cuda.device(self._device), torch.cuda.stream(_stream_to_record(self._device)):
            torch.cuda.synchronize()
            if self._is_first:  # a graph's memory is its own: what torch keeps in reserve is none for it
                torch.cuda.empty_cache()
            gc.disable()  # a collected tensor of another library would free its memory, which invalidates the recording
            try:
                return self._record(work)
            finally:
                if collects_garbage:
                    gc.enable()

    def _record(self, work: Callable[[], Result]) -> Result:
        with torch.inference_mode(False):
            # of this thread alone: a simulator's or NCCL's may call CUDA meanwhile
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            return work()
        finally:
            try:
                self._graph.capture_end()
            except RuntimeError:
                self._forget_recording()
                raise

    def _forget_recording(self) -> None:
        """Before 2.12, a recording that fails goes on for torch's allocator and its random numbers."""
        _failed.append(self._graph)
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")  # that the graph is empty
            with contextlib.suppress(RuntimeError):  # there is nothing to end since 2.12
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            empty = torch.cuda.CUDAGraph()
            with torch.inference_mode(False):
                empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()

    def replay(self) -> None:
        """Runs it on the current stream."""
        self._graph.replay()


_failed: list[torch.cuda.CUDAGraph] = []  # torch's allocator may point at them for good


@cache
def _stream_to_record(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
