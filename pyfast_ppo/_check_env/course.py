"""The course of the check: which looks are taken, in which order, and what ends it early."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from rsl_rl.env import VecEnv

from pyfast_ppo._check_env import (
    action_space,
    attributes,
    calls,
    config,
    environment,
    episode_ends,
    final_obs,
    first_kl,
    large_actions,
    observations,
    overwritten,
    step_result,
)
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import copied, groups_of
from pyfast_ppo._check_env.last_action import LastActionWatch
from pyfast_ppo._check_env.step import Step

_MOVE_LIMIT_EVERY = 4
"""In the second half of the steps, every so many: often enough that time-outs meet terminations.

By turns in all environments, and in every second one, so that rows of final observations can be told apart.
"""

_SLOWEST = 4
"""A robot that falls slowly is given so many times the steps, for one look at a fall in the step of the limit."""

_STEP_CHECKS: tuple[Callable[[Step], Finding | None], ...] = (
    overwritten.observations_overwritten,
    overwritten.actions_overwritten,
    observations.non_finite_observations,
    step_result.non_finite_rewards,
    episode_ends.time_outs_at_terminations,
    episode_ends.time_outs_without_done,
    final_obs.no_final_obs,
)


def look_at(env: VecEnv, cfg: dict | None, steps: int) -> list[Finding]:
    """``cfg`` is changed."""
    report = _Report()
    if _look_without_steps(env, cfg, report):
        with calls.random_state_kept(torch.device(env.device)), torch.no_grad():
            with report.of_errors():
                _look_with_steps(env, cfg, steps, report)
            with report.of_errors():
                calls.reset(env)
    return report.findings()


class _Report:
    """Findings in the order in which they were made, one for each name."""

    def __init__(self) -> None:
        self._findings: dict[str, Finding] = {}

    def add(self, finding: Finding | None) -> bool:
        """Returns whether there was something to add."""
        if finding is not None:
            self._findings.setdefault(finding.name, finding)
        return finding is not None

    def has(self, *names: str) -> bool:
        return any(name in self._findings for name in names)

    def findings(self) -> list[Finding]:
        return list(self._findings.values())

    @contextlib.contextmanager
    def of_errors(self) -> Iterator[None]:
        """An error of the environment is a finding, too."""
        try:
            yield
        except calls.EnvironmentRaised as error:
            self.add(calls.environment_error(error))


def _look_without_steps(env: VecEnv, cfg: dict | None, report: _Report) -> bool:
    """Returns whether steps can be taken."""
    if report.add(attributes.missing_attribute(env)) or report.add(attributes.unknown_device(env)):
        return False
    report.add(attributes.max_episode_length(env))
    report.add(attributes.episode_length_buf(env))
    report.add(episode_ends.unmarked_time_out_term(env))
    if report.add(action_space.discrete_actions(env)) or report.add(action_space.num_actions(env)):
        return False
    report.add(action_space.clip_cuts_actions(env, cfg))
    report.add(action_space.clip_widens_space(env))
    return True


def _look_with_steps(env: VecEnv, cfg: dict | None, steps: int, report: _Report) -> None:
    last_action = LastActionWatch()
    if not _roll_out(env, cfg, steps, last_action, report):
        return
    if cfg is not None and not report.has("obs-groups"):
        report.add(first_kl.first_kl(env, cfg, steps))
    # Large actions come last: a simulator may not like them
    if not report.has("clip-widens-space"):
        report.add(large_actions.actions_beyond_space(env))
    report.add(last_action.finding(env))


def _roll_out(env: VecEnv, cfg: dict | None, steps: int, last_action: LastActionWatch, report: _Report) -> bool:
    """Step with Gaussian actions. Returns whether an algorithm could run on what came back."""
    held = calls.begin(env)
    if report.add(observations.observations_format(env, cfg, held)):
        return False
    if report.add(step_result.device_mix(env, groups_of(held))):
        return False
    report.add(observations.observation_space(env, held))
    report.add(observations.flat_image(env, held))
    report.add(config.obs_groups(cfg, held))

    can_move_limit = not report.has("max-episode-length", "episode-length-buf")
    at_limit = episode_ends.LimitWatch(math.inf if report.has("max-episode-length") else env.max_episode_length)
    at_end = final_obs.FinalObsWatch()
    before = copied(held)
    terminations = []  # how many in each step of the first half, where the limit is not moved
    for index in range(steps):
        since_half = index - steps // 2
        limit_moved = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
        move, rest = divmod(since_half, _MOVE_LIMIT_EVERY)
        if can_move_limit and move >= 0 and rest == 0:
            limit_moved = torch.arange(env.num_envs, device=env.device) % 2 >= move % 2  # all, or every second one
            calls.move_to_limit(env, limit_moved)
        actions = calls.gaussian_actions(env)
        given = actions.clone()
        result = calls.call(env, "step", given)
        if report.add(step_result.step_format(env, cfg, before, result)):
            return False
        obs, rewards, dones, extras = result
        step = Step(
            held=groups_of(held),
            before=before,
            given=given,
            actions=actions,
            obs=copied(obs),
            rewards=rewards,
            dones=dones > 0,
            time_outs=environment.time_outs(env, extras),
            terminated=environment.terminated(env, extras),
            extras=extras,
            limit_moved=limit_moved,
        )
        for check in _STEP_CHECKS:
            report.add(check(step))
        for watch in (at_limit, at_end, last_action):
            watch.see(step)
        if since_half < 0:
            terminations.append(int(step.terminated.sum()))
        held, before = obs, step.obs

    if report.has("observations-overwritten", "actions-overwritten", "non-finite-observations", "non-finite-rewards"):
        return False  # what follows from these would only repeat them
    if not environment.is_finite_horizon(env):
        report.add(at_limit.finding())
    report.add(at_end.finding())
    report.add(at_end.non_finite)
    if can_move_limit and not report.has("time-outs-at-terminations"):
        if any(terminations):
            worst: int | None = terminations.index(max(terminations))
        else:
            worst = episode_ends.first_termination(env, _SLOWEST * steps) if at_limit.can_be_moved else None
        if worst is not None:
            report.add(episode_ends.time_outs_at_termination_of(env, worst))
    return True
