"""What the operations ask of their arguments, and how users' shapes become the flat ones that backends take."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from pyfast_ppo.ops.shared_row import is_shared_row, shared_row

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, t: Tensor) -> None:
    """``t`` is a dense floating-point tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}; convert it with .float()"
        )


def tensor_on(name: str, t: Tensor, device: torch.device) -> Tensor:
    """``t``, a floating-point tensor on ``device``, with the signs that stand in its memory."""
    check_tensor(name, t)
    if t.device != device:
        raise ValueError(
            f"{name} is on {t.device}, the other arguments are on {device}; move it with .to({str(device)!r})"
        )
    return t.resolve_neg()  # a kernel knows nothing of torch's negative bit: z.conj().imag is z.imag and that bit


def check_matrix(name: str, t: Tensor) -> torch.Size:
    """``t`` is [..., A] with at least one row and one action; returns the leading dimensions."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() < 2:
        raise ValueError(f"{name} must be [N, A] (any leading dimensions), got shape {list(t.shape)}")
    if t.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one action dimension, got A = 0 (shape {list(t.shape)})")
    if t.numel() == 0:
        raise ValueError(f"{name} must have at least one row, got N = 0 (shape {list(t.shape)})")
    return t.shape[:-1]


def rows(name: str, t: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """``t`` of shape [..., A] as [N, A]."""
    t = tensor_on(name, t, device)
    if t.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(t.shape)}")
    return t if t.dim() == 2 else t.reshape(-1, shape[-1])


def row_or_rows(
    name: str, t: Tensor, shape: torch.Size, device: torch.device, *, own_gradients: bool = False
) -> Tensor:
    """A std of shape [A] as it is, of shape [..., A] as [N, A], and an expanded view of one row as that row [A].

    ``own_gradients``: not where each of the rows is to have its gradient.
    """
    t = tensor_on(name, t, device)
    # the number of dimensions first: torch.export takes a comparison of [N, A] with [A] for a condition on N
    if t.dim() == 1 and t.shape == shape[-1:]:
        return t
    if t.shape != shape:
        raise ValueError(f"{name} must have the shape [{shape[-1]}] or {list(shape)}, got {list(t.shape)}")
    if is_shared_row(t) and not (own_gradients and t.requires_grad):
        return shared_row(t)
    t = t.contiguous()
    return t if t.dim() == 2 else t.reshape(-1, shape[-1])


def vector(name: str, t: Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    """``t`` of shape [...] or [..., 1] as [N] or [N, 1]: a view less to make."""
    t = tensor_on(name, t, device)
    shape = t.shape
    if shape != leading and (shape[:-1] != leading or shape[-1] != 1):
        raise ValueError(f"{name} must have the shape {list(leading)} or {[*leading, 1]}, got {list(shape)}")
    return t if len(leading) == 1 else t.reshape(-1)


def row_index(name: str, t: Tensor, num_rows: int, device: torch.device) -> Tensor:
    """[N] numbers of rows."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {t.dtype}; convert it with .long()")
    if t.shape != (num_rows,):
        raise ValueError(f"{name} must have the shape {[num_rows]}, one entry per row of mean, got {list(t.shape)}")
    if t.device != device:
        raise ValueError(
            f"{name} is on {t.device}, the other arguments are on {device}; move it with .to({str(device)!r})"
        )
    return t.contiguous()


def coefficient(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """A Python number, or a 0-dim tensor that is read on its device when the kernel runs."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got shape {list(value.shape)}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}; convert it with .float()")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, the other arguments are on {device}; create it there")
        return value.detach().resolve_neg()
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is larger than any floating-point number") from None
