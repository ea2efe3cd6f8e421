"""Work that is done again and again as CUDA graphs: recorded once, then replayed with one launch each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Graph:
    """A CUDA graph. What is recorded must not wait for the device, and does nothing until it is replayed."""

    def __init__(self, neighbour: Graph | None = None) -> None:
        """``neighbour``: a graph that never runs at the same time, whose temporary memory this one may use."""
        self._graph = torch.cuda.CUDAGraph()
        self._pool = None if neighbour is None else neighbour._graph.pool()

    def record(self, work: Callable[[], Result]) -> Result:
        """Records what ``work`` launches, and returns what it returns: tensors that each replay fills anew."""
        # of this thread alone: a simulator's or NCCL's may call CUDA meanwhile
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
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

    Several pieces of work, one after the other, have a slot each, and the key in common.
    """

    def __init__(self, subject: str) -> None:
        """``subject``: what the log calls the work."""
        self._subject = subject
        self._graphs: dict[Hashable, tuple[Graph, Result]] = {}
        self._seen: set[Hashable] = set()  # slots that have run with the present key
        self._key: Hashable = None
        self.reason: str | None = None  # why it is not recorded
        self.num_records = 0

    def run(self, work: Callable[[], Result], key: Callable[[], Hashable], slot: Hashable = None) -> Result:
        """The result of the work, done now: with a graph, the same objects as in the call before."""
        if self.reason is not None:
            return work()
        if (present := key()) != self._key:
            self._forget()
            self._key = present
        if slot not in self._seen:
            self._seen.add(slot)
            return work()
        if slot not in self._graphs and not self._record(work, slot):
            return work()
        graph, result = self._graphs[slot]
        graph.replay()
        return result

    def give_up(self, reason: str) -> None:
        """The work runs as it is from now on."""
        self._forget()
        self.reason = reason
        logger.warning("%s runs without a CUDA graph: %s.", self._subject, reason)

    def _forget(self) -> None:
        self._graphs.clear()
        self._seen.clear()

    def _record(self, work: Callable[[], Result], slot: Hashable) -> bool:
        graph = Graph(next((graph for graph, _ in self._graphs.values()), None))
        try:
            result = graph.record(work)
        except RuntimeError as error:  # CUDA's errors are RuntimeErrors, too
            self.give_up(f"it cannot be recorded ({str(error).splitlines()[0]})")
            return False
        self._graphs[slot] = graph, result
        self.num_records += 1
        return True


def addresses(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> tuple:
    """Where these tensors and the modules' parameters and buffers lie, their shapes, and which take gradients."""
    in_modules = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return tuple((t.data_ptr(), t.shape, t.requires_grad) for t in (*in_modules, *tensors))


def modes(modules: Iterable[nn.Module]) -> tuple[bool, ...]:
    """Which parts are in training mode."""
    return tuple(part.training for module in modules for part in module.modules())
