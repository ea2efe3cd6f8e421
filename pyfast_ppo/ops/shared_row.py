"""A row [A] that stands for all N: rsl_rl's Normal expands the std, which is one, to [N, A]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_shared_row(t: Tensor) -> bool:
    """Whether [..., A] is an expanded view of one row: stride 0 in every leading dimension that has more than one
    entry.

    A leaf that requires a gradient is not: each of its elements then has a gradient of its own. (A tangent has not:
    torch lays it out as the tensor.)
    """
    if t.dim() < 2 or 0 not in t.stride() or (t.is_leaf and t.requires_grad):
        return False
    leading = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    return bool(leading) and all(stride == 0 for stride in leading)


def shared_row(t: Tensor) -> Tensor:
    """The row [A] behind an expanded view [..., A].

    The gradient of the row goes back in equal parts to the N rows of the view. Whatever the view was expanded from sums
    over them, so that it gets the row's gradient; no [N, A] memory is written.
    """
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and is_transformed()
    if not compiling and not transformed and not t.requires_grad:
        return first_row(t).contiguous()
    return (_TransformableSharedRow if transformed else _SharedRow).apply(t)


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward mode differentiates what runs now."""
    return is_in_torch_func() or forward_ad._current_level >= 0


def is_in_torch_func() -> bool:
    """Whether a function that ``torch.func`` transforms runs now."""
    return torch._C._are_functorch_transforms_active()


class _SharedRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        ctx.shape = t.shape
        return first_row(t).clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return spread_over_rows(grad, ctx.shape)


class _TransformableSharedRow(torch.autograd.Function):
    """As torch.func and forward mode want it: a call costs several times as much, and torch.compile takes none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return first_row(t).clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return spread_over_rows(grad, ctx.shape)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.mean(tuple(range(tangent.dim() - 1)))


def first_row(t: Tensor) -> Tensor:
    """[..., A] -> [A]."""
    return t[(0,) * (t.dim() - 1)]


def spread_over_rows(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient [A] of a shared row, in equal parts for each of the rows of [..., A]; their sum is the gradient."""
    if grad.dtype == torch.float16:  # which cannot hold the parts: the first row gets all of it
        first = (0,) * (len(shape) - 1)
        parts = grad.new_zeros(shape)
        parts[first] = grad
        return parts
    return (grad / (shape.numel() // shape[-1])).expand(shape)
