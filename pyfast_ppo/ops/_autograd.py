"""What fused operations do in place of a second derivative: refuse it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def first_order_only(backward: Callable) -> Callable:
    """For the ``backward`` of an autograd.Function: its result cannot be differentiated again.

    torch's ``once_differentiable`` refuses that only where the incoming gradient itself requires one. A penalty on the
    gradient would silently get no gradient.
    """

    @functools.wraps(backward)
    def without_graph(ctx, *grads: Tensor):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return results
        anchor = torch.empty(0, requires_grad=True)  # makes the results require a gradient, whatever else does
        return tuple(_Refuse.apply(anchor, r) if isinstance(r, Tensor) else r for r in results)

    return without_graph


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "a fused operation of pyfast_ppo has no second derivative; ppo_loss_reference, or the gaussian functions "
            "with backend='eager', have one"
        )
