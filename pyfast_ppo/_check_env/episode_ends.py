"""Findings about how episodes end: terminations and time-outs."""

from __future__ import annotations

import re

import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.calls import begin, call, gaussian_actions, move_to_limit
from pyfast_ppo._check_env.environment import (
    innermost,
    is_finite_horizon,
    tells_terminations,
    terminated,
    time_outs,
)
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import count
from pyfast_ppo._check_env.step import Step

_UNMARKED = "the critic learns that nothing comes after the time limit, which it cannot see coming."


def unmarked_time_out_term(env: VecEnv) -> Finding | None:
    """Isaac Lab's and mjlab's termination manager knows which of its terms are time-outs."""
    manager = getattr(innermost(env), "termination_manager", None)
    if manager is None or is_finite_horizon(env):
        return None
    for name in getattr(manager, "active_terms", ()):
        term = manager.get_term_cfg(name)
        function = getattr(term.func, "__name__", type(term.func).__name__)
        looks_like_one = any(re.search(r"time_?(out|limit)", text, re.IGNORECASE) for text in (name, function))
        if looks_like_one and not term.time_out:
            return Finding(
                "time-out-not-marked",
                f"the termination term {name!r} ({function}) has time_out=False: {_UNMARKED}",
                f"set time_out=True in the cfg of {name!r}, or is_finite_horizon where the limit belongs to the task.",
            )
    return None


class LimitWatch:
    """Do episodes end at ``max_episode_length`` without being marked as time-outs?"""

    def __init__(self, limit: float | Tensor) -> None:
        self._limit = limit  # infinite: not known
        self._age: Tensor | int = 0  # [E], steps of the running episodes; until the limit is moved for the first time
        self._ends_at_limit = 0
        self._is_marked = False
        self.can_be_moved = False
        """Whether a move of the limit was seen to time an episode out."""
        self._moves = 0
        self._dones_at_moves: list[Tensor] = []  # bool, of the environments whose limit was moved
        self._other_dones: list[Tensor] = []  # bool, of the others

    def see(self, step: Step) -> None:
        self._dones_at_moves.append(step.dones[step.limit_moved])
        self._other_dones.append(step.dones[~step.limit_moved])
        is_at_move = bool(step.limit_moved.any())
        self.can_be_moved |= bool((step.time_outs & step.limit_moved).any())
        self._moves += is_at_move
        if not self._moves:
            self._age = self._age + 1
            self._ends_at_limit += int((step.dones & (self._age >= self._limit)).sum())
            self._age = torch.where(step.dones, 0, self._age)
        if is_at_move or not self._moves:
            self._is_marked |= bool(step.time_outs.any())

    def finding(self) -> Finding | None:
        # One end on the step of the limit may be chance
        if self._is_marked or not (self._ends_at_limit > 1 or self._moves_end_episodes()):
            return None
        return Finding(
            "time-out-not-marked",
            f"episodes end at max_episode_length, but extras['time_outs'] is never true there: {_UNMARKED}",
            "set extras['time_outs'] (bool [E]) where the limit has ended an episode; where the limit belongs to the"
            " task, set is_finite_horizon in the environment's cfg.",
        )

    def _moves_end_episodes(self) -> bool:
        if self._moves < 2:
            return False
        at_moves, others = torch.cat(self._dones_at_moves), torch.cat(self._other_dones)
        # A few ends that come with a move may be chance
        return at_moves.numel() >= 6 and bool(at_moves.all()) and float(others.double().mean()) < 0.25


def time_outs_at_terminations(step: Step) -> Finding | None:
    return _at_terminations(step.time_outs & step.terminated)


def first_termination(env: VecEnv, steps: int) -> int | None:
    """After how many steps of an episode, of at most so many, a first environment terminates."""
    begin(env)
    for index in range(steps):
        _, _, _, extras = call(env, "step", gaussian_actions(env))
        if not tells_terminations(env, extras):
            return None
        if terminated(env, extras).any():
            return index
    return None


def time_outs_at_termination_of(env: VecEnv, index: int) -> Finding | None:
    """Take the same steps again, up to one that has terminated episodes, and let the time limit meet it."""
    begin(env)
    for _ in range(index):
        call(env, "step", gaussian_actions(env))
    move_to_limit(env, torch.ones(env.num_envs, dtype=torch.bool, device=env.device))
    _, _, _, extras = call(env, "step", gaussian_actions(env))
    return _at_terminations(time_outs(env, extras) & terminated(env, extras))


def _at_terminations(rows: Tensor) -> Finding | None:
    if not rows.any():
        return None
    return Finding(
        "time-outs-at-terminations",
        f"extras['time_outs'] is true in {count(rows)} that terminated on the same step: PPO adds the value of going"
        " on, although nothing comes after a termination.",
        "time_outs = truncated & ~terminated; the wrappers of pyfast_ppo.isaaclab and pyfast_ppo.mjlab do so.",
    )


def time_outs_without_done(step: Step) -> Finding | None:
    rows = step.time_outs & ~step.dones
    if not rows.any():
        return None
    return Finding(
        "time-outs-without-done",
        f"extras['time_outs'] is true in {count(rows)} whose episode goes on: PPO adds the value of what follows to"
        " the reward a second time.",
        "compute extras['time_outs'] anew in each step, and let dones include it.",
    )
