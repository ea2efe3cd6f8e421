"""What FusedPPO has to know of a policy and its action distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import torch
import torch.nn as nn
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import Distribution, GaussianDistribution
from rsl_rl.storage import RolloutStorage
from torch import Tensor
from torch.distributions import Normal

from pyfast_ppo.ops.gaussian import gaussian_log_prob
from pyfast_ppo.ops.shared_row import first_row, is_shared_row
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
        own = [
            name
            for name in formulas
            if name in vars(part) or getattr(type(part), name, None) is not getattr(base, name)
        ]
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


def comes_from(package: str, function: Callable) -> bool:
    """Users put other functions in the place of a class's, too."""
    return (getattr(function, "__module__", None) or "").partition(".")[0] == package


def normalizes(model: nn.Module) -> bool:
    """Its observations, as far as can be told."""
    return getattr(model, "obs_normalization", True)


def row_behind(std: Tensor) -> Tensor:
    """The [A] tensor that ``std`` was expanded from, if it was: its gradient then needs no sum over N rows."""
    base = std._base
    return base if base is not None and is_shared_row(std) and base.shape == std.shape[-1:] else std


def store_std_once(storage: RolloutStorage, transition: RolloutStorage.Transition) -> None:
    """Has the storage keep a std that is one row [A] as one row for the whole rollout, which it sees as [T, E, A].

    That it is one can be seen where it is expanded over the environments, and only there: a model may make a std of the
    state from whatever distribution it has. One that is not, or that came first, is kept in full.
    """
    mean, std = transition.distribution_params
    if storage.distribution_params is None and is_shared_row(std):
        num_steps = storage.num_transitions_per_env
        with torch.inference_mode(False):  # written to in and outside of inference mode
            means = torch.zeros(num_steps, *mean.shape, device=storage.device)
            row = torch.zeros(std.shape[-1], device=storage.device)
        storage.distribution_params = (means, row.expand(num_steps, *std.shape))
    if storage.distribution_params is not None and keeps_row(storage, std):
        transition.distribution_params = (mean,)


def keeps_row(storage: RolloutStorage, std: Tensor) -> bool:
    """Whether the storage has the std [E, A] now, as its row.

    A std that no row stands for needs all of [T, E, A]: then the storage gets that.
    """
    _, kept = storage.distribution_params
    if not is_shared_row(kept):
        return False
    if not is_shared_row(std):
        keep_all_stds(storage)
        return False
    if std.data_ptr() != kept.data_ptr():
        first_row(kept).copy_(first_row(std))
    return True


def keep_all_stds(storage: RolloutStorage) -> None:
    """Gives the storage memory for [T, E, A] stds where it had one row, which it then has in each place."""
    if storage.distribution_params is not None:
        with torch.inference_mode(False):
            storage.distribution_params = tuple(params.contiguous() for params in storage.distribution_params)


def sample_without_waiting(distribution: GaussianDistribution) -> Tensor:
    """What ``Normal.sample`` draws, to the bit, without its check of the std, for which the host waits on a GPU."""
    own = type(distribution).sample
    if own is not GaussianDistribution.sample or law_not_gaussian(distribution):
        return own(distribution)
    with torch.no_grad():
        return drawn(distribution.mean, distribution.std)


def drawn(mean: Tensor, std: Tensor) -> Tensor:
    """What ``Normal(mean, std).sample()`` draws, to the bit: [N, A]. ``std``: [A] or [N, A]."""
    return torch.randn_like(mean).mul_(std).add_(mean)


def log_prob_at_once(distribution: GaussianDistribution, outputs: Tensor, *, backend: str | None) -> Tensor:
    """``distribution.log_prob`` in one launch, where torch needs ten. ``backend``: as in FusedPPO."""
    own = type(distribution).log_prob
    if own is not GaussianDistribution.log_prob or law_not_gaussian(distribution):
        return own(distribution, outputs)
    return gaussian_log_prob(outputs, distribution.mean, distribution.std, backend=backend)


def mean_of(distribution: Distribution) -> Tensor:
    """In place of a sample: no random number is drawn."""
    return distribution.mean


class Instead:
    """Lets a policy's forward pass run with other ways of its distribution, as to draw actions, than those of the
    class."""

    def __init__(self, actor: MLPModel, **methods: Callable[..., Tensor]) -> None:
        """``methods``: by the names of what they replace."""
        self._actor = actor
        self._methods = methods

    @contextmanager
    def __call__(self) -> Iterator[None]:
        distribution = self._actor.distribution  # the user may have put in another one
        mine = {name: method for name, method in self._methods.items() if name not in vars(distribution)}
        for name, method in mine.items():
            setattr(distribution, name, partial(method, distribution))  # hides the method of the class
        try:
            yield
        finally:
            for name in mine:
                delattr(distribution, name)
