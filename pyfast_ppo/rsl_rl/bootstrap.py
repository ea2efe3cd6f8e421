"""The value of what would have come after a time-out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rsl_rl.models import MLPModel
from tensordict import TensorDict
from torch import Tensor


class FinalValues:
    """V of the observations at which episodes were cut off, for one rollout of T steps in E environments.

    A feed-forward critic sees all of them at once, after the rollout. A recurrent one, or one whose normalizer moves
    while the rollout is collected, sees them at their step, and gets its hidden state back. Nothing waits for the
    device.
    """

    def __init__(self, critic: MLPModel, groups: list[str], values: Tensor, at_once: bool) -> None:
        """``groups``: the critic's observation groups. ``values``: [T, E, 1], as the storage has them."""
        self._critic = critic
        self._groups = groups
        self._at_once = at_once
        self.only_time_outs = values.device.type == "cpu"  # nobody waits for a count of rows there
        with torch.inference_mode(False):  # written to in and outside of inference mode
            self._values = torch.zeros_like(values)  # [T, E, 1]
            self._time_outs = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)  # [T, E]
        self._obs: dict[str, Tensor] = {}  # [T, E, ...] each
        self.any_recorded = False  # since the rollout began

    def record(self, step: int, final_obs: Mapping[str, Tensor], time_outs: Tensor) -> None:
        """The observations before the resets of one step, groups [E, ...], and which of them followed a time-out, [E].

        Raises:
            TypeError: They are not observation groups.
            KeyError: A group is missing that the critic needs.
        """
        if not isinstance(final_obs, Mapping | TensorDict):
            raise TypeError(
                "extras['final_obs'] must be a TensorDict or a dictionary of observation groups, [E, ...] each, got "
                f"{type(final_obs).__name__}"
            )
        missing = [name for name in self._groups if name not in final_obs.keys()]  # noqa: SIM118, a TensorDict's own
        if missing:
            raise KeyError(
                f"extras['final_obs'] lacks the groups {missing} of the critic; it has {sorted(final_obs.keys())}"
            )
        self.any_recorded = True
        self._time_outs[step].copy_(time_outs)
        if self._at_once:
            if not self._obs:
                self._obs = {name: self._room_for(final_obs[name]) for name in self._groups}
            for name, kept in self._obs.items():
                kept[step].copy_(final_obs[name])
            return
        hidden_state = self._critic.get_hidden_state()
        obs = TensorDict({name: final_obs[name] for name in self._groups}, batch_size=time_outs.shape)
        with torch.no_grad():
            self._values[step] = self._critic(obs.to(self._values.device))
        self._critic.reset(hidden_state=hidden_state)

    def _room_for(self, obs: Tensor) -> Tensor:
        """[E, ...] -> [T, E, ...]"""
        with torch.inference_mode(False):
            return torch.zeros(self._values.shape[0], *obs.shape, dtype=obs.dtype, device=self._values.device)

    def collect(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(time-outs [T, E], values [T, E, 1], meaningful there); (None, None) if no step was recorded."""
        if not self.any_recorded:
            return None, None
        if self._obs:
            values = self._values.flatten(0, 1)  # a view
            obs = TensorDict({k: obs.flatten(0, 1) for k, obs in self._obs.items()}, batch_size=values.shape[:1])
            with torch.no_grad():
                if self.only_time_outs:
                    rows = self._time_outs.flatten().nonzero().squeeze(-1)
                    if len(rows) > 0:
                        values[rows] = self._critic(obs[rows])
                else:
                    values.copy_(self._critic(obs))
        return self._time_outs, self._values

    def memory(self) -> list[Tensor]:
        """What ``collect`` reads, and writes to."""
        return [self._values, self._time_outs, *self._obs.values()]

    def clear(self) -> None:
        """For the next rollout."""
        if self.any_recorded:
            self._time_outs.zero_()
            self.any_recorded = False
