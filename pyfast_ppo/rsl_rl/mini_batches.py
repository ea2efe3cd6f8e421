"""The mini-batches of an update: gathered from the rollout, and cut into pieces where that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from rsl_rl.storage import RolloutStorage
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from pyfast_ppo.ops.shared_row import first_row, is_shared_row
from pyfast_ppo.rsl_rl.mlp import has_own_ways
from pyfast_ppo.rsl_rl.policy import comes_from

AT_ONCE_BYTES = 2**28
"""Of a rollout's observations: up to here all mini-batches are gathered before the first step and kept for all epochs,
which saves a copy of them in each epoch but one. Beyond, which is images, the copy is memory that PPO does not need,
and the time that it saves is little beside that of the convolutions."""

_KNOWN_MODULES = ("torch.nn.modules.", "rsl_rl.")  # not torch.nn.utils: a spectral norm counts its calls

_OWN_METHODS = ("add_transition", "mini_batch_generator", "recurrent_mini_batch_generator")


def own_methods(storage: RolloutStorage) -> list[str]:
    """What a user's storage does in its own way, of what is done here without it otherwise."""
    return [
        name
        for name in _OWN_METHODS
        if name in vars(storage)
        or getattr(type(storage), name) is not getattr(RolloutStorage, name)
        or not comes_from("rsl_rl", getattr(type(storage), name))
    ]


def fits_at_once(observations: Iterable[Tensor]) -> bool:
    """Whether a copy of these groups of a rollout is small."""
    return sum(obs.nbytes for obs in observations) <= AT_ONCE_BYTES


def gathered(storage: RolloutStorage, rows: Tensor) -> RolloutStorage.Batch:
    """The mini-batch of these rows, of T · E."""

    def take(t: Any) -> Any:
        if isinstance(t, Tensor) and is_shared_row(t):
            return first_row(t).expand(len(rows), -1)
        return t.flatten(0, 1)[rows]

    return RolloutStorage.Batch(
        observations=take(storage.observations),
        actions=take(storage.actions),
        values=take(storage.values),
        advantages=take(storage.advantages),
        returns=take(storage.returns),
        old_actions_log_prob=take(storage.actions_log_prob),
        old_distribution_params=tuple(map(take, storage.distribution_params)),
    )


def rows_of(batch: RolloutStorage.Batch, rows: slice) -> RolloutStorage.Batch:
    """A part of a feed-forward mini-batch: views."""
    old_mean, old_std = batch.old_distribution_params
    return RolloutStorage.Batch(
        observations=batch.observations[rows],
        actions=batch.actions[rows],
        values=batch.values[rows],
        advantages=batch.advantages[rows],
        returns=batch.returns[rows],
        old_actions_log_prob=batch.old_actions_log_prob[rows],
        old_distribution_params=(old_mean[rows], old_std[rows]),
    )


def works_row_by_row(models: Iterable[nn.Module]) -> bool:
    """Whether nothing in the models would notice that a mini-batch comes in pieces.

    What is a user's may: it may look at statistics of the batch, or count its calls. So may a hook.
    """
    modules = [module for model in models for module in model.modules()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    return (
        all(type(module).__module__.startswith(_KNOWN_MODULES) for module in modules)
        and not any(_uses_statistics(module) for module in modules)
        and not any(has_own_ways(module) or "get_latent" in vars(module) for module in modules)
        and not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    )


def has_running_statistics(model: nn.Module) -> bool:
    """Of batches: each pass in training mode moves them."""
    return any(isinstance(module, _NormBase) and module.track_running_stats for module in model.modules())


@contextmanager
def statistics_at_rest(model: nn.Module) -> Iterator[None]:
    """Inside, normalizations over the batch use the statistics that they have, and do not move them."""
    normalizations = [m for m in model.modules() if isinstance(m, _NormBase) and m.training]
    for module in normalizations:
        module.training = False
    try:
        yield
    finally:
        for module in normalizations:
            module.training = True


def _uses_statistics(module: nn.Module) -> bool:
    """Of the batch."""
    return isinstance(module, _NormBase) and (module.training or module.running_mean is None)
