"""Log-probability, entropy and KL of diagonal Gaussians, one number per row, differentiable in every argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast_ppo import backends, reference
from pyfast_ppo.ops import _arguments as arguments
from pyfast_ppo.ops._autograd import first_order_only
from pyfast_ppo.ops.shared_row import is_transformed


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor, *, backend: str | None = None) -> Tensor:
    """log N(actions; mean, std²), summed over the action dimensions.

    Args:
        actions: [N, A]; any leading dimensions.
        mean: [N, A].
        std: [A] or [N, A], > 0.
        backend: "cuda", "triton", "cpu", "eager", or None for the best that is available. Under
            torch.compile, in torch.func and in forward mode the formula itself runs, and only the name is looked at.

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
        arguments.row_or_rows("std", std, shape, device, own_gradients=True),
    )
    return _apply("gaussian_log_prob", backend, device, flat).view(leading)


def gaussian_entropy(std: Tensor, *, backend: str | None = None) -> Tensor:
    """Entropy Σ log std + ½log(2πe) of a diagonal Gaussian, in nats.

    Args:
        std: [A] or [N, A] (any leading dimensions), > 0.
        backend: As in ``gaussian_log_prob``.

    Returns:
        0-dim for [A], else [N]. A second derivative is refused, except by the eager backend.

    Raises:
        ValueError, TypeError, RuntimeError: As ``ppo_loss``.
    """
    arguments.check_tensor("std", std)
    if std.dim() == 0:
        raise ValueError("std must be [A] or [N, A] (any leading dimensions), got shape []")
    matrix = std if std.dim() > 1 else std.view(1, std.shape[0])
    leading = arguments.check_matrix("std", matrix)
    flat = arguments.rows("std", matrix, matrix.shape, std.device)
    entropy = _apply("gaussian_entropy", backend, std.device, (flat,))
    return entropy.view(leading) if std.dim() > 1 else entropy[0]


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor, *, backend: str | None = None) -> Tensor:
    """KL(p‖q) of two diagonal Gaussians: never negative, exactly 0 at equality, accurate however close p and q are.

    Σ ½[φ(2δ) + m²] with φ(x) = eˣ - 1 - x, δ = log(σ_p/σ_q), m = (μ_p - μ_q)/σ_q. The usual form, log σ_q/σ_p + … - ½,
    loses all digits near equality and goes negative. In float32, kernels have NaN where σ_p/σ_q is below 1.2e-38.

    Args:
        mean_p: [N, A]; any leading dimensions.
        std_p: [A] or [N, A], > 0.
        mean_q: [N, A].
        std_q: [A] or [N, A], > 0.
        backend: As in ``gaussian_log_prob``.

    Returns:
        [N], in nats. A second derivative is refused, except by the eager backend.

    Raises:
        ValueError, TypeError, RuntimeError: As ``ppo_loss``.
    """
    leading = arguments.check_matrix("mean_p", mean_p)
    device, shape = mean_p.device, mean_p.shape
    flat = (
        arguments.rows("mean_p", mean_p, shape, device),
        arguments.row_or_rows("std_p", std_p, shape, device, own_gradients=True),
        arguments.rows("mean_q", mean_q, shape, device),
        arguments.row_or_rows("std_q", std_q, shape, device, own_gradients=True),
    )
    return _apply("gaussian_kl", backend, device, flat).view(leading)


def gaussian_kl_loss(
    actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor, which: int, *, backend: str | None = None
) -> Tensor:
    """``kl.gaussian_loss``; ``which``: the loss's place in ``reference.KL_LOSSES``."""
    leading = arguments.check_matrix("mean", mean)
    device, shape = mean.device, mean.shape
    flat = (
        arguments.rows("actions", actions, shape, device),
        arguments.rows("mean", mean, shape, device),
        arguments.row_or_rows("std", std, shape, device),
        arguments.vector("old_log_prob", old_log_prob, leading, device),
    )
    dtype = reference.arithmetic_dtype(*flat)
    run = _backend(backend, device, dtype)
    if run is None:
        actions, mean, std, old_log_prob = (reference.savable(t).to(dtype) for t in flat)
        log_ratio = reference.gaussian_log_prob(actions.detach(), mean, std) - old_log_prob.detach().reshape(-1)
        return reference.kl_loss(log_ratio, which).view(leading)
    return _KlLoss.apply(run, which, *flat).view(leading)


def _apply(operation: str, backend: str | None, device: torch.device, flat: tuple[Tensor, ...]) -> Tensor:
    dtype = reference.arithmetic_dtype(*flat)
    run = _backend(backend, device, dtype)
    if run is None:
        return getattr(reference, operation)(*(reference.savable(t).to(dtype) for t in flat))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in flat)):
        return getattr(run, operation)(*flat)  # what autograd would keep costs copies in inference mode
    return _Gaussian.apply(run, operation, *flat)


def _backend(name: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Whose kernels are called; None for the formula itself.

    torch.compile has that, too, and fuses it; and so have torch.func and forward mode, of which kernels know nothing.
    """
    if torch.compiler.is_compiling() or is_transformed():
        backends.check_name(name)
        return None
    run = backends.select(name, device, dtype)
    return None if run.name == "eager" else run


# the input whose gradient is the negative of another's, and that other one: (actions, mean), (mean_q, mean_p)
_MIRRORED = {"gaussian_log_prob": (0, 1), "gaussian_kl": (2, 0)}


class _Gaussian(torch.autograd.Function):
    """Both passes are kernels: backward computes the terms anew, so that nothing but the inputs is kept."""

    @staticmethod
    def forward(ctx, run, operation, *inputs):
        ctx.run, ctx.operation = run, operation
        ctx.save_for_backward(*map(reference.savable, inputs))
        return getattr(run, operation)(*inputs)

    @staticmethod
    @first_order_only
    def backward(ctx, inputs, grad):
        grads = list(getattr(ctx.run, ctx.operation + "_backward")(grad.resolve_neg(), *inputs))
        if ctx.operation in _MIRRORED:
            mirrored, of = _MIRRORED[ctx.operation]
            grads.insert(mirrored, None)
            if ctx.needs_input_grad[2 + mirrored]:
                grads[mirrored] = (-grads[of]).to(inputs[mirrored].dtype)
            grads[of] = grads[of].to(inputs[of].dtype)
        return None, None, *grads


class _KlLoss(torch.autograd.Function):
    """The coefficient is kept, so that backward is that of the log-probability."""

    @staticmethod
    def forward(ctx, run, which, actions, mean, std, old_log_prob):
        value, coefficient = run.gaussian_kl_loss(which, actions, mean, std, old_log_prob)
        ctx.run = run
        ctx.save_for_backward(coefficient, *map(reference.savable, (actions, mean, std)))
        return value

    @staticmethod
    @first_order_only
    def backward(ctx, saved, grad):
        coefficient, actions, mean, std = saved
        grad_mean, grad_std = ctx.run.gaussian_log_prob_backward(grad * coefficient, actions, mean, std)
        return None, None, None, grad_mean.to(mean.dtype), grad_std, None
