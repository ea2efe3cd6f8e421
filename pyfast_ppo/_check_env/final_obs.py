"""Findings about ``extras["final_obs"]``, the observations before the reset."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import Groups, copied, count, groups_of, rows_with, same_rows
from pyfast_ppo._check_env.step import Step


def no_final_obs(step: Step) -> Finding | None:
    if step.extras.get("final_obs") is not None or not step.time_outs.any():
        return None
    return Finding(
        "no-final-obs",
        "episodes are cut off by time-outs, but extras['final_obs'], the observations before the reset, are missing:"
        " the value of what would have come is then taken from the observation before, as rsl_rl does.",
        "use the wrapper of pyfast_ppo.isaaclab or pyfast_ppo.mjlab, which hands them out; where episodes are long,"
        " it hardly matters.",
        is_note=True,
    )


def _non_finite(step: Step) -> Finding | None:
    ended = step.time_outs & ~step.terminated  # nothing takes a value from the others
    for name, values in groups_of(step.extras.get("final_obs")).items():
        if values.shape[:1] != ended.shape:
            continue  # another finding
        rows = rows_with(~torch.isfinite(values)) & ended
        if rows.any():
            return Finding(
                "non-finite-final-obs",
                f"extras['final_obs'][{name!r}] is NaN or infinite in {count(rows)} whose episode a time-out cut off:"
                " FusedPPO then takes the value of the observation before, as rsl_rl does, and counts it as"
                " nonfinite_final_values.",
                "end an episode whose simulation has diverged as terminated: what follows it has no value.",
            )
    return None


class FinalObsWatch:
    """Are final observations those before the reset?"""

    def __init__(self) -> None:
        self._misfit: str | None = None
        self._previous: Groups = {}  # final observations of an earlier step
        self._is_other: dict[tuple[str, str], bool] = {}  # group, which other observation: always the same so far
        self._still: set[str] = set()  # groups that once stayed as they were in a running episode
        self._ran = False
        self._misplaced = 0  # rows of running episodes that are another environment's
        self.non_finite: Finding | None = None

    def see(self, step: Step) -> None:
        running = ~step.dones
        self._ran |= bool(running.any())
        self._still |= {name for name, obs in step.obs.items() if (same_rows(obs, step.before[name]) & running).any()}
        if (final_obs := step.extras.get("final_obs")) is None:
            return
        self.non_finite = self.non_finite or _non_finite(step)
        final = copied(final_obs)
        self._misfit = self._misfit or _misfit(step, final)
        if self._misfit is not None:
            return
        ended = step.time_outs if "time_outs" in step.extras else step.dones
        if ended.any():
            self._compare(step, final, ended)
        if step.dones.any():  # in other steps it may be an old one, which nobody looks at
            self._misplaced += _misplaced(step, final)
        self._previous = final

    def finding(self) -> Finding | None:
        fault = self._fault()
        if fault is None:
            return None
        return Finding(
            "wrong-final-obs",
            f"extras['final_obs']{fault}",
            "hand out a clone of the observations of all groups, computed after the physics and before the reset; the"
            " wrappers of pyfast_ppo.isaaclab and pyfast_ppo.mjlab do so. In Gymnasium, let step() and reset() return"
            " new arrays.",
        )

    def _compare(self, step: Step, final: Groups, ended: Tensor) -> None:
        for name, obs in step.obs.items():
            others = {
                "the first observation of the next episode": obs,
                "the observation before the last step": step.before[name],
                "that of an earlier step": self._previous.get(name),
            }
            for which, other in others.items():
                if other is not None:
                    is_other = bool((same_rows(final[name], other) | ~ended).all())
                    self._is_other[name, which] = self._is_other.get((name, which), True) and is_other

    def _fault(self) -> str | None:
        if self._misfit is not None:
            return f" does not fit: {self._misfit}."
        for (name, which), is_other in self._is_other.items():
            # A group that also stays the same while an episode runs (a command) says nothing
            if is_other and self._ran and name not in self._still:
                return f"[{name!r}] is {which}: a time-out then takes its value from the wrong state."
        if self._misplaced > 1:  # one may be chance
            return " has the observations of one environment in the row of another."
        return None


def _misfit(step: Step, final: Groups) -> str | None:
    for name, obs in step.obs.items():
        if name not in final or final[name].shape != obs.shape:
            seen = tuple(final[name].shape) if name in final else "missing"
            return f"{name!r} is {seen}, not {tuple(obs.shape)}"
    return None


def _misplaced(step: Step, final: Groups) -> int:
    """How many running episodes have a row that is not what was returned there, but what was for another one."""
    running = ~step.dones
    is_own = torch.stack([same_rows(final[name], obs) for name, obs in step.obs.items()]).all(dim=0)
    returned = {row.tobytes() for row in _rows(step.obs, running)}
    strange = _rows({name: final[name] for name in step.obs}, running & ~is_own)
    return sum(row.tobytes() in returned for row in strange)


def _rows(groups: Groups, which: Tensor) -> np.ndarray:
    """All groups side by side."""
    parts = [values[which].unsqueeze(-1).flatten(1).double() for values in groups.values()]
    return torch.cat(parts, dim=1).cpu().numpy()
