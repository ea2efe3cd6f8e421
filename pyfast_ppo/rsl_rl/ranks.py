"""Numbers of one process of several, and of all of them together."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_ranks(x: Tensor, world_size: int) -> Tensor:
    """The mean of what the processes have; each gets the same bits. Not in place."""
    if world_size == 1:
        return x
    total = x.clone()
    torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
    return total / world_size


def from_first_rank(x: Tensor, world_size: int) -> Tensor:
    """What the first process has, in place: rsl_rl's learning rate is decided there, too."""
    if world_size > 1:
        torch.distributed.broadcast(x, src=0)
    return x


def standardized_over_ranks(x: Tensor, world_size: int) -> Tensor:
    """(x - mean) / (std + 1e-8) with mean and unbiased std over all processes, which have equally many elements."""
    mean = mean_over_ranks(x.mean(), world_size)
    count = x.numel() * world_size
    variance = mean_over_ranks((x - mean).square().sum(), world_size) * world_size / (count - 1)
    return (x - mean) / (variance.sqrt() + 1e-8)
