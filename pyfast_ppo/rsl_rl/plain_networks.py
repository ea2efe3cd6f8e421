"""Actor and critic that are plain MLPs: their passes written out, without modules, distributions and autograd.

Those took the host more time than all else of an update (docs/performance.md), and on a GPU it is the host that small
networks wait for. Hidden layers are the fused ones in a rollout, too: the actions are those of rsl_rl to rounding.
"""

from __future__ import annotations

import functools
import math
from itertools import chain
from numbers import Real
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import GaussianDistribution
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal

from pyfast_ppo.ops.hidden_layers import backward_pass, forward_pass, last_output
from pyfast_ppo.rsl_rl.mlp import fused_whole, has_own_ways, hooks_of, hooks_of_all, latent_of, only_reads_its_latent
from pyfast_ppo.rsl_rl.policy import comes_from, drawn, reason_not_fused


class Acted(NamedTuple):
    """What a step of a rollout stores of both networks, for E environments."""

    actions: Tensor  # [E, A]
    log_prob: Tensor  # [E], of the actions
    values: Tensor  # [E, 1]
    mean: Tensor  # [E, A]
    std: Tensor  # [E, A], one row


class PlainNetworks:
    """Forward and backward passes of both, which leave gradients where autograd leaves them, and the same."""

    def __init__(self, backend: ModuleType, actor: MLPModel, critic: MLPModel) -> None:
        self._models = actor, critic
        self._parts = _Parts(actor, critic)
        self._backend = backend
        self._actor, self._critic = _PlainMlp(backend, actor), _PlainMlp(backend, critic)
        self._distribution = actor.distribution
        self._std = _Std(actor.distribution)

    def __reduce__(self) -> tuple:
        """Copies of an algorithm have none until they ask for their own."""
        return type(None), ()

    @staticmethod
    def for_update(backend: ModuleType, actor: nn.Module, critic: nn.Module, obs: TensorDict) -> PlainNetworks | None:
        """None where something about them is unusual, or ``backend``, one of pyfast_ppo.backends, does not fuse them.

        ``obs``: the rollout's, whose types count. What is changed later shows in the next update. Hooks of the nodes in
        which autograd accumulates gradients cannot be seen.
        """
        return None if _autograd_is_watched() else PlainNetworks._of(backend, actor, critic, obs)

    @staticmethod
    def for_rollout(backend: ModuleType, actor: nn.Module, critic: nn.Module, obs: TensorDict) -> PlainNetworks | None:
        """As for an update. ``serve`` tells whether anything has changed."""
        plain = PlainNetworks._of(backend, actor, critic, obs)
        if plain is None or reason_not_fused(actor):
            return None
        ways = (type(plain._distribution).sample, type(plain._distribution).log_prob)
        usual = ways == (GaussianDistribution.sample, GaussianDistribution.log_prob)
        return plain if usual and all(comes_from("rsl_rl", way) for way in ways) else None

    @staticmethod
    def _of(backend: ModuleType, actor: nn.Module, critic: nn.Module, obs: TensorDict) -> PlainNetworks | None:
        if not backend.FUSES_UPDATE or torch.is_autocast_enabled(backend.DEVICE_TYPE):
            return None
        if not isinstance(actor, MLPModel) or not isinstance(critic, MLPModel):
            return None
        if not all(_is_plain(backend, model, obs) for model in (actor, critic)):
            return None
        # a critic's distribution may make something else of its output
        if critic.distribution is not None or not _is_plain_gaussian(actor.distribution):
            return None
        return PlainNetworks(backend, actor, critic)

    def serve(self, actor: nn.Module, critic: nn.Module) -> bool:
        """Whether they stand for these as they are now, where autograd asks for nothing.

        Numbers that are replaced, as the std's range, and functions of a class show in the next rollout.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self._backend.DEVICE_TYPE):
            return False
        return (actor, critic) == self._models and self._parts.are_as_before()

    def act(self, obs: TensorDict) -> Acted:
        """As rsl_rl's forward passes with the same random numbers, to rounding; and so is the actor's distribution."""
        mean, std = self._actor.evaluate(obs), self._std.forward()
        self._distribution._distribution = law = Normal(mean, std)
        actions = drawn(mean, std)
        log_prob = self._backend.gaussian_log_prob(actions, mean, std)
        return Acted(actions, log_prob, self._critic.evaluate(obs), mean, law.stddev)

    def values(self, obs: TensorDict) -> Tensor:
        """[N, 1]."""
        return self._critic.evaluate(obs)

    @torch.no_grad()
    def forward(self, obs: TensorDict, *, sample: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [N, A], std [A], values [N, 1]). ``sample``: draws random numbers as the actor's forward pass does.

        The actor's distribution is then as if that had gone through the modules.
        """
        mean, std = self._actor.forward(obs), self._std.forward()
        self._distribution._distribution = Normal(mean, std)
        if sample:
            self._distribution.sample()
        return mean, std, self._critic.forward(obs)

    @torch.no_grad()
    def backward(self, grad_mean: Tensor, grad_std: Tensor, grad_values: Tensor) -> None:
        """Of the last forward pass; adds to the gradients that parameters have."""
        self._actor.backward(grad_mean)
        self._critic.backward(grad_values)
        self._std.backward(grad_std)


