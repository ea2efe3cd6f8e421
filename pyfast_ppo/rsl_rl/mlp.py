"""The hidden layers of rsl_rl's MLPs on the CPU: bias and activation in one pass over memory, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise, takewhile

import torch
import torch.nn as nn
from rsl_rl.modules import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast_ppo.backends import cpu


class _HiddenLayers(torch.autograd.Function):
    """x [N, H₀] -> elu(x Wᵀ + b) [N, H₁] -> …; ``parameters``: W and b of each layer."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        outputs, weights = [x], parameters[::2]
        for weight, bias in zip(weights, parameters[1::2], strict=True):
            outputs.append(cpu.add_bias_and_elu(torch.mm(outputs[-1], weight.t()), bias))
        ctx.save_for_backward(*outputs, *weights)
        return outputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        outputs, weights = ctx.saved_tensors[: count + 1], ctx.saved_tensors[count + 1 :]
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


@contextmanager
def fused_hidden_layers(*models: nn.Module) -> Iterator[None]:
    """The MLPs of these models run their pairs of a linear layer and an ELU fused, where nothing speaks against it."""
    with ExitStack() as stack:
        for mlp in (getattr(model, "mlp", None) for model in models):
            if mlp is None or "forward" in vars(mlp) or type(mlp).forward is not MLP.forward:
                continue  # it runs in its own way
            if any(_is_fusible(*pair) for pair in pairwise(mlp)):
                mlp.forward = _forward_of(mlp)  # hides the method of the class
                stack.callback(delattr, mlp, "forward")
        yield


def widest_layer(*models: nn.Module) -> int:
    """The largest number of units of a layer."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, nn.Linear)]
    return max((layer.out_features for layer in layers), default=1)


def _forward_of(mlp: MLP):
    def forward(x: Tensor) -> Tensor:
        layers = list(mlp)
        while layers:
            run = _fusible_run(layers) if _takes(x) else []
            if run:
                x = _HiddenLayers.apply(x, *(parameter for layer in run for parameter in (layer.weight, layer.bias)))
                del layers[: 2 * len(run)]
            else:
                x = layers.pop(0)(x)
        return x

    return forward


def _fusible_run(layers: list[nn.Module]) -> list[nn.Module]:
    """The linear layers of the pairs that can be fused, from the first on."""
    pairs = zip(layers[::2], layers[1::2], strict=False)
    return [layer for layer, _ in takewhile(lambda pair: _is_fusible(*pair), pairs)]


def _takes(x: Tensor) -> bool:
    return x.dim() == 2 and x.shape[0] > 0 and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _is_fusible(layer: nn.Module, activation: nn.Module) -> bool:
    if type(layer) is not nn.Linear or type(activation) is not nn.ELU or activation.alpha != 1.0:
        return False
    if layer.bias is None or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in layer.parameters()):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(
        getattr(part, name) for part in (layer, activation) for name in hooks
    )  # they want to see what passes
