"""Scratch memory of the GPU kernels: allocated once, kept for the next call."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Partial sums of a launch, and the counter by which its last block knows itself: 0 between launches."""

    def __init__(self, device: torch.device, size: int, dtype: torch.dtype) -> None:
        self.size = size
        self.partials: Tensor = torch.empty(size, dtype=dtype, device=device)
        self.counter: Tensor = torch.zeros(1, dtype=torch.int32, device=device)


class ScratchPool:
    """One ``Scratch`` per device, stream and dtype. A captured graph gets its own: it may be replayed on any stream."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int | None, int, torch.dtype], Scratch] = {}

    def get(self, device: torch.device, stream: int, size: int, dtype: torch.dtype, keep: bool) -> Scratch:
        """At least ``size`` numbers. ``keep=False``: for this call alone, whatever allocates memory for it."""
        # nothing can be captured on stream 0, the default one
        if not keep or (stream and torch.cuda.is_current_stream_capturing()):
            return Scratch(device, size, dtype)
        key = (device.index, stream, dtype)
        scratch = self.kept.get(key)
        if scratch is None or scratch.size < size:
            scratch = self.kept[key] = Scratch(device, size, dtype)
        return scratch


def current_stream(device: torch.device) -> int:
    """The device's current stream as CUDA's handle; 0 on the CPU."""
    # torch.cuda.current_stream() makes an object around this number, which takes ten times as long
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
