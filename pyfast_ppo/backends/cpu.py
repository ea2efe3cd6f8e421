"""The C++ kernels (csrc/cpu): torch's threads, SIMD, one pass."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from pyfast_ppo.backends import _extension
from pyfast_ppo.backends._outputs import gradient_of, gradient_of_both
from pyfast_ppo.reference import METRICS, arithmetic_dtype

name = "cpu"
DEVICE_TYPE = "cpu"
COMPUTES_IN = (torch.float32, torch.float64)
FOR_TESTS_ONLY = False
GATHERS = False
FUSES_UPDATE = True

_C, _REASON = _extension.load()

_wish = os.environ.get("PYFAST_PPO_ISA")
if _C is not None and _wish and _wish != _C.isa():
    warnings.warn(
        f"PYFAST_PPO_ISA={_wish!r} cannot be had, {_C.isa()!r} is used; it may be 'baseline', 'avx2' or 'avx512', as "
        "far as this CPU goes",
        stacklevel=2,
    )


def unavailable_reason() -> str | None:
    return _REASON


def detail() -> str:
    return f"C++ ({_C.isa()}), {torch.get_num_threads()} threads ({_C.threading()})"


def ppo_loss(
    mean: Tensor,  # [N, A]
    std: Tensor,  # [A] or [N, A]
    values: Tensor,  # [N]
    actions: Tensor,  # [N, A]
    old_log_prob: Tensor,  # [N]
    old_mean: Tensor,  # [num_original or N, A]
    old_std: Tensor,  # [A] or [num_original or N, A]
    advantages: Tensor,  # [N]
    returns: Tensor,  # [N]
    old_values: Tensor,  # [N]
    clip_param: float | Tensor,
    value_loss_coef: float | Tensor,
    entropy_coef: float | Tensor,
    kl_coef: float | Tensor,
    use_clipped_value_loss: bool,
    kl_new_old: bool,
    num_original: int,
    dtype: torch.dtype,  # of the arithmetic
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(metrics, grad_mean, grad_std, grad_values)."""
    inputs = (mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values)
    metrics = mean.new_empty(len(METRICS), dtype=dtype)
    grad_mean, grad_std, grad_values = gradient_of(mean), gradient_of(std), gradient_of(values)
    _C.ppo_loss(
        (mean.shape[0], num_original, mean.shape[1]),
        inputs,
        (clip_param, value_loss_coef, entropy_coef, kl_coef),
        use_clipped_value_loss,
        kl_new_old,
        (metrics, grad_mean, grad_std, grad_values),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return metrics, grad_mean, grad_std, grad_values


def gae(
    rewards: Tensor,  # [T, E]
    values: Tensor,  # [T, E]
    dones: Tensor,  # [T, E]
    last_values: Tensor,  # [E]
    gamma: float,
    lam: float,
    time_outs: Tensor | None,  # [T, E]
    final_values: Tensor | None,  # [T, E]
    normalize: bool,
    out: tuple[Tensor, Tensor] | None = None,  # where they are written: [T, E] each, contiguous, of the right dtype
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [T, E]."""
    dtype = arithmetic_dtype(rewards, values, last_values, final_values)
    advantages, returns = out or (rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2))
    _C.gae(
        tuple(rewards.shape),
        (rewards, values, dones, last_values, time_outs, final_values),
        gamma,
        lam,
        normalize,
        (advantages, returns),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return advantages, returns


def adam_step(
    rows: list,  # of (parameter, exp_avg, exp_avg_sq, step, number of its module)
    rule: tuple,  # beta1, beta2, eps, weight_decay, decoupled
    max_norm: float,
    rate: float | Tensor,
    skip: Tensor | None,  # 0-dim, boolean
    skip_nonfinite: bool,
    lost: Tensor,  # 0-dim, boolean, written to
) -> bool:
    """Whether the step was taken care of; False where a tensor is not as the kernel takes it."""
    return _C.adam_step(rows, rule, max_norm, rate, skip, skip_nonfinite, lost, torch.get_num_threads())


def adapt_rate(
    rule: tuple,  # desired_kl, min_rate, max_rate, factor, rise_above
    kl: Tensor,  # 0-dim, as the others
    rate: Tensor,
    lost: Tensor | None,  # boolean
    out: Tensor,  # float64
) -> None:
    _C.adapt_rate(rule, kl, rate, lost, out)


def add_bias_and_activate(activation: str, x: Tensor, bias: Tensor) -> Tensor:
    """f(x + bias), in the memory of x: [N, H], [H], contiguous float32. ``activation``: "elu", "relu" or "tanh"."""
    _C.add_bias_and_activate(activation, (*x.shape, torch.get_num_threads()), x, bias)
    return x


def add_bias_and_activate_backward(
    activation: str, grad: Tensor, y: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_bias), with y what ``add_bias_and_activate`` gave. Contiguous float32. ``in_place``: grad_x is
    grad."""
    grad_x, grad_bias = grad if in_place else torch.empty_like(y), y.new_empty(y.shape[1])
    _C.add_bias_and_activate_backward(activation, (*y.shape, torch.get_num_threads()), grad, y, grad_x, grad_bias)
    return grad_x, grad_bias


def _shape(shape: torch.Size, dtype: torch.dtype) -> tuple[int, ...]:
    return *shape, dtype == torch.float64, torch.get_num_threads()


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[N, A], [N, A], [A] or [N, A] -> [N]."""
    dtype = arithmetic_dtype(actions, mean, std)
    out = mean.new_empty(mean.shape[0], dtype=dtype)
    _C.gaussian_log_prob(_shape(mean.shape, dtype), actions, mean, std, out)
    return out


def gaussian_log_prob_backward(grad: Tensor, actions: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_mean, grad_std); the actions have the negative of the first, whose dtype suits both."""
    grad_mean, grad_std = gradient_of_both(mean, actions), gradient_of(std)
    _C.gaussian_log_prob_backward(
        _shape(mean.shape, arithmetic_dtype(actions, mean, std)),
        actions,
        mean,
        std,
        grad,
        grad_mean,
        grad_std,
    )
    return grad_mean, grad_std


def gaussian_kl_loss(
    which: int, actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor
) -> tuple[Tensor, Tensor]:
    """(value, coefficient), each [N], of the loss ``KL_LOSSES[which]``."""
    dtype = arithmetic_dtype(actions, mean, std, old_log_prob)
    value, coefficient = mean.new_empty(2, mean.shape[0], dtype=dtype).unbind()
    _C.gaussian_kl_loss(_shape(mean.shape, dtype), which, actions, mean, std, old_log_prob, value, coefficient)
    return value, coefficient


def gaussian_entropy(std: Tensor) -> Tensor:
    """[N, A] -> [N]."""
    out = std.new_empty(std.shape[0], dtype=arithmetic_dtype(std))
    _C.gaussian_entropy(_shape(std.shape, out.dtype), std, out)
    return out


def gaussian_entropy_backward(grad: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_std,)."""
    grad_std = gradient_of(std)
    _C.gaussian_entropy_backward(_shape(std.shape, arithmetic_dtype(std)), std, grad, grad_std)
    return (grad_std,)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """[N, A], [A] or [N, A], [N, A], [A] or [N, A] -> [N]."""
    dtype = arithmetic_dtype(mean_p, std_p, mean_q, std_q)
    out = mean_p.new_empty(mean_p.shape[0], dtype=dtype)
    _C.gaussian_kl(
        _shape(mean_p.shape, dtype),
        mean_p,
        std_p,
        mean_q,
        std_q,
        out,
    )
    return out


def gaussian_kl_backward(
    grad: Tensor, mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor
) -> tuple[Tensor, ...]:
    """(grad_mean_p, grad_std_p, grad_std_q); mean_q has the negative of the first, whose dtype suits both."""
    grad_mean_p = gradient_of_both(mean_p, mean_q)
    grad_std_p, grad_std_q = gradient_of(std_p), gradient_of(std_q)
    _C.gaussian_kl_backward(
        _shape(mean_p.shape, arithmetic_dtype(mean_p, std_p, mean_q, std_q)),
        mean_p,
        std_p,
        mean_q,
        std_q,
        grad,
        grad_mean_p,
        grad_std_p,
        grad_std_q,
    )
    return grad_mean_p, grad_std_p, grad_std_q