class _Parts:
    """Of models: notices other modules and parameters, and functions and hooks that were added.

    Asked in each step of a rollout: hence no loop in Python.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._modules = [part for model in models for part in model.modules()]
        self._holders: list[dict] = [held for part in self._modules for held in (part._modules, part._parameters)]
        self._hooks = [hooks for part in self._modules for hooks in hooks_of(part)] + hooks_of_all()
        self._held = self._contents()  # nobody else can have their ids
        self._before = self._state()

    def are_as_before(self) -> bool:
        return self._state() == self._before

    def _contents(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _state(self) -> tuple[list, ...]:
        sizes = map(len, chain(map(vars, self._modules), self._hooks))
        return list(map(type, self._modules)), list(sizes), list(map(id, self._contents()))


class _PlainMlp:
    def __init__(self, backend: ModuleType, model: MLPModel) -> None:
        self._backend = backend
        self._latent = latent_of(model)
        *hidden, self._last = model.mlp
        fused = fused_whole(backend, hidden)
        assert fused is not None  # of() has asked
        self._activation, self._hidden = fused.activation, fused.parameters()
        self._needs = [parameter.requires_grad for parameter in self._hidden]
        self._outputs: list[Tensor] = []

    def evaluate(self, obs: TensorDict) -> Tensor:
        """Without a backward pass to come."""
        x = last_output(self._backend, self._activation, self._latent(obs), self._hidden)
        return F.linear(x, self._last.weight, self._last.bias)

    def forward(self, obs: TensorDict) -> Tensor:
        self._outputs = forward_pass(self._backend, self._activation, self._latent(obs), self._hidden)
        return F.linear(self._outputs[-1], self._last.weight, self._last.bias)

    def backward(self, grad: Tensor) -> None:
        last, outputs, self._outputs = self._last, self._outputs, []
        if last.bias.requires_grad:
            _add_gradient(last.bias, grad.sum(0))
        if last.weight.requires_grad:
            _add_gradient(last.weight, torch.mm(grad.t(), outputs[-1]))
        if not any(self._needs):
            return
        grad = torch.mm(grad, last.weight)
        weights = self._hidden[::2]
        _, grads = backward_pass(
            *(self._backend, self._activation, outputs, weights, grad, self._needs), needs_x=False, in_place=True
        )
        for parameter, gradient in zip(self._hidden, grads, strict=True):
            if gradient is not None:
                _add_gradient(parameter, gradient)


class _Std:
    """The std of a ``GaussianDistribution``, or e to its logarithm, within its range."""

    def __init__(self, distribution: GaussianDistribution) -> None:
        self._is_log = distribution.std_type == "log"
        self._parameter = self.parameter_of(distribution)
        self._range = distribution.log_std_range if self._is_log else distribution.std_range
        # hardtanh has no gradient at its bounds: where clamp has one, they are the numbers beside
        self._outside = list(self._range)
        if _clamp_has_gradient_at_its_bounds():
            self._outside = [_beside(self._range[0], -math.inf), _beside(self._range[1], math.inf)]
        self._std = torch.empty(0)  # of the last forward pass

    @staticmethod
    def parameter_of(distribution: GaussianDistribution) -> Tensor:
        return distribution.log_std_param if distribution.std_type == "log" else distribution.std_param

    def forward(self) -> Tensor:
        clamped = self._parameter.clamp(*self._range)
        self._std = clamped.exp() if self._is_log else clamped
        return self._std

    def backward(self, grad: Tensor) -> None:
        if not self._parameter.requires_grad:
            return
        if self._is_log:
            grad = grad * self._std
        # one launch, where autograd compares with both bounds, and chooses, in five
        _add_gradient(self._parameter, torch.ops.aten.hardtanh_backward(grad, self._parameter, *self._outside))


@functools.cache
def _clamp_has_gradient_at_its_bounds() -> bool:
    """torch 2.14 took it away; asked of torch itself, which autograd's results are compared with."""
    with torch.inference_mode(False), torch.enable_grad():
        at_bound = torch.zeros(1, device="cpu", requires_grad=True)
        (grad,) = torch.autograd.grad(at_bound.clamp(0.0, 1.0), at_bound)
    return bool(grad)


