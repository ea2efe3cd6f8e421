"""How the compiled extension gets its arguments (csrc/bindings.h): addresses, dtype codes and strides in tuples."""

from __future__ import annotations

import torch
from torch import Tensor

View = tuple[int, int, int, int]
"""(address, dtype code, row stride, column stride)"""

NO_TENSOR = (0, 0, 0, 0)

_DTYPE_CODES = {  # DType in csrc/tensor.h
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.bool: 4,
}


def view(t: Tensor) -> View:
    """(address, dtype code, row stride, column stride) of [N, A], of [N], or of a shared row [A] if ``t`` is one."""
    if t.dim() == 2:
        return (t.data_ptr(), _DTYPE_CODES[t.dtype], *t.stride())
    return (t.data_ptr(), _DTYPE_CODES[t.dtype], *t.stride(), 1)


def row_or_matrix(t: Tensor) -> View:
    """As ``view``, but one dimension means a row [A] that all rows share."""
    if t.dim() == 2:
        return view(t)
    return (t.data_ptr(), _DTYPE_CODES[t.dtype], 0, t.stride(0))


def coefficient(value: float | Tensor) -> tuple[int, int, float]:
    """(address, dtype code, -) of a tensor, or (0, -, number)."""
    return (value.data_ptr(), _DTYPE_CODES[value.dtype], 0.0) if isinstance(value, Tensor) else (0, 0, value)


def output(t: Tensor) -> tuple[int, int]:
    return (t.data_ptr(), _DTYPE_CODES[t.dtype])


def empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def empty_for(t: Tensor, other: Tensor) -> Tensor:
    """For a gradient that both tensors get, up to its sign: of a dtype that loses nothing for either."""
    return torch.empty(t.shape, dtype=torch.promote_types(t.dtype, other.dtype), device=t.device)


def ppo_loss_inputs(
    mean: Tensor,
    std: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
) -> tuple[View, ...]:
    """In the order of ``PpoLossArgs`` (csrc/ppo_loss.h)."""
    return (
        view(mean),
        row_or_matrix(std),
        view(values),
        view(actions),
        view(old_log_prob),
        view(old_mean),
        row_or_matrix(old_std),
        view(advantages),
        view(returns),
        view(old_values),
    )


def gae_inputs(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    time_outs: Tensor | None,
    final_values: Tensor | None,
) -> tuple[View, ...]:
    """In the order of ``GaeArgs`` (csrc/gae.h)."""
    return (
        view(rewards),
        view(values),
        view(dones),
        row_or_matrix(last_values),
        NO_TENSOR if time_outs is None else view(time_outs),
        NO_TENSOR if final_values is None else view(final_values),
    )
