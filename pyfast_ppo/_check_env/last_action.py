"""Does the policy see its own last action, however large it is?"""

from __future__ import annotations

import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.action_space import clip_of
from pyfast_ppo._check_env.calls import EnvironmentRaised, call, reset
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import groups_of
from pyfast_ppo._check_env.step import Step

_COLLINEAR = 1.0 - 1e-4
"""Squared correlation from which an observation counts as the action that was just taken."""
_LARGE_ACTIONS = (200.0, 50.0)


class LastActionWatch:
    """Which observations repeat the action that was just taken, up to a factor?"""

    def __init__(self) -> None:
        self._products: dict[str, Tensor] = {}  # [A, d]
        self._obs_squares: dict[str, Tensor] = {}  # [d]
        self._action_squares = torch.zeros(())  # [A], once there is one

    def see(self, step: Step) -> None:
        actions = step.actions[~step.dones].double()  # [rows, A]; others have been reset
        self._action_squares = self._action_squares + actions.square().sum(0)
        for name, values in step.obs.items():
            if values.dim() == 2:
                obs = values[~step.dones].double()  # [rows, d]
                self._products[name] = self._products.get(name, 0.0) + actions.T @ obs
                self._obs_squares[name] = self._obs_squares.get(name, 0.0) + obs.square().sum(0)

    def finding(self, env: VecEnv) -> Finding | None:
        """What repeats a small action: does it repeat a large one, too?"""
        columns = self._columns()
        if not columns or clip_of(env) is not None:
            return None
        for size in _LARGE_ACTIONS:
            reset(env)
            actions = torch.full((env.num_envs, env.num_actions), size, device=env.device)
            try:
                obs, _, dones, _ = call(env, "step", actions)
            except EnvironmentRaised:
                return None
            running = ~(dones > 0)
            if running.any():  # else such an action ends the episode; a smaller one may not
                break
        else:
            return None
        groups = groups_of(obs)
        for name, column, action, factor in columns:
            seen = groups[name][running, column]
            if torch.allclose(seen, torch.full_like(seen, factor * size), rtol=1e-2):
                return Finding(
                    "unbounded-last-action",
                    f"the observation {name!r} repeats the last action (column {column}: action {action}), and nothing"
                    " bounds it: a policy may answer its own large action with a larger one, until everything is NaN.",
                    "set clip_actions (100 is common), or clip that observation term.",
                )
        return None

    def _columns(self) -> list[tuple[str, int, int, float]]:
        """Group, column, action, factor."""
        found = []
        for name, products in self._products.items():
            squares = self._action_squares[:, None] * self._obs_squares[name]  # [A, d]
            collinear = (products.square() >= _COLLINEAR * squares) & (squares > 0.0)
            for action, column in collinear.nonzero().tolist():
                factor = float(products[action, column] / self._action_squares[action])
                found.append((name, column, action, factor))
        return found
