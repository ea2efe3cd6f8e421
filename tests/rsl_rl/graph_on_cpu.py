"""A CUDA graph, as far as PyTorch's operators can tell, on the CPU: what is recorded runs again on the same memory.

As on a GPU, recording computes nothing that lasts: what the work changes is put back. As on a GPU, a number on the host
is frozen, and asking for a value is an error. Kernels that PyTorch does not see, as those of pyfast_ppo's own backends,
cannot be recorded: the backend has to be "eager".

Two streams are two sequences of operators that wait for each other where they were told to, and nowhere else: a replay
runs the one that is ``ahead`` as far as it may go.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyfast_ppo.rsl_rl import FusedPPO, captured, streams

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")


class StreamOnCpu:
    """Stands in for ``torch.cuda.Stream``: what was recorded for it, in order."""

    current: ClassVar[StreamOnCpu]
    recorder: ClassVar[Recorder | None] = None

    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: StreamOnCpu) -> None:
        recorder = StreamOnCpu.recorder
        assert recorder is not None
        recorder.of(self).append(len(recorder.of(other)))


class WaitsOnCpu(TorchDispatchMode):
    """Stands in for ``captured.Waits``."""

    def __init__(self) -> None:
        super().__init__()
        self.where: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS and self.where is None:
            self.where = name
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Keeps every operator with the very tensors that it got and gave."""

    def __init__(self) -> None:
        super().__init__()
        # a call, or the number of the other stream's items that have to be done before
        self.items: dict[StreamOnCpu, list[Any]] = {StreamOnCpu.current: []}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that was there before it was written to
        self._made: set[int] = set()  # memory that was made while recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        written = [
            a
            for argument, a in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for t in tree_leaves(written):
            memory = t.untyped_storage().data_ptr()
            if memory not in self._made and memory not in self.before:
                self.before[memory] = (t, t.clone() if t.is_contiguous() else t.contiguous().clone())
        out = func(*args, **kwargs)
        self._made |= {t.untyped_storage().data_ptr() for t in tensors_of(out)} - self.memory_of(args, kwargs)
        self.of(StreamOnCpu.current).append((func, args, kwargs, out))
        return out

    def of(self, stream: StreamOnCpu) -> list[Any]:
        return self.items.setdefault(stream, [])

    def memory_of(self, *trees: Any) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tensors_of(trees)} - self._made


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class GraphOnCpu:
    """Stands in for ``captured.Graph``."""

    recorded: ClassVar[list[GraphOnCpu]] = []
    ahead: ClassVar[int] = 0  # the stream that a replay runs as far as it may go: the first, or the second

    def __init__(self, device: torch.device, neighbour: GraphOnCpu | None = None) -> None:
        self.streams: list[list[Any]] = []
        self.num_replays = 0
        GraphOnCpu.recorded.append(self)

    def record(self, work: Callable[[], Any]) -> Any:
        random_state = torch.get_rng_state()
        StreamOnCpu.recorder = Recorder()
        try:
            with StreamOnCpu.recorder as recorder:
                result = work()
        finally:
            StreamOnCpu.recorder = None
        torch.set_rng_state(random_state)
        self.streams = list(recorder.items.values())
        with torch.no_grad():
            for t, before in recorder.before.values():
                t.copy_(before)
        return result

    def replay(self) -> None:
        self.num_replays += 1
        done = [0] * len(self.streams)
        order = sorted(range(len(done)), key=lambda i: i != GraphOnCpu.ahead)
        with torch.no_grad():
            while (i := next((i for i in order if self._may_go_on(i, done)), None)) is not None:
                if isinstance(item := self.streams[i][done[i]], tuple):
                    self._run(*item)
                done[i] += 1
        assert done == list(map(len, self.streams)), "streams wait for each other"

    def _may_go_on(self, i: int, done: list[int]) -> bool:
        if done[i] == len(self.streams[i]):
            return False
        item = self.streams[i][done[i]]
        return isinstance(item, tuple) or done[1 - i] >= item

    @staticmethod
    def _run(func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        new = func(*args, **kwargs)
        if func.namespace == "c10d":  # the last of what a collective gives is to be waited for
            new[-1].wait()
        for t, value in zip(tensors_of(out), tensors_of(new), strict=True):
            if t.data_ptr() != value.data_ptr():
                t.copy_(value)


def use_graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[GraphOnCpu]:
    """FusedPPO takes the CPU for a device with graphs. Returns the list to which they will be added."""
    GraphOnCpu.recorded = []
    StreamOnCpu.current = StreamOnCpu()
    monkeypatch.setattr(captured, "Graph", GraphOnCpu)
    monkeypatch.setattr(captured, "Waits", WaitsOnCpu)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_current_stream_capturing=lambda: StreamOnCpu.recorder is not None,
        current_stream=lambda: StreamOnCpu.current,
        set_stream=lambda stream: setattr(StreamOnCpu, "current", stream),
        Stream=StreamOnCpu,
    )
    monkeypatch.setattr(streams, "torch", SimpleNamespace(cuda=cuda))
    real = FusedPPO._reason_rollout_not_captured

    def as_on_a_gpu(self: FusedPPO) -> str | None:
        reason = real(self)
        if reason == "the device is cpu":
            device, self.device = self.device, "cuda"
            reason = real(self)
            self.device = device
        return reason

    monkeypatch.setattr(FusedPPO, "_reason_rollout_not_captured", as_on_a_gpu)
    return GraphOnCpu.recorded
