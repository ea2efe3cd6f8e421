"""Hidden layers of an MLP: bias and activation in one pass over memory, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from pyfast_ppo.ops._autograd import first_order_only


def hidden_layers(backend: ModuleType, activation: str, x: Tensor, *parameters: Tensor) -> Tensor:
    """x [N, H₀] -> f(x Wᵀ + b) [N, H₁] -> …, differentiable once in every argument.

    Args:
        backend: One of pyfast_ppo.backends that has ``FUSES_UPDATE``.
        activation: f: "elu" (with alpha 1), "relu" or "tanh".
        x: [N, H₀], N > 0.
        parameters: W [H₁, H₀] and b [H₁] of each layer in turn.

    Returns:
        [N, H], float32, also under autocast.

    Raises:
        ValueError: A tensor that is not float32, a bias that is not contiguous, or another activation. All lie on the
            backend's device.

    The derivative is taken from y = f(x), which is all that is kept: that of ELU for x < 0 is y + 1, eˣ to within 3e-8,
    that of tanh 1 - y², that of ReLU at 0 is 0. So the gradient of a unit that saturates is right to 3e-8 of the
    incoming one, not of itself.
    """
    return _HiddenLayers.apply(backend, activation, x, *parameters)


def forward_pass(backend: ModuleType, activation: str, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """x, and the output of each layer: what ``backward_pass`` needs. Without autograd, as that; ``parameters``: as
    above."""
    outputs = [x]
    with _without_autocast(backend):
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            outputs.append(_layer(backend, activation, outputs[-1], weight, bias))
    return outputs


def last_output(backend: ModuleType, activation: str, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """What ``forward_pass`` ends with; nothing else is kept."""
    with _without_autocast(backend):
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            x = _layer(backend, activation, x, weight, bias)
    return x


def _layer(backend: ModuleType, activation: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return backend.add_bias_and_activate(activation, torch.mm(x, weight.t()), bias)


def backward_pass(
    backend: ModuleType,
    activation: str,
    outputs: list[Tensor],
    weights: Sequence[Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    *,
    needs_x: bool,
    in_place: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x, and of the parameters in their order.

    Args:
        backend, activation: As those of the forward pass.
        outputs: What that gave; taken out one by one, so that what nobody else keeps is free as soon as it can be.
        weights: W of each layer.
        grad: [N, H], of the last output.
        needs: Which of the parameters have gradients.
        needs_x: Whether x has one.
        in_place: ``grad`` is nobody's any more.
    """
    grads: list[Tensor | None] = []
    grad = grad.contiguous()
    with _without_autocast(backend):
        for i in reversed(range(len(weights))):
            grad, grad_bias = backend.add_bias_and_activate_backward(activation, grad, outputs.pop(), in_place=in_place)
            grad_weight = torch.mm(grad.t(), outputs[-1]) if needs[2 * i] else None
            grads[:0] = [grad_weight, grad_bias if needs[2 * i + 1] else None]
            if i == 0:
                outputs.clear()
            if i > 0 or needs_x:
                grad = torch.mm(grad, weights[i])
            in_place = True  # from here on it is our own
    return grad if needs_x else None, grads


class _HiddenLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: ModuleType, activation: str, x: Tensor, *parameters: Tensor) -> Tensor:
        outputs = forward_pass(backend, activation, x, parameters)
        ctx.backend, ctx.activation = backend, activation
        ctx.save_for_backward(*outputs, *parameters[::2])
        ctx.inputs = parameters[1::2]  # the others are saved
        return outputs[-1]

    @staticmethod
    @first_order_only
    def backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(saved) // 2
        _, _, needs_x, *needs = ctx.needs_input_grad
        # the gradient that comes in is autograd's
        grad_x, grads = backward_pass(
            *(ctx.backend, ctx.activation, list(saved[: count + 1]), saved[count + 1 :], grad, needs),
            needs_x=needs_x,
            in_place=False,
        )
        return None, None, grad_x, *grads


_AS_IT_IS = nullcontext()


def _without_autocast(backend: ModuleType) -> AbstractContextManager:
    """Products stay float32, as the kernels take them: a backward pass may run under autocast, too."""
    if torch.is_autocast_enabled(backend.DEVICE_TYPE):
        return torch.autocast(backend.DEVICE_TYPE, enabled=False)
    return _AS_IT_IS
