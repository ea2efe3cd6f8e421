"""What FusedPPO has to know of a policy and its action distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn as nn
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import Distribution, GaussianDistribution
from rsl_rl.storage import RolloutStorage
from torch import Tensor
from torch.distributions import Normal

from pyfast_ppo.ops.shared_row import is_shared_row
from pyfast_ppo.versions import release

NORMALIZES_IN_UPDATE = release(version("rsl-rl-lib")) >= (5, 5)
"""rsl_rl moves the observation normalizers once per iteration, in ``update()``; before 5.5 at each step of the
environment."""

_FORMULAS = ("log_prob", "kl_divergence", "entropy", "params", "mean", "std")
_MODEL_FORMULAS = ("get_output_log_prob", "get_kl_divergence", "output_entropy", "output_distribution_params")


def reason_not_fused(actor: MLPModel) -> str | None:
    """Why the fused loss does not compute what this policy computes, or None if it does."""
    distribution = getattr(actor, "distribution", None)
    if distribution is None:
        return f"{type(actor).__name__} has no distribution of rsl_rl"
    if not isinstance(distribution, GaussianDistribution):
        return f"{type(distribution).__name__} is not a Gaussian"
    for part, base, formulas in (
        (distribution, GaussianDistribution, _FORMULAS),
        (actor, MLPModel, _MODEL_FORMULAS),
    ):
        own = [name for name in formulas if getattr(type(part), name, None) is not getattr(base, name)]
        if own:
            return f"{type(part).__name__} has its own {', '.join(own)}"
    return None


def law_not_gaussian(distribution: Distribution) -> str | None:
    """Why the fused loss does not fit what this policy draws from, or None; known once it has acted."""
    drawn_from = getattr(distribution, "_distribution", None)
    if drawn_from is None or type(drawn_from) is Normal:
        return None
    return f"{type(distribution).__name__} draws from {type(drawn_from).__name__}, not from Normal"


def detach_last_forward(distribution: Distribution) -> None:
    """Keeps its numbers, for logs, without autograd's nodes: those bind parameters to the stream of that pass.

    A CUDA graph that is recorded later, on another stream, could not accumulate their gradients.
    """
    last = getattr(distribution, "_distribution", None)
    if last is not None:
        distribution._distribution = Normal(last.mean.detach(), last.stddev.detach(), validate_args=False)


def normalizes(model: nn.Module) -> bool:
    """Its observations, as far as can be told."""
    return getattr(model, "obs_normalization", True)


def std_is_parameter(distribution: Distribution) -> bool:
    """Whether the std depends on parameters only: then it is one row, the same for a whole rollout."""
    return type(distribution).update is GaussianDistribution.update


def row_behind(std: Tensor) -> Tensor:
    """The [A] tensor that ``std`` was expanded from, if it was: its gradient then needs no sum over N rows."""
    base = std._base
    return base if base is not None and is_shared_row(std) and base.shape == std.shape[-1:] else std


def store_std_once(storage: RolloutStorage, transition: RolloutStorage.Transition) -> None:
    """Has the storage keep a state-independent std as one row [A], which it sees as [T, E, A]."""
    mean, std = transition.distribution_params
    num_steps = storage.num_transitions_per_env
    if storage.distribution_params is None:
        means = torch.zeros(num_steps, *mean.shape, device=storage.device)
        row = torch.zeros(std.shape[-1], device=storage.device)
        storage.distribution_params = (means, row.expand(num_steps, *std.shape))
    first_row(storage.distribution_params[1]).copy_(first_row(std))
    transition.distribution_params = (mean,)


def first_row(t: Tensor) -> Tensor:
    """[..., A] -> [A]."""
    return t[(0,) * (t.dim() - 1)]


def sample_without_waiting(distribution: GaussianDistribution) -> Tensor:
    """What ``Normal.sample`` draws, to the bit, without its check of the std, for which the host waits on a GPU."""
    if law_not_gaussian(distribution):
        return type(distribution).sample(distribution)
    with torch.no_grad():
        mean, std = distribution.mean, distribution.std
        return torch.randn_like(mean).mul_(std).add_(mean)


def mean_of(distribution: Distribution) -> Tensor:
    """In place of a sample: no random number is drawn."""
    return distribution.mean


class SampleInstead:
    """Lets a policy's forward pass run with another way to draw actions, or without drawing any."""

    def __init__(self, distribution: Distribution, instead: Callable[[Any], Tensor]) -> None:
        """``instead``: a function of a module, so that this can be copied and pickled with its distribution."""
        self._distribution = distribution
        self._instead = instead

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if "sample" in vars(self._distribution):  # the user's own
            yield
            return
        self._distribution.sample = partial(self._instead, self._distribution)  # hides the method of the class
        try:
            yield
        finally:
            del self._distribution.sample
