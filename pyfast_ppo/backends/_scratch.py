"""Scratch memory of the GPU kernels: allocated once, kept for the next call."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Partial sums of a launch, and the counter by which its last block knows itself: 0 between launches.

    Or several counters, if there is a last block for each of several parts of the work.
    """

    def __init__(
        self, device: torch.device, size: int, dtype: torch.dtype, num_counters: int, counter: Tensor | None = None
    ) -> None:
        self.size = size
        self.partials: Tensor = torch.empty(size, dtype=dtype, device=device)
        self.counter: Tensor = (
            torch.zeros(num_counters, dtype=torch.int32, device=device) if counter is None else counter
        )


class Counters:
    """Counters for launches within CUDA graphs, their own for each, zeroed here: else each replay would have to.

    They are not given back: who destroys a graph does not tell.
    """

    NUM = 16384
    _STEP = 4  # 16 bytes, so that kernels find each aligned as an allocation is

    def __init__(self, device: torch.device) -> None:
        self._all = torch.zeros(self.NUM * self._STEP, dtype=torch.int32, device=device)
        self._num_taken = 0

    def take(self, count: int) -> Tensor | None:
        """Int32 [count], or None if there are no more."""
        num_steps = -(-count // self._STEP)
        if self._num_taken + num_steps > self.NUM:
            return None
        first = self._num_taken * self._STEP
        self._num_taken += num_steps
        return self._all[first : first + count]


class ScratchPool:
    """One ``Scratch`` per device, stream and dtype. A captured graph gets its own: it may be replayed on any stream."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int | None, int, torch.dtype], Scratch] = {}
        self._counters: dict[torch.device, Counters] = {}

    def get(
        self, device: torch.device, stream: int, size: int, dtype: torch.dtype, keep: bool, num_counters: int = 1
    ) -> Scratch:
        """At least ``size`` numbers, and ``num_counters`` counters.

        ``keep=False``: for this call alone, whatever allocates memory for it.
        """
        # nothing can be captured on stream 0, the default one
        if stream and torch.cuda.is_current_stream_capturing():
            counters = self._counters.get(device)
            return Scratch(device, size, dtype, num_counters, None if counters is None else counters.take(num_counters))
        if not keep:
            return Scratch(device, size, dtype, num_counters)
        key = (device.index, stream, dtype)
        scratch = self.kept.get(key)
        if scratch is None or scratch.size < size or len(scratch.counter) < num_counters:
            if scratch is not None:  # enough for each of those who take turns
                size, num_counters = max(size, scratch.size), max(num_counters, len(scratch.counter))
            scratch = self.kept[key] = Scratch(device, size, dtype, num_counters)
            if device not in self._counters:
                self._counters[device] = Counters(device)
        return scratch


def current_stream(device: torch.device) -> int:
    """The device's current stream as CUDA's handle; 0 on the CPU."""
    # torch.cuda.current_stream() makes an object around this number, which takes ten times as long
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
