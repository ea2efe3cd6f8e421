"""The formulas in plain, differentiable PyTorch: the oracle of the tests and the code of the "eager" backend.

Notation: r = π_new / π_old, ℓ = log r, λ = log σ. Every function takes flat tensors: N rows, A action dimensions.
Arithmetic is in float32, or in float64 as soon as one tensor is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
HALF_LOG_2PI_E = 0.5 * math.log(2.0 * math.pi * math.e)

MAX_LOG_RATIO = 20.0
"""|ℓ| is clamped to this inside exp only: float32 overflows at 88.7, and stock autograd yields NaN or inf there."""

METRICS = ("loss", "surrogate", "value_loss", "entropy", "kl", "approx_kl", "clip_fraction", "max_ratio", "nonfinite")
"""The order of the metrics that every backend returns, the loss first."""


KL_LOSSES = (
    ("old_new", "old", "k1"),
    ("old_new", "old", "k3"),
    ("new_old", "old", "k1"),
    ("new_old", "old", "k2"),
    ("new_old", "old", "k3"),
    ("new_old", "new", "k1"),
    ("new_old", "new", "k2"),
    ("new_old", "new", "k3"),
    ("old_new", "new", "k1"),
    ("old_new", "new", "k3"),
)
"""Direction of the KL, the policy that was sampled, the form: the losses that ``kl.loss`` describes, in the order in
which the kernels count them."""


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    for t in tensors:
        if t is not None and t.dtype is torch.float64:
            return torch.float64
    return torch.float32


def savable(t: Tensor) -> Tensor:
    """``t``, or its copy if autograd could not save it: rsl_rl's storage holds inference tensors."""
    return t.clone() if not torch.compiler.is_compiling() and t.is_inference() else t


def expm1_minus(x: Tensor) -> Tensor:
    """φ(x) = eˣ - 1 - x, by its Taylor series where the difference would cancel."""
    last = 16 if x.dtype == torch.float64 else 9  # xᵏ / k! is below rounding from there on
    series = x / last
    for k in range(last - 1, 2, -1):
        series = x / k * (1.0 + series)
    return torch.where(x.abs() < 0.5, 0.5 * x * x * (1.0 + series), torch.expm1(x) - x)


def is_positive_normal(std: Tensor) -> Tensor:
    """Neither zero, negative, subnormal, infinite nor NaN: what a standard deviation has to be."""
    limits = torch.finfo(std.dtype)
    return (std >= limits.tiny) & (std <= limits.max)


def std_or_nan(std: Tensor) -> Tensor:
    """``std``, with NaN where it is not a positive normal number: the fault then shows in every gradient, too.

    By a product: the gradient of a selection would be 0 there.
    """
    return std * torch.where(is_positive_normal(std), 1.0, math.nan).to(std.dtype)


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(a; μ, σ) summed over the actions: Σ -½z² - λ - ½log 2π with z = (a - μ)/σ. [N, A] -> [N]."""
    std = std_or_nan(std)
    z = (actions - mean) / std
    return (-0.5 * z * z - torch.log(std) - HALF_LOG_2PI).sum(-1)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Σ λ + ½log(2πe). [..., A] -> [...]."""
    return (torch.log(std_or_nan(std)) + HALF_LOG_2PI_E).sum(-1)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ ½[φ(2δ) + m²] with δ = λ_p - λ_q, m = (μ_p - μ_q)/σ_q: never negative, 0 at equality. [N, A] -> [N].

    δ comes from log1p(e), e = (σ_p - σ_q)/σ_q, when the two are close: e is then exact to rounding.
    """
    std_p, std_q = std_or_nan(std_p), std_or_nan(std_q)
    e = (std_p - std_q) / std_q
    near = e.abs() < 0.5  # further away e itself is rounded: at -1 + 1e-6 to 6%
    delta = torch.where(near, torch.log1p(torch.where(near, e, 0.0)), torch.log(std_p / std_q))
    m = (mean_p - mean_q) / std_q
    return (0.5 * (expm1_minus(2.0 * delta) + m * m)).sum(-1)


def widened(t: Tensor) -> Tensor:
    """``t`` in the dtype that it is computed in."""
    return t.to(arithmetic_dtype(t))


def narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``. What is finite stays so: float16 ends at 65504, below the e²⁰ that r is clamped to."""
    if t.dtype == dtype:
        return t
    largest = torch.finfo(dtype).max
    return torch.where(torch.isfinite(t), t.clamp(-largest, largest), t).to(dtype)