def _beside(bound: float, towards: float) -> float:
    """The next number of float32."""
    return float(np.nextafter(np.float32(bound), np.float32(towards)))


def _add_gradient(parameter: Tensor, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad


def _autograd_is_watched() -> bool:
    """Or switched off, so that it would refuse."""
    saved_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not before torch 2.7
    watched = saved_hooks is not None and saved_hooks(True) is not None
    return watched or torch.is_anomaly_enabled() or not torch.is_grad_enabled()


def _is_plain(backend: ModuleType, model: MLPModel, obs: TensorDict) -> bool:
    """Whether the model is rsl_rl's own, of linear layers with one of some activations between, and nobody else has a
    part in it."""
    if has_own_ways(model) or not only_reads_its_latent(model) or type(model).__call__ is not nn.Module.__call__:
        return False
    functions = (type(model).forward, type(model).get_latent, type(model.mlp).forward)
    if not all(comes_from("rsl_rl", f) for f in functions):
        return False
    if not all(obs[name].dtype == torch.float32 for name in model.obs_groups):
        return False
    if any(t.dtype.is_floating_point and t.dtype != torch.float32 for t in model.obs_normalizer.buffers()):
        return False
    *hidden, last = model.mlp
    if type(last) is not nn.Linear or has_own_ways(last) or fused_whole(backend, hidden) is None:
        return False
    linear = [layer for layer in model.mlp if isinstance(layer, nn.Linear)]
    return all(_is_plain_parameter(t) for layer in linear for t in (layer.weight, layer.bias))


def _is_plain_gaussian(distribution: object) -> bool:
    """Whether its std is a parameter for each action, or e to it, within a range."""
    if not isinstance(distribution, GaussianDistribution) or any(map(callable, vars(distribution).values())):
        return False
    update = type(distribution).update
    if update is not GaussianDistribution.update or not comes_from("rsl_rl", update):
        return False
    std = _Std.parameter_of(distribution)
    if not _is_plain_parameter(std) or std.shape != (distribution.output_dim,):
        return False
    return all(isinstance(bound, Real) for bound in (*distribution.std_range, *distribution.log_std_range))


def _is_plain_parameter(parameter: object) -> bool:
    """Whether autograd would do nothing but put a gradient there."""
    if type(parameter) is not nn.Parameter or parameter.dtype != torch.float32 or not parameter.is_contiguous():
        return False
    return not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
