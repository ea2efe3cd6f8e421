"""The reference formulas as a backend: slow, and right on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast_ppo import reference

name = "eager"
DEVICE_TYPE = None  # any
COMPUTES_IN = (torch.float32, torch.float64)
FOR_TESTS_ONLY = False
GATHERS = False
FUSES_UPDATE = False


def unavailable_reason() -> str | None:
    return None


def detail() -> str:
    return "plain PyTorch, any device"


def ppo_loss(mean: Tensor, std: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(metrics, grad_mean, grad_std, grad_values); arguments as ``reference.ppo_loss``."""
    with torch.inference_mode(False), torch.enable_grad():
        mean, std, values = (reference.savable(t.detach()).requires_grad_() for t in (mean, std, values))
        rest = tuple(t.detach() if isinstance(t, Tensor) else t for t in rest)
        loss, metrics = reference.ppo_loss(mean, std, values, *rest)
        grad_mean, grad_std, grad_values = torch.autograd.grad(loss, (mean, std, values))
    return metrics, grad_mean, grad_std, grad_values


def gae(*args: Any) -> tuple[Tensor, Tensor]:
    """(advantages, returns); arguments as ``reference.gae``."""
    with torch.no_grad():
        return reference.gae(*args)
