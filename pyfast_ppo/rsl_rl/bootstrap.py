"""The value of what would have come after a time-out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rsl_rl.models import MLPModel
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.rsl_rl.mini_batches import fits_at_once, statistics_at_rest


class FinalValues:
    """V of the observations at which episodes were cut off, for one rollout of T steps in E environments.

    A feed-forward critic sees all of them at once, after the rollout, unless they are large. A recurrent one, or one
    whose normalizer moves while the rollout is collected, sees them at their step, and gets its hidden state back.
    Nothing waits for the device.
    """

    def __init__(self, critic: MLPModel, groups: Iterable[str], storage: RolloutStorage, same_later: bool) -> None:
        """Make room for the values.

        Args:
            critic: Gives them.
            groups: Its observation groups.
            storage: Of the rollouts, for shapes and dtypes.
            same_later: After the rollout the critic gives the values that it would give at their step.
        """
        self._critic = critic
        # [T, E, ...] each, without memory
        self._like = {name: torch.empty_like(storage.observations[name], device="meta") for name in groups}
        self._at_once = same_later and fits_at_once(self._like.values())
        values = storage.values
        self.only_time_outs = values.device.type == "cpu"  # nobody waits for a count of rows there
        with torch.inference_mode(False):  # written to in and outside of inference mode
            self._values = torch.zeros_like(values)  # [T, E, 1]
            self._time_outs = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)  # [T, E]
            self._num_nonfinite = torch.zeros((), dtype=torch.int64, device=values.device)
        self._obs: dict[str, Tensor] = {}  # [T, E, ...] each
        self._published = False  # in any rollout
        self.any_recorded = False  # since the rollout began

    def fits(self, critic: MLPModel, storage: RolloutStorage) -> bool:
        """Whether this was made for such a critic and such rollouts."""
        shapes = {name: group.shape for name, group in storage.observations.items()}
        same_groups = all(shapes.get(name) == like.shape for name, like in self._like.items())
        return self._critic is critic and self._values.shape == storage.values.shape and same_groups

    def groups(self, final_obs: Any) -> dict[str, Tensor]:
        """Those of the observations before the resets of one step that the critic needs, [E, ...] each.

        Raises:
            TypeError: They are not observation groups, or a group is no tensor, nor an array.
            KeyError: A group is missing that the critic needs.
            ValueError: A group has another shape than in the observations.
        """
        if not isinstance(final_obs, Mapping | TensorDict):
            raise TypeError(
                "extras['final_obs'] must be a TensorDict or a dictionary of observation groups, [E, ...] each, got "
                f"{type(final_obs).__name__}"
            )
        missing = [name for name in self._like if name not in final_obs.keys()]  # noqa: SIM118, a TensorDict's own
        if missing:
            raise KeyError(
                f"extras['final_obs'] lacks the groups {missing} of the critic; it has {sorted(final_obs.keys())}"
            )
        return {name: _group(name, final_obs[name], like) for name, like in self._like.items()}

    def record(self, step: int, groups: dict[str, Tensor], time_outs: Tensor) -> None:
        """The observations before the resets of one step, and which of them followed a time-out, [E]."""
        self._published = self.any_recorded = True
        self._time_outs[step].copy_(time_outs)
        if self._at_once:
            if not self._obs:
                with torch.inference_mode(False):
                    device = self._values.device
                    self._obs = {name: torch.zeros_like(like, device=device) for name, like in self._like.items()}
            for name, kept in self._obs.items():
                kept[step].copy_(groups[name])
            return
        hidden_state = self._critic.get_hidden_state()
        groups = {name: group.to(self._values.device, self._like[name].dtype) for name, group in groups.items()}
        obs = TensorDict(groups, batch_size=time_outs.shape)
        self._evaluate(obs, self._time_outs[step], self._values[step])
        self._critic.reset(hidden_state=hidden_state)

    def collect(self, stored: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(time-outs [T, E], values [T, E, 1], meaningful there); (None, None) if no step was recorded.

        ``stored``: V(s_t), [T, E, 1], which stands in where the value is not finite: what rsl_rl bootstraps from. One
        frame of a simulator that diverged in the last step of an episode would otherwise spoil the whole rollout.
        """
        if not self.any_recorded:
            return None, None
        if self._obs:
            values = self._values.flatten(0, 1)  # a view
            obs = TensorDict({k: obs.flatten(0, 1) for k, obs in self._obs.items()}, batch_size=values.shape[:1])
            self._evaluate(obs, self._time_outs.flatten(), values)
        lost = self._time_outs.unsqueeze(-1) & ~torch.isfinite(self._values)
        self._num_nonfinite.copy_(lost.sum())
        self._values.copy_(torch.where(lost, stored, self._values))
        return self._time_outs, self._values

    def _evaluate(self, obs: TensorDict, time_outs: Tensor, values: Tensor) -> None:
        """Writes V of N observations to ``values``, [N, 1]: of those of the time-outs, [N], or of all."""
        with torch.no_grad(), statistics_at_rest(self._critic):
            if not self.only_time_outs or self._critic.is_recurrent:
                values.copy_(self._critic(obs))
            elif len(rows := time_outs.nonzero().squeeze(-1)) > 0:
                values[rows] = self._critic(obs[rows])

    def counts(self) -> dict[str, Tensor]:
        """For ``loss_dict``, of the last rollout: nothing where the environment publishes no final observations."""
        return {"nonfinite_final_values": self._num_nonfinite} if self._published else {}

    def memory(self) -> list[Tensor]:
        """What ``collect`` reads, and writes to."""
        return [self._values, self._time_outs, self._num_nonfinite, *self._obs.values()]

    def begin(self) -> None:
        """A rollout begins; the one before may have been left without its returns."""
        self.clear()
        if self._published:
            self._num_nonfinite.zero_()

    def clear(self) -> None:
        """What was recorded is not needed any more."""
        if self.any_recorded:
            self._time_outs.zero_()
            self.any_recorded = False


def _group(name: str, obs: Any, like: Tensor) -> Tensor:
    """The group of one step, [E, ...], as a tensor of the shape that the storage has, ``like`` [T, E, ...]."""
    if not isinstance(obs, Tensor):
        try:
            obs = torch.as_tensor(obs)
        except (TypeError, ValueError, RuntimeError):
            message = f"extras['final_obs'][{name!r}] must be a tensor [E, ...], got {type(obs).__name__}"
            raise TypeError(message) from None
    if obs.shape != like.shape[1:]:
        raise ValueError(
            f"extras['final_obs'][{name!r}] has the shape {tuple(obs.shape)}, but the observation group has "
            f"{tuple(like.shape[1:])}: hand out a row for each environment; rows that are not done are not looked at"
        )
    return obs
