"""What fused operations do in place of a second derivative: refuse it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def first_order_only(backward: Callable) -> Callable:
    """For the ``backward(ctx, saved, *grads)`` of an autograd.Function: its result cannot be differentiated again.

    torch's ``once_differentiable`` refuses that only where the incoming gradient itself requires one. A penalty on the
    gradient would silently get no gradient.

    ``saved`` are the saved tensors, which checkpointing allows to be unpacked only once. The Function's inputs are
    found among them, or in ``ctx.inputs`` where it saves none of them.
    """

    @functools.wraps(backward)
    def without_graph(ctx, *grads: Tensor | None):
        saved = ctx.saved_tensors
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return results
        # Who asks for the derivative by some tensors alone has autograd run only what leads to them: so each refusal
        # leads to all that the results depend on.
        candidates = (*saved, *getattr(ctx, "inputs", ()), *grads)
        parents = [t for t in candidates if isinstance(t, Tensor) and t.requires_grad]
        return tuple(_Refuse.apply(r, *parents) if isinstance(r, Tensor) else r for r in results)

    return without_graph


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, *parents: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "a fused operation of pyfast_ppo has no second derivative; ppo_loss_reference has one, and so have "
            "gaussian_log_prob, gaussian_entropy and gaussian_kl with backend='eager'"
        )
