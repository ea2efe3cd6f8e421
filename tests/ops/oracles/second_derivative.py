"""The ways to ask for a second derivative. Autograd runs all of the graph in the first, a part of it in the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _by_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    _penalised(function, x).backward()


def _by_backward_of_some(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    _penalised(function, x).backward(inputs=[x])


def _by_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.autograd.grad(_penalised(function, x), x)


def _by_hessian(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.autograd.functional.hessian(function, x.detach())


def _by_hessian_vector_product(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    torch.autograd.grad(grad.sum(), x)


def _penalised(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = function(x)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    assert grad.requires_grad
    return value + grad.pow(2).sum() + x.sum()


WAYS = [_by_backward, _by_backward_of_some, _by_grad, _by_hessian, _by_hessian_vector_product]
"""Each takes a function of ``x``, a leaf that requires a gradient, with a 0-dim value."""
