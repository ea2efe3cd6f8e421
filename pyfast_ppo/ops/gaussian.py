"""Log-probability, entropy and KL of diagonal Gaussians, one number per row, differentiable in every argument."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_ppo import backends, reference
from pyfast_ppo.ops import _arguments as arguments
from pyfast_ppo.ops._autograd import first_order_only


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor, *, backend: str | None = None) -> Tensor:
    """log N(actions; mean, std²), summed over the action dimensions.

    Args:
        actions: [N, A]; any leading dimensions.
        mean: [N, A].
        std: [A] or [N, A], > 0.
        backend: "cuda", "triton", "cpu", "eager", or None for the best that is available.

    Returns:
        [N], in nats. A second derivative is refused, except by the eager backend.

    Raises:
        ValueError, TypeError, RuntimeError: As ``ppo_loss``.
    """
    leading = arguments.check_matrix("mean", mean)
    device, shape = mean.device, mean.shape
    flat = (
        arguments.rows("actions", actions, shape, device),
        arguments.rows("mean", mean, shape, device),
        arguments.row_or_rows("std", std, shape, device),
    )
    return _apply("gaussian_log_prob", backend, device, flat).view(leading)


def gaussian_entropy(std: Tensor, *, backend: str | None = None) -> Tensor:
    """Entropy Σ log std + ½log(2πe) of a diagonal Gaussian, in nats.

    Args:
        std: [A] or [N, A] (any leading dimensions), > 0.
        backend: "cuda", "triton", "cpu", "eager", or None for the best that is available.

    Returns:
        0-dim for [A], else [N].
    """
    if not isinstance(std, Tensor):
        raise TypeError(f"std must be a tensor, got {type(std).__name__}")
    leading = arguments.check_matrix("std", std if std.dim() > 1 else std.unsqueeze(0))
    flat = arguments.rows("std", std, std.shape, std.device) if std.dim() > 1 else std.unsqueeze(0)
    arguments.check_tensor("std", std, std.device)
    entropy = _apply("gaussian_entropy", backend, std.device, (flat,))
    return entropy.view(leading) if std.dim() > 1 else entropy[0]


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor, *, backend: str | None = None) -> Tensor:
    """KL(p‖q) of two diagonal Gaussians: never negative, exactly 0 at equality, accurate however close p and q are.

    Σ ½[φ(2δ) + m²] with φ(x) = eˣ - 1 - x, δ = log(σ_p/σ_q), m = (μ_p - μ_q)/σ_q. The usual form, log σ_q/σ_p + … - ½,
    loses all digits near equality and goes negative.

    Args:
        mean_p: [N, A]; any leading dimensions.
        std_p: [A] or [N, A], > 0.
        mean_q: [N, A].
        std_q: [A] or [N, A], > 0.
        backend: "cuda", "triton", "cpu", "eager", or None for the best that is available.

    Returns:
        [N], in nats. A second derivative is refused, except by the eager backend.

    Raises:
        ValueError, TypeError, RuntimeError: As ``ppo_loss``.
    """
    leading = arguments.check_matrix("mean_p", mean_p)
    device, shape = mean_p.device, mean_p.shape
    flat = (
        arguments.rows("mean_p", mean_p, shape, device),
        arguments.row_or_rows("std_p", std_p, shape, device),
        arguments.rows("mean_q", mean_q, shape, device),
        arguments.row_or_rows("std_q", std_q, shape, device),
    )
    return _apply("gaussian_kl", backend, device, flat).view(leading)


def _apply(operation: str, backend: str | None, device: torch.device, flat: tuple[Tensor, ...]) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler sees the formula itself, and fuses it
        return _reference(operation, flat)
    run = backends.select(backend, device, reference.arithmetic_dtype(*flat))
    if run.name == "eager":
        return _reference(operation, flat)
    return _Gaussian.apply(run, operation, *flat)


def _reference(operation: str, flat: tuple[Tensor, ...]) -> Tensor:
    dtype = reference.arithmetic_dtype(*flat)
    return getattr(reference, operation)(*(reference.savable(t).to(dtype) for t in flat))


class _Gaussian(torch.autograd.Function):
    """Both passes are kernels: backward computes the terms anew, so that nothing but the inputs is kept."""

    @staticmethod
    def forward(ctx, run, operation, *inputs):
        ctx.run, ctx.operation = run, operation
        ctx.save_for_backward(*map(reference.savable, inputs))
        return getattr(run, operation)(*inputs)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        return None, None, *getattr(ctx.run, ctx.operation + "_backward")(grad, *ctx.saved_tensors)
