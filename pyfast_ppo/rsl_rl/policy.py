"""What FusedPPO has to know of a policy and its action distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import Distribution, GaussianDistribution
from torch import Tensor

from pyfast_ppo.ops._arguments import is_shared_row

_FORMULAS = ("log_prob", "kl_divergence", "entropy", "params", "mean", "std")
_MODEL_FORMULAS = ("get_output_log_prob", "get_kl_divergence", "output_entropy", "output_distribution_params")


def reason_not_fused(actor: MLPModel) -> str | None:
    """Why the fused loss does not compute what this policy computes, or None if it does."""
    if not isinstance(actor.distribution, GaussianDistribution):
        return f"{type(actor.distribution).__name__} is not a Gaussian"
    for part, base, formulas in (
        (actor.distribution, GaussianDistribution, _FORMULAS),
        (actor, MLPModel, _MODEL_FORMULAS),
    ):
        own = [name for name in formulas if getattr(type(part), name) is not getattr(base, name)]
        if own:
            return f"{type(part).__name__} has its own {', '.join(own)}"
    return None


def std_is_parameter(distribution: Distribution) -> bool:
    """Whether the std depends on parameters only: then it is one row, the same for a whole rollout."""
    return type(distribution).update is GaussianDistribution.update


def row_behind(std: Tensor) -> Tensor:
    """The [A] tensor that ``std`` was expanded from, if it was: its gradient then needs no sum over N rows."""
    base = std._base
    return base if base is not None and is_shared_row(std) and base.shape == std.shape[-1:] else std


def first_row(t: Tensor) -> Tensor:
    """[..., A] -> [A]."""
    return t[(0,) * (t.dim() - 1)]


class SampleSkipper:
    """Lets a policy's forward pass run without drawing the actions that an update does not use."""

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution
        self._instead: Callable[[], Tensor] = lambda: distribution.mean

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._distribution.sample = self._instead  # hides the method of the class
        try:
            yield
        finally:
            del self._distribution.sample
