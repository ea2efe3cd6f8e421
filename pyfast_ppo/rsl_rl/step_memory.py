"""The memory of each step of a rollout, as views that are made once: each takes the host as long as a small launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor


class StepMemory(NamedTuple):
    """Of one step of E environments."""

    observations: TensorDict  # [E, ...] each
    actions: Tensor  # [E, A]
    log_prob: Tensor  # [E, 1]
    values: Tensor  # [E, 1]
    params: tuple[Tensor, ...]  # mean and std, [E, A] each; none before the first transition
    rewards: Tensor  # [E, 1]
    dones: Tensor  # [E, 1]


class RolloutMemory:
    """Of all steps of a storage."""

    def __init__(self, storage: RolloutStorage) -> None:
        self._groups = list(storage.observations.items())
        self._tensors = _tensors(storage)
        self._params = storage.distribution_params
        with torch.inference_mode(False):  # written to in and outside of inference mode
            self.steps = [_step(storage, i) for i in range(storage.num_transitions_per_env)]

    def __reduce__(self) -> tuple:
        """Copies of an algorithm make their own."""
        return type(None), ()

    def is_of(self, storage: RolloutStorage) -> bool:
        """Whether it is the storage's still."""
        same = all(a is b for a, b in zip(_tensors(storage), self._tensors, strict=True))
        same = same and len(self.steps) == storage.num_transitions_per_env and self.has_params_of(storage)
        return same and all(storage.observations.get(name) is group for name, group in self._groups)

    def has_params_of(self, storage: RolloutStorage) -> bool:
        """They alone may become others within a rollout."""
        return storage.distribution_params is self._params


def _tensors(storage: RolloutStorage) -> tuple:
    st = storage
    return st.observations, st.actions, st.actions_log_prob, st.values, st.rewards, st.dones


def _step(storage: RolloutStorage, i: int) -> StepMemory:
    return StepMemory(
        storage.observations[i],
        storage.actions[i],
        storage.actions_log_prob[i],
        storage.values[i],
        tuple(params[i] for params in storage.distribution_params or ()),
        storage.rewards[i],
        storage.dones[i],
    )