def kl_loss(log_ratio: Tensor, which: int) -> Tensor:
    """The loss ``KL_LOSSES[which]`` of ℓ, elementwise; its coefficient is a constant to autograd."""
    value, coefficient = _kl_loss_terms(widened(log_ratio.detach()), which)
    return narrowed(value, log_ratio.dtype) + narrowed(coefficient, log_ratio.dtype) * without_value(log_ratio)


def without_value(t: Tensor) -> Tensor:
    """0, with the gradient of ``t``. What is infinite stays so, to be added to a value that is: ∞ - ∞ would be NaN."""
    return t - torch.where(t.isinf(), 0.0, t.detach())


def _kl_loss_terms(x: Tensor, which: int) -> tuple[Tensor, Tensor]:
    clamped = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match KL_LOSSES[which]:
        case ("old_new", "old", "k1"):
            return -x, -torch.ones_like(x)
        case ("old_new", "old", "k3"):
            return k3(x), torch.expm1(clamped)
        case ("new_old", "old", "k1"):
            r = torch.exp(clamped)
            return r * x, r * (x + 1.0)
        case ("new_old", "old", "k2"):
            r = torch.exp(clamped)
            return 0.5 * r * x * x, r * x
        case ("new_old", "old", "k3"):
            r = torch.exp(clamped)
            return r * k3(-x), r * x  # r ((1/r - 1) + ℓ)
        case ("new_old", "new", "k1"):
            return x, x
        case ("new_old", "new", "k2"):
            return 0.5 * x * x, x
        case ("new_old", "new", "k3"):
            return k3(-x), x
        case ("old_new", "new", "k1"):
            inv_r = torch.exp(-clamped)
            return -x * inv_r, -inv_r
        case ("old_new", "new", "k3"):
            return k3(-x), -torch.expm1(-clamped)
        case unknown:
            raise NotImplementedError(unknown)


def k3(x: Tensor) -> Tensor:
    """eˣ - 1 - x with the exponential clamped: beyond it grows by the distance, so that it is never negative and an
    outlier stays visible.
    """
    clamped = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return expm1_minus(clamped) + (x - clamped).abs()


