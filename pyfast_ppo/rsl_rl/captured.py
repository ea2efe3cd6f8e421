"""An update as a CUDA graph: recorded once, then replayed with one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Graph:
    """A CUDA graph. What is recorded must not wait for the device, and does nothing until it is replayed."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Result]) -> Result:
        """Records what ``work`` launches, and returns what it returns: tensors that each replay fills anew."""
        with torch.cuda.graph(self._graph):
            return work()

    def replay(self) -> None:
        """Runs it on the current stream."""
        self._graph.replay()


class Captured(Generic[Result]):
    """Runs the same work again and again, by a graph as soon as it can.

    All that the work reads lies in the same memory each time, as far as the caller can tell: ``key`` tells what a graph
    freezes (addresses, shapes, numbers on the host). While the key changes from call to call the work runs as it is,
    and so it does the first time, in which kernels are loaded and memory is allocated; with the key of the call before
    it is recorded, and replayed from then on. If it cannot be recorded it runs as it is for good, and the log says why.
    """

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._result: Result | None = None
        self._key: Hashable = None
        self.reason: str | None = None  # why it is not recorded
        self.num_records = 0

    def run(self, work: Callable[[], Result], key: Callable[[], Hashable]) -> Result:
        """The result of the work, done now: with a graph, the same objects as in the call before."""
        if self.reason is not None:
            return work()
        if (present := key()) != self._key:
            self._graph = self._result = None
            self._key = present
            return work()
        if self._graph is None and not self._record(work):
            return work()
        self._graph.replay()
        return self._result

    def give_up(self, reason: str) -> None:
        """The work runs as it is from now on."""
        self._graph = self._result = None
        self.reason = reason
        logger.warning("The update runs without a CUDA graph: %s.", reason)

    def _record(self, work: Callable[[], Result]) -> bool:
        graph = Graph()
        try:
            self._result = graph.record(work)
        except RuntimeError as error:  # CUDA's errors are RuntimeErrors, too
            self.give_up(f"it cannot be recorded ({str(error).splitlines()[0]})")
            return False
        self._graph = graph
        self.num_records += 1
        return True
