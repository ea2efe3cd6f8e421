"""What a library's loss is reduced to: a forward pass, and the tensors that get its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossAndLeaves:
    """``leaves``: mean [N, A], std or log std [A], values [N, 1]."""

    loss: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    std_is_logarithm: bool

    def gradients(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One forward and one backward pass."""
        loss = self.loss()
        return loss, torch.autograd.grad(loss, self.leaves)


def log_of(std: Tensor) -> Tensor:
    """The leaf of a library that learns the logarithm of the std."""
    return std.detach().log().requires_grad_()