def _clip(t: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """clamp, with a gradient at the bounds in every version of torch: its own has had none there since 2.14."""
    # torch's stubs have clamp for two numbers and for two tensors, but not for what may be either
    clamped = torch.clamp(t.detach(), low, high)  # type: ignore[arg-type]
    return torch.where((t >= low) & (t <= high), t, clamped)


def _as_bound(bound: float | Tensor, like: Tensor) -> float | Tensor:
    """In memory for torch.compile: what inductor makes of a number that changes keeps an older one here and there."""
    if isinstance(bound, Tensor) or not torch.compiler.is_compiling():
        return bound
    return torch.full((), bound, dtype=like.dtype, device=like.device)


def ppo_loss(
    mean: Tensor,  # [N, A]
    std: Tensor,  # [A] or [N, A]
    values: Tensor,  # [N] or [N, 1]; so are the other vectors
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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss of rsl_rl's ``PPO.update`` plus ``kl_coef`` times the KL: (loss, metrics [9] as in ``METRICS``)."""
    inputs = (mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values)
    mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values = (
        savable(t).to(dtype) for t in inputs
    )
    values, old_log_prob, advantages, returns, old_values = (
        t.reshape(-1) for t in (values, old_log_prob, advantages, returns, old_values)
    )
    clip_param, value_loss_coef, entropy_coef, kl_coef = (
        c.to(dtype) if isinstance(c, Tensor) else c for c in (clip_param, value_loss_coef, entropy_coef, kl_coef)
    )
    std = std.expand_as(mean)
    old_mean = old_mean[:num_original]
    old_std = old_std.expand_as(mean)[:num_original] if old_std.dim() == 1 else old_std[:num_original]

    # clipped surrogate
    log_ratio = gaussian_log_prob(actions, mean, std) - old_log_prob  # [N]
    if isinstance(clip_param, Tensor):  # one that is no range shows in every row
        log_ratio = log_ratio + torch.where(clip_param >= 0.0, 0.0, math.nan).to(dtype)
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
    # log_ratio + (clamped - log_ratio).detach() would not be clamped: past 10⁷ float32 rounds the difference by more
    # than 1. The zero that has the gradient is NaN if the log-ratio is not finite, so that it shows.
    ratio = torch.exp(clamped + (log_ratio - log_ratio.detach()))
    lowest, highest = _as_bound(1.0 - clip_param, ratio), _as_bound(1.0 + clip_param, ratio)
    clipped_ratio = _clip(ratio, lowest, highest)
    surrogate = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()

    # value loss
    if use_clipped_value_loss:
        moved_by = _as_bound(clip_param, values)
        value_clipped = old_values + _clip(values - old_values, -moved_by, moved_by)
        value_loss = torch.max((values - returns).pow(2), (value_clipped - returns).pow(2)).mean()
    else:
        value_loss = (returns - values).pow(2).mean()

    # entropy and KL, over the original rows
    entropy = gaussian_entropy(std[:num_original]).mean()
    new_mean, new_std = mean[:num_original], std[:num_original]
    # a coefficient of 0 keeps a KL that overflowed away from the gradients, as if the term were not there
    if isinstance(kl_coef, Tensor):
        new_mean, new_std = (torch.where(kl_coef != 0.0, t, t.detach()) for t in (new_mean, new_std))
    elif kl_coef == 0.0:
        new_mean, new_std = new_mean.detach(), new_std.detach()
    if kl_new_old:
        kl_rows = gaussian_kl(new_mean, new_std, old_mean, old_std)
    else:
        kl_rows = gaussian_kl(old_mean, old_std, new_mean, new_std)
    kl = kl_rows.mean()

    with torch.no_grad():
        approx_kl = k3(log_ratio).mean()
        clip_fraction = ((ratio < lowest) | (ratio > highest)).to(dtype).mean()
        fine = torch.isfinite(log_ratio)
        for rollout in (values, advantages, returns, old_values):
            fine = fine & torch.isfinite(rollout)
        old_fine = (torch.isfinite(old_mean) & is_positive_normal(old_std)).all(-1)
        nonfinite = (~fine).sum() + (fine[:num_original] & ~old_fine).sum()

    # nor does it reach the loss then; that of a faulty row does, so that it shows
    kl_term = torch.where((nonfinite > 0) | (kl_coef != 0.0), kl_coef * kl, 0.0)
    loss = surrogate + value_loss_coef * value_loss - entropy_coef * entropy + kl_term
    with torch.no_grad():
        metrics = torch.stack(
            [loss, surrogate, value_loss, entropy, kl, approx_kl, clip_fraction, ratio.max(), nonfinite.to(dtype)]
        )
    return loss, metrics


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
    """Generalised advantage estimation (Schulman et al. 2016): (advantages, returns), each [T, E]."""
    dtype = arithmetic_dtype(rewards, values, last_values, final_values)
    rewards, values, next_values = rewards.to(dtype), values.to(dtype), last_values.to(dtype)
    dones = dones != 0
    at_end = torch.zeros_like(values)  # V(s') of a step that ends its episode
    if time_outs is not None:
        at_end = torch.where(time_outs != 0, values if final_values is None else final_values.to(dtype), at_end)
    factor = gamma * lam
    is_delta = dones | (factor == 0.0)  # selected, not multiplied: 0 · NaN and 0 · ∞ of a later step would leak
    advantages: list[Tensor] = []
    advantage = torch.zeros_like(next_values)
    for t in reversed(range(rewards.shape[0])):
        next_values = torch.where(dones[t], at_end[t], next_values)
        delta = rewards[t] + gamma * next_values - values[t]
        advantage = torch.where(is_delta[t], delta, delta + factor * advantage)
        advantages.append(advantage)
        next_values = values[t]
    all_advantages = torch.stack(advantages[::-1])
    returns = all_advantages + values
    if normalize:
        all_advantages = (all_advantages - all_advantages.mean()) / (all_advantages.std() + 1e-8)
    if out is None:
        return all_advantages, returns
    return out[0].copy_(all_advantages), out[1].copy_(returns)
