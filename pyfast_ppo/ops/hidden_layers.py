"""Hidden layers of an MLP with ELU: bias and activation in one pass over memory, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from pyfast_ppo.ops._autograd import first_order_only


def hidden_layers(backend: ModuleType, x: Tensor, *parameters: Tensor) -> Tensor:
    """x [N, H₀] -> elu(x Wᵀ + b) [N, H₁] -> …, differentiable once in every argument.

    Args:
        backend: One of pyfast_ppo.backends that has ``FUSES_UPDATE``.
        x: [N, H₀], N > 0.
        parameters: W [H₁, H₀] and b [H₁] of each layer in turn.

    Returns:
        [N, H], float32, also under autocast.

    Raises:
        ValueError: A tensor that is not float32, or a bias that is not contiguous. All lie on the backend's device.

    ELU's derivative for x < 0 is taken from its result, y + 1, which is all that is kept: eˣ to within 3e-8, so that
    the gradient of a unit far below 0 is right to 3e-8 of the incoming one, not of itself.
    """
    return _HiddenLayers.apply(backend, x, *parameters)


class _HiddenLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: ModuleType, x: Tensor, *parameters: Tensor) -> Tensor:
        outputs, weights = [x], parameters[::2]
        with _without_autocast(backend):
            for weight, bias in zip(weights, parameters[1::2], strict=True):
                outputs.append(backend.add_bias_and_elu(torch.mm(outputs[-1], weight.t()), bias))
        ctx.backend = backend
        ctx.save_for_backward(*outputs, *weights)
        ctx.inputs = parameters[1::2]  # the others are saved
        return outputs[-1]

    @staticmethod
    @first_order_only
    def backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(saved) // 2
        outputs, weights = saved[: count + 1], saved[count + 1 :]
        _, needs_x, *needs = ctx.needs_input_grad
        grads: list[Tensor | None] = []
        grad = grad.contiguous()
        with _without_autocast(ctx.backend):
            for i in reversed(range(count)):
                last = i == count - 1  # its gradient is autograd's, the others are our own
                grad, grad_bias = ctx.backend.add_bias_and_elu_backward(grad, outputs[i + 1], in_place=not last)
                grad_weight = torch.mm(grad.t(), outputs[i]) if needs[2 * i] else None
                grads[:0] = [grad_weight, grad_bias]
                if i > 0 or needs_x:
                    grad = torch.mm(grad, weights[i])
        return None, grad if needs_x else None, *grads


_AS_IT_IS = nullcontext()


def _without_autocast(backend: ModuleType) -> AbstractContextManager:
    """Products stay float32, as the kernels take them: a backward pass may run under autocast, too."""
    if torch.is_autocast_enabled(backend.DEVICE_TYPE):
        return torch.autocast(backend.DEVICE_TYPE, enabled=False)
    return _AS_IT_IS
