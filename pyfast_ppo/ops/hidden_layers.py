"""Hidden layers of an MLP with ELU on the CPU: bias and activation in one pass over memory, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_ppo.backends import cpu
from pyfast_ppo.ops._autograd import first_order_only


def hidden_layers(x: Tensor, *parameters: Tensor) -> Tensor:
    """x [N, H₀] -> elu(x Wᵀ + b) [N, H₁] -> …, differentiable once in every argument.

    Args:
        x: [N, H₀], N > 0.
        parameters: W [H₁, H₀] and b [H₁] of each layer in turn.

    All are float32 on the CPU. That is for the caller to see to, who can take torch's own way instead.
    """
    return _HiddenLayers.apply(x, *parameters)


class _HiddenLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        outputs, weights = [x], parameters[::2]
        for weight, bias in zip(weights, parameters[1::2], strict=True):
            outputs.append(cpu.add_bias_and_elu(torch.mm(outputs[-1], weight.t()), bias))
        ctx.save_for_backward(*outputs, *weights)
        ctx.inputs = parameters[1::2]  # the others are saved
        return outputs[-1]

    @staticmethod
    @first_order_only
    def backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(saved) // 2
        outputs, weights = saved[: count + 1], saved[count + 1 :]
        needs_x, *needs = ctx.needs_input_grad
        grads: list[Tensor | None] = []
        grad = grad.contiguous()
        for i in reversed(range(count)):
            last = i == count - 1  # its gradient is autograd's, the others are our own
            grad, grad_bias = cpu.add_bias_and_elu_backward(grad, outputs[i + 1], in_place=not last)
            grad_weight = torch.mm(grad.t(), outputs[i]) if needs[2 * i] else None
            grads[:0] = [grad_weight, grad_bias]
            if i > 0 or needs_x:
                grad = torch.mm(grad, weights[i])
        return grad if needs_x else None, *grads
