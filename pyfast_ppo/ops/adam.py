"""A step of Adam with its gradients clipped: norms, clipping, the search for NaN and the step itself in two passes."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


class AdamRule(NamedTuple):
    """What a ``torch.optim.Adam`` or ``AdamW`` was made with."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # as in AdamW


class AdamRow(NamedTuple):
    """A parameter and its state as the optimizer keeps it; None where it has none yet."""

    parameter: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: Tensor | None  # float32, 0-dim
    module: int  # which of the modules it belongs to


def adam_step(
    rows: list[AdamRow],
    rule: AdamRule,
    *,
    max_norm: float,
    rate: float | Tensor,
    skip: Tensor | None,
    skip_nonfinite: bool,
    backend: ModuleType,
) -> Tensor | None:
    """``clip_grad_norm_`` for each module, then the step, in place; nothing waits for the device.

    The formulas are those of ``torch.optim.Adam`` and ``AdamW`` (Kingma and Ba 2015; Loshchilov and Hutter 2019), to
    rounding. Gradients that are clipped are changed, too.

    Args:
        rows: All parameters, those of a module one after the other; what has no gradient is left alone.
        rule: See ``AdamRule``.
        max_norm: Of the gradients of each module. Infinity: they are not clipped.
        rate: The learning rate. 0-dim, if it is a tensor.
        skip: Nothing is changed where this is true. Boolean, 0-dim.
        skip_nonfinite: Nothing is changed where the norm of a module's gradients is NaN or infinite, either.
        backend: One of pyfast_ppo.backends that has ``FUSES_UPDATE``.

    Returns:
        Whether a norm was NaN or infinite, if that was asked for. Boolean, 0-dim. None where something is not as
        kernels take it, and nothing was done: a tensor that is not contiguous float32, gradients without a state, more
        tensors than fit (64).
    """
    device = rows[0].parameter.device
    lost = torch.empty((), dtype=torch.bool, device=device)
    if not backend.adam_step(rows, rule, max_norm, rate, skip, skip_nonfinite, lost):
        return None
    increment_version([row.parameter for row in rows])
    return lost
