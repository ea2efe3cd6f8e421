"""The adaptive learning rate of rsl_rl, decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_ppo import backends


def adapted_rate(
    kl: Tensor,
    rate: Tensor,
    *,
    desired_kl: float,
    min_rate: float,
    max_rate: float,
    factor: float,
    rise_above: float = -torch.inf,
    lost: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The rate for the next step: lower after a KL above 2 · ``desired_kl``, higher after one below half of it.

    Args:
        kl: In nats. 0-dim. NaN changes nothing.
        rate: The present one. 0-dim float64. NaN becomes ``min_rate`` or ``max_rate``, or stays, as in rsl_rl.
        desired_kl: In nats.
        min_rate: A rate that is lowered is this at least.
        max_rate: A rate that is raised is this at most.
        factor: Between a rate and the next one.
        rise_above: The rate rises only where the KL is greater than this.
        lost: Where this is true, the last step was not taken, and the rate is lowered in any case. Boolean, 0-dim.
        backend: As in ``ppo_loss``.
    """
    if _is_plain(kl, rate) and (run := backends.select(backend, rate.device)).FUSES_UPDATE:
        following = torch.empty_like(rate)
        run.adapt_rate((desired_kl, min_rate, max_rate, factor, rise_above), kl, rate, lost, following)
        return following
    raised = rate * factor
    raised = torch.where(raised < max_rate, raised, max_rate)  # a clamp would keep NaN
    low = (kl < desired_kl / 2.0) & (kl > rise_above)
    lowered = _lowered(rate, min_rate, factor)
    following = torch.where(kl > desired_kl * 2.0, lowered, torch.where(low, raised, rate))
    return following if lost is None else lower_if_lost(following, rate, lost, min_rate=min_rate, factor=factor)


def lower_if_lost(following: Tensor, rate: Tensor, lost: Tensor, *, min_rate: float, factor: float) -> Tensor:
    """``following``, or a lower rate than the present one where the last step was lost. 0-dim each."""
    return torch.where(lost, torch.minimum(following, _lowered(rate, min_rate, factor)), following)


def _lowered(rate: Tensor, min_rate: float, factor: float) -> Tensor:
    # a tensor: on a GPU torch multiplies by the reciprocal of a number, which can round otherwise
    divisor = torch.full((), factor, dtype=rate.dtype, device=rate.device)
    lowered = rate / divisor
    return torch.where(lowered > min_rate, lowered, min_rate)


def _is_plain(kl: Tensor, rate: Tensor) -> bool:
    """As kernels take them; torch takes, or refuses, the others."""
    if torch.compiler.is_compiling() or rate.dtype != torch.float64 or kl.dtype not in (torch.float32, torch.float64):
        return False
    return kl.dim() == rate.dim() == 0 and kl.device == rate.device
