"""rsl_rl's MLPs in an update: which hidden layers run fused, and observations without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn as nn
from rsl_rl.models import MLPModel
from rsl_rl.modules import MLP, EmpiricalNormalization
from tensordict import TensorDict
from torch import Tensor
from torch.nn.modules import module as torch_module

from pyfast_ppo.ops.hidden_layers import hidden_layers

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ELU: "elu", nn.ReLU: "relu", nn.Tanh: "tanh"}
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


@contextmanager
def fused_hidden_layers(backend: ModuleType, *models: nn.Module) -> Iterator[None]:
    """The MLPs of these models run their pairs of a linear layer and an activation fused, where nothing speaks against.

    ``backend``: one of pyfast_ppo.backends, which may have nothing for it.
    """
    with ExitStack() as stack:
        for model in models if backend.FUSES_UPDATE else ():
            mlp = getattr(model, "mlp", None)
            if not isinstance(mlp, MLP) or "forward" in vars(mlp) or type(mlp).forward is not MLP.forward:
                continue  # it runs in its own way
            steps = _steps(backend, list(mlp))
            if len(steps) < len(mlp):
                _replace(stack, mlp, "forward", _forward_of(backend, mlp, steps))
        yield


@contextmanager
def observations_in_place(*models: nn.Module) -> Iterator[None]:
    """Models with one group of observations take it as it is, where rsl_rl copies it with torch.cat."""
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, MLPModel) and len(model.obs_groups) == 1 and only_reads_its_latent(model):
                _replace(stack, model, "get_latent", _get_latent_of(model))
        yield


def widest_layer(*models: nn.Module) -> int:
    """The largest number of units of a layer."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, nn.Linear)]
    return max((layer.out_features for layer in layers), default=1)


def _replace(stack: ExitStack, module: nn.Module, name: str, method: Callable) -> None:
    """Hides the method of the class."""
    setattr(module, name, method)
    stack.callback(delattr, module, name)


def only_reads_its_latent(model: MLPModel) -> bool:
    """Whether nothing of a user's sees it, who might write into it: rsl_rl hands out a copy."""
    if any(getattr(type(model), name) is not getattr(MLPModel, name) for name in ("forward", "get_latent")):
        return False
    if {"forward", "get_latent"} & vars(model).keys() or type(model.mlp) is not MLP:
        return False
    parts = (model.obs_normalizer, model.mlp, *model.mlp)
    known = type(model.obs_normalizer) in (nn.Identity, EmpiricalNormalization) and type(model.mlp[0]) is nn.Linear
    return known and not any(has_own_ways(part) for part in parts)


def latent_of(model: MLPModel) -> Callable[[TensorDict], Tensor]:
    """What gives its MLP's input: a single group as it is, where rsl_rl copies it."""
    groups, normalizer = model.obs_groups, model.obs_normalizer
    if len(groups) == 1:
        return lambda obs: normalizer(obs[groups[0]])
    return lambda obs: normalizer(torch.cat([obs[group] for group in groups], dim=-1))


def _get_latent_of(model: MLPModel) -> Callable[..., Tensor]:
    latent = latent_of(model)
    return lambda obs, masks=None, hidden_state=None: latent(obs)


class Fused(NamedTuple):
    """Linear layers one after the other, each with the same activation behind it."""

    activation: str
    layers: list[nn.Linear]

    def parameters(self) -> list[Tensor]:
        """W and b of each in turn."""
        return [parameter for layer in self.layers for parameter in (layer.weight, layer.bias)]


def _steps(backend: ModuleType, layers: list[nn.Module]) -> list[nn.Module | Fused]:
    """The layers, those linear ones together whose pairs with the next can be fused one after the other."""
    steps: list[nn.Module | Fused] = []
    remaining = iter([*layers, nn.Identity()])
    layer = next(remaining)
    for following in remaining:
        if isinstance(layer, nn.Linear) and _is_fusible(backend, layer, following):
            activation = _ACTIVATIONS[type(following)]
            last = steps[-1] if steps else None
            if not isinstance(last, Fused) or last.activation != activation:
                steps.append(last := Fused(activation, []))
            last.layers.append(layer)
            layer = next(remaining)  # the activation goes with it
        else:
            steps.append(layer)
            layer = following
    return steps


def fused_whole(backend: ModuleType, layers: list[nn.Module]) -> Fused | None:
    """If all of these layers are pairs that can be fused one after the other."""
    steps = _steps(backend, layers)
    fused = steps[0] if len(steps) == 1 else None
    return fused if isinstance(fused, Fused) and 2 * len(fused.layers) == len(layers) else None


def _forward_of(backend: ModuleType, mlp: MLP, steps: list[nn.Module | Fused]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[0] == 0 or not _takes(backend, x) or torch.is_autocast_enabled(x.device.type):
            return MLP.forward(mlp, x)
        for step in steps:
            x = hidden_layers(backend, step.activation, x, *step.parameters()) if isinstance(step, Fused) else step(x)
        return x

    return forward


def _takes(backend: ModuleType, t: Tensor) -> bool:
    return t.device.type == backend.DEVICE_TYPE and t.dtype == torch.float32


def _is_fusible(backend: ModuleType, layer: nn.Module, activation: nn.Module) -> bool:
    if type(layer) is not nn.Linear or type(activation) not in _ACTIVATIONS:
        return False
    if isinstance(activation, nn.ELU) and activation.alpha != 1.0:
        return False
    forwards = (type(layer).forward, type(activation).forward)
    if not all(forward.__module__.startswith("torch.") for forward in forwards):  # replaced for all
        return False
    if layer.bias is None or not layer.bias.is_contiguous():
        return False
    if not all(_takes(backend, parameter) for parameter in layer.parameters()):
        return False
    return not has_own_ways(layer) and not has_own_ways(activation)


def has_own_ways(module: nn.Module) -> bool:
    """Hooks that want to see what passes, or a forward of this one alone; ours are not there yet."""
    return any(hooks_of(module)) or any(hooks_of_all()) or "forward" in vars(module)


def hooks_of(module: nn.Module) -> list[dict]:
    """That see what passes."""
    return [getattr(module, f"_{name}") for name in _HOOKS]


def hooks_of_all() -> list[dict]:
    """Of all modules at once."""
    return [getattr(torch_module, f"_global_{name}") for name in _HOOKS]
