"""The hidden layers of rsl_rl's MLPs on the CPU: bias and activation in one pass over memory, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
import torch.nn as nn
from rsl_rl.modules import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfast_ppo.backends import cpu


class _LinearELU(torch.autograd.Function):
    """elu(x Wᵀ + b), [N, H]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = cpu.add_bias_and_elu(torch.mm(x, weight.t()), bias)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        grad, grad_bias = cpu.add_bias_and_elu_backward(grad.contiguous(), y)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return torch.mm(grad, weight) if needs_x else None, torch.mm(grad.t(), x) if needs_weight else None, grad_bias


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
            layer = layers.pop(0)
            if layers and _takes(x) and _is_fusible(layer, layers[0]):
                layers.pop(0)
                x = _LinearELU.apply(x, layer.weight, layer.bias)
            else:
                x = layer(x)
        return x

    return forward


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
