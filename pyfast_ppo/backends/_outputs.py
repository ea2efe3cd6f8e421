"""Memory for what a kernel writes."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_of(t: Tensor) -> Tensor:
    # the plain call is the faster one; it keeps strides that are not contiguous
    return torch.empty_like(t) if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)


def gradient_of_both(t: Tensor, other: Tensor) -> Tensor:
    """For a gradient that both tensors get, up to its sign: of a dtype that loses nothing for either."""
    return torch.empty(t.shape, dtype=torch.promote_types(t.dtype, other.dtype), device=t.device)
