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
    groups: tuple[Tensor, ...]  # those that are in it
    actions: Tensor  # [E, A]
    log_prob: Tensor  # [E]
    values: Tensor  # [E, 1]
    params: tuple[Tensor, ...]  # mean and std, [E, A] each; none before the first transition
    rewards: Tensor  # [E, 1]
    dones: Tensor  # [E, 1]

    def is_in(self, transition: RolloutStorage.Transition) -> bool:
        """Whether the transition has nothing but this, and its outcome."""
        return (
            transition.observations is self.observations
            and transition.actions is self.actions
            and transition.actions_log_prob is self.log_prob
            and transition.values is self.values
            and transition.distribution_params is self.params
            and [*map(id, self.observations.values())] == [*map(id, self.groups)]
        )


class RolloutMemory:
    """Of all steps of a storage."""

    def __init__(self, storage: RolloutStorage) -> None:
        self._tensors = _tensors(storage)
        with torch.inference_mode(False):  # written to in and outside of inference mode
            self.steps = [_step(storage, i) for i in range(storage.num_transitions_per_env)]

    def __reduce__(self) -> tuple:
        """Copies of an algorithm make their own."""
        return type(None), ()

    def is_of(self, storage: RolloutStorage) -> bool:
        """Whether it is the storage's still."""
        return [*map(id, _tensors(storage))] == [*map(id, self._tensors)]


def _tensors(storage: RolloutStorage) -> tuple:
    st = storage
    groups = st.observations.values()
    return (
        st.observations,
        *groups,
        st.actions,
        st.actions_log_prob,
        st.values,
        st.rewards,
        st.dones,
        st.distribution_params,
    )


def _step(storage: RolloutStorage, i: int) -> StepMemory:
    observations = storage.observations[i]
    return StepMemory(
        observations,
        tuple(observations.values()),
        storage.actions[i],
        storage.actions_log_prob[i, :, 0],
        storage.values[i],
        tuple(params[i] for params in storage.distribution_params or ()),
        storage.rewards[i],
        storage.dones[i],
    )
