"""Look at a wrapped environment and a runner config for known faults, before hours of training.

``E`` environments, ``A`` action dimensions. A check is a small function or class that returns a :class:`Finding` or
None; docs/check_env.md explains each of them. rsl_rl is imported when the check is called.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from rsl_rl.env import VecEnv

DEFAULT_STEPS = 32
_SEED = 0
_MOVE_LIMIT_EVERY = 4
"""In the second half of the steps, every so many: often enough that time-outs meet terminations."""
_CUT_OFTEN = 0.05
"""Share of an untrained policy's actions that a clip may cut without a finding: [-2, 2] at a std of 1 is below."""
_COLLINEAR = 1.0 - 1e-4
"""Squared correlation from which an observation counts as the action that was just taken."""
_LARGE_ACTIONS = (200.0, 50.0)
_FIRST_KL = 1e-8
"""Nats. float32 gives 1e-12 or less between acting and updating, bfloat16 1e-7 or more."""

Groups = dict[str, Tensor]
"""Observation groups ``[E, ...]``; a group of single terms is one entry for each, "group/term"."""


@dataclass(frozen=True)
class Finding:
    """Something about an environment or its config that harms training."""

    name: str
    """Which check has found it, a row of docs/check_env.md."""
    reason: str
    """What was seen, and what comes of it."""
    mend: str
    """What to do."""
    is_note: bool = False
    """Whether training goes on well enough without the mend."""

    def __str__(self) -> str:
        """One line."""
        text = f"{'note: ' if self.is_note else ''}{self.name}: {self.reason} Mend: {self.mend}"
        return " ".join(text.split())


def check_env(env: VecEnv, train_cfg: Any = None, *, steps: int = DEFAULT_STEPS) -> list[Finding]:
    """Step an environment with random actions and report each known fault; print nothing where all is well.

    The environment is reset at the end. Its own random generators and curricula have moved on by then; the random state
    of torch, NumPy and Python is as before, and so is ``train_cfg``. In the second half of the steps the check moves
    ``episode_length_buf`` to the limit now and then, so that it sees time-outs however long the episodes are.

    Args:
        env: A wrapped environment: of Isaac Lab, mjlab, ``pyfast_ppo.gymnasium.GymnasiumVecEnv``, or your own.
        train_cfg: The runner's config: a dict, a dataclass, or an object with ``to_dict()``. With it the check also
            looks at ``obs_groups``, and builds the algorithm to see whether the first mini-batch finds the policy that
            has acted.
        steps: Steps with actions from N(0, 1). A few more follow.

    Returns:
        The findings, each of which is also printed on a line of its own. ``str(finding)`` is that line.

    Raises:
        TypeError: ``env`` is no rsl_rl ``VecEnv``, or ``train_cfg`` no config.
        ValueError: ``steps`` is not positive.
    """
    _require_vec_env(env)
    cfg = _as_dict(train_cfg)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    report = _Report()
    _look_at(env, cfg, steps, report)
    for finding in report.findings:
        print(finding)
    return report.findings


# --- the course of the check ------------------------------------------------------------------------------------------


class _Report:
    """Findings in the order in which they were made, one for each name."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, finding: Finding | None) -> bool:
        """Returns whether there was something to add."""
        if finding is not None and not self.has(finding.name):
            self.findings.append(finding)
        return finding is not None

    def has(self, *names: str) -> bool:
        return any(finding.name in names for finding in self.findings)


class _EnvironmentRaised(Exception):
    """An exception out of the environment; ``__cause__`` is the original."""


@dataclass
class _Step:
    """One step, with copies of what the environment has returned."""

    before: Groups
    actions: Tensor  # [E, A]
    obs: Groups
    rewards: Tensor  # [E]
    dones: Tensor  # bool [E]
    time_outs: Tensor | None  # bool [E]
    terminated: Tensor | None  # bool [E]
    final_obs: Any  # None: not there
    limit_moved: bool


def _look_at(env: VecEnv, cfg: dict | None, steps: int, report: _Report) -> None:
    if report.add(_missing_attribute(env)) or report.add(_unknown_device(env)):
        return
    report.add(_max_episode_length(env))
    report.add(_episode_length_buf(env))
    report.add(_unmarked_time_out_term(env))
    if report.add(_discrete_actions(env)) or report.add(_num_actions(env)):
        return
    report.add(_clip_cuts_actions(env, cfg))
    report.add(_clip_widens_space(env))

    with _random_state_kept(torch.device(env.device)), torch.no_grad():
        try:
            last_action = _LastActionWatch()
            if _roll_out(env, cfg, steps, report, last_action):
                if cfg is not None and not report.has("obs-groups"):
                    report.add(_first_kl(env, cfg, steps))
                # Large actions come last: a simulator may not like them
                if not report.has("clip-widens-space"):
                    report.add(_actions_beyond_space(env))
                report.add(_unbounded_last_action(env, last_action.columns()))
        except _EnvironmentRaised as error:
            report.add(_environment_error(error))
        try:
            _reset(env)
        except _EnvironmentRaised as error:
            report.add(_environment_error(error))


def _roll_out(env: VecEnv, cfg: dict | None, steps: int, report: _Report, last_action: _LastActionWatch) -> bool:
    """Step with Gaussian actions. Returns whether an algorithm could run on what came back."""
    held = _begin(env)
    if report.add(_observations_format(env, cfg, held)) or report.add(_device_mix(env, _groups(held))):
        return False
    report.add(_observation_space(env, held))
    report.add(_obs_groups(cfg, held))

    can_move_limit = not report.has("max-episode-length", "episode-length-buf")
    limit = None if report.has("max-episode-length") else env.max_episode_length
    watches = (_LimitWatch(limit, _is_finite_horizon(env)), _FinalObsWatch())
    before = _copied(held)
    terminations: dict[int, int] = {}  # step to how many, as long as the limit has not been moved
    for index in range(steps):
        since_half = index - steps // 2
        limit_moved = can_move_limit and since_half >= 0 and since_half % _MOVE_LIMIT_EVERY == 0
        if limit_moved:
            _move_to_limit(env)
        actions = _gaussian_actions(env)
        given = actions.clone()
        result = _call(env, "step", given)
        if report.add(_step_format(env, cfg, result)):
            return False
        obs, rewards, dones, extras = result
        if report.add(_changed_groups(before, obs)):
            return False
        step = _Step(
            before=before,
            actions=actions,
            obs=_copied(obs),
            rewards=rewards.clone(),
            dones=dones > 0,
            time_outs=_as_bool(extras.get("time_outs")),
            terminated=_terminated(env, extras),
            final_obs=extras.get("final_obs"),
            limit_moved=limit_moved,
        )
        if step.terminated is not None and step.terminated.any() and index < steps // 2:
            terminations[index] = int(step.terminated.sum())
        report.add(_observations_overwritten(held, before))
        report.add(_actions_overwritten(given, actions))
        for check in _STEP_CHECKS:
            report.add(check(step))
        for watch in (*watches, last_action):
            watch.see(step)
        held, before = obs, step.obs

    if report.has("observations-overwritten", "actions-overwritten", "non-finite-observations", "non-finite-rewards"):
        return False  # what follows from these would only repeat them
    for watch in watches:
        report.add(watch.finding())
    if terminations and can_move_limit:
        report.add(_time_outs_at_termination_of(env, max(terminations, key=terminations.__getitem__)))
    return True


def _time_outs_at_termination_of(env: VecEnv, index: int) -> Finding | None:
    """Take the same steps again, up to one that has terminated episodes, and let the time limit meet it."""
    _begin(env)
    for _ in range(index):
        _call(env, "step", _gaussian_actions(env))
    _move_to_limit(env)
    _, _, _, extras = _call(env, "step", _gaussian_actions(env))
    return _both(_as_bool(extras.get("time_outs")), _terminated(env, extras))


def _begin(env: VecEnv) -> Any:
    """Reset and return the observations; as far as random numbers are torch's, the same steps can follow again."""
    _seed(torch.device(env.device))
    _reset(env)
    return _call(env, "get_observations")


# --- attributes and config --------------------------------------------------------------------------------------------


def _missing_attribute(env: VecEnv) -> Finding | None:
    missing = [name for name in ("num_envs", "num_actions", "device", "cfg") if not hasattr(env, name)]
    if not missing:
        return None
    return Finding(
        "missing-attribute",
        f"the environment has no {', '.join(missing)}, which rsl_rl reads.",
        "set it in the wrapper's __init__: num_envs and num_actions are integers, device is where the returned tensors"
        " live, cfg anything that tells what the environment is.",
    )


def _unknown_device(env: VecEnv) -> Finding | None:
    try:
        torch.empty(0, device=env.device)
    except (RuntimeError, TypeError, AssertionError) as error:
        return Finding(
            "device-mix",
            f"env.device is {env.device!r}, where no tensor can be made: {error}",
            'name a device that this machine has, such as "cpu" or "cuda:0".',
        )
    return None


def _max_episode_length(env: VecEnv) -> Finding | None:
    length = getattr(env, "max_episode_length", None)
    try:
        longest = int(length.max() if isinstance(length, Tensor) else length)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        longest = 0
    if longest > 0:
        return None
    return Finding(
        "max-episode-length",
        f"max_episode_length is {length!r}, but rsl_rl draws the first episodes' lengths below it, as integers.",
        "set it to the number of steps after which an episode is cut off, or to a very large integer.",
    )


def _episode_length_buf(env: VecEnv) -> Finding | None:
    mend = "make it an integer tensor [E] that counts the steps of the running episodes, and can be assigned to."
    counts = getattr(env, "episode_length_buf", None)
    if not isinstance(counts, Tensor) or counts.shape != (env.num_envs,) or counts.is_floating_point():
        seen = f"{counts.dtype} {list(counts.shape)}" if isinstance(counts, Tensor) else repr(counts)
        return Finding("episode-length-buf", f"episode_length_buf is {seen}, not an integer tensor [E].", mend)
    try:
        env.episode_length_buf = counts + 1
        is_set = bool((env.episode_length_buf == counts + 1).all())
        env.episode_length_buf = counts
    except Exception as error:
        return Finding(
            "episode-length-buf",
            f"episode_length_buf cannot be set ({error}), which init_at_random_ep_len=True does.",
            mend,
        )
    if is_set:
        return None
    return Finding(
        "episode-length-buf",
        "episode_length_buf does not keep what is assigned to it: with init_at_random_ep_len=True all environments"
        " would still reach their limit on the same step.",
        mend,
    )


def _discrete_actions(env: VecEnv) -> Finding | None:
    space = _declared_space(env)
    is_discrete = hasattr(space, "n") or hasattr(space, "nvec")
    is_discrete |= isinstance(space, set) or (isinstance(space, list) and any(isinstance(n, set) for n in space))
    if not is_discrete:
        return None
    return Finding(
        "discrete-actions",
        f"the environment declares the action space {space}, but rsl_rl's PPO acts with {env.num_actions} real numbers,"
        " and a clip turns such a space into a Box of as many.",
        "declare a Box and turn the numbers into choices inside the environment, or use an algorithm for discrete"
        " actions.",
    )


def _num_actions(env: VecEnv) -> Finding | None:
    space = _declared_space(env)
    if isinstance(space, int):
        declared = space
    else:
        bounds = _bounds(space, env)
        declared = env.num_actions if bounds is None else len(bounds[0])
    if declared == env.num_actions:
        return None
    return Finding(
        "num-actions",
        f"num_actions is {env.num_actions}, but the action space has {declared} dimensions.",
        "set num_actions to the size of one environment's action.",
    )


def _clip_cuts_actions(env: VecEnv, cfg: dict | None) -> Finding | None:
    clip = _clip(env)
    if clip is None:
        return None
    std = _initial_std(cfg)
    low, high = (_per_action(side, env.num_actions) for side in clip)
    declared = _bounds(_declared_space(env), env)
    if declared is not None:  # bounds that the task itself has are no business of the clip's
        low = torch.where(low > declared[0], low, -math.inf)
        high = torch.where(high < declared[1], high, math.inf)
    normal = torch.distributions.Normal(0.0, std)
    share = float((normal.cdf(low) + 1.0 - normal.cdf(high)).mean())
    if share <= _CUT_OFTEN:
        return None
    return Finding(
        "clip-cuts-actions",
        f"clip_actions={_shown(env.clip_actions)} cuts {share:.0%} of the actions of an untrained policy (std {std:g}),"
        " which the action space allows: they all have the same effect, and tasks that need larger ones cannot be"
        " learned.",
        f"let clip_actions be about {5.0 * std:g} or more, and scale actions in the environment; or lower init_std.",
    )


def _clip_widens_space(env: VecEnv) -> Finding | None:
    """Isaac Lab's wrapper writes ±clip_actions over the space that the environment has declared."""
    clip = _clip(env)
    present = _bounds(getattr(_innermost(env), "single_action_space", None), env)
    declared = _bounds(_declared_space(env), env)
    if clip is None or present is None or declared is None or len(present[0]) != len(declared[0]):
        return None
    if bool((present[0] >= declared[0]).all() and (present[1] <= declared[1]).all()):
        return None
    return _widened(env, declared)


def _widened(env: VecEnv, declared: tuple[Tensor, Tensor]) -> Finding:
    return Finding(
        "clip-widens-space",
        f"the environment declares actions in {_range(declared)}, but clip_actions={_shown(env.clip_actions)} lets"
        " larger ones through.",
        "use the wrapper of pyfast_ppo.isaaclab or pyfast_ppo.mjlab, which clips to both, or lower clip_actions.",
    )


def _unmarked_time_out_term(env: VecEnv) -> Finding | None:
    """Isaac Lab's and mjlab's termination manager knows which of its terms are time-outs."""
    manager = getattr(_innermost(env), "termination_manager", None)
    if manager is None or _is_finite_horizon(env):
        return None
    for name in getattr(manager, "active_terms", ()):
        term = manager.get_term_cfg(name)
        function = getattr(term.func, "__name__", type(term.func).__name__)
        looks_like_one = any(re.search(r"time_?(out|limit)", text, re.IGNORECASE) for text in (name, function))
        if looks_like_one and not term.time_out:
            return Finding(
                "time-out-not-marked",
                f"the termination term {name!r} ({function}) has time_out=False: the critic learns that nothing comes"
                " after the time limit, which it cannot see coming.",
                f"set time_out=True in the cfg of {name!r}, or is_finite_horizon where the limit belongs to the task.",
            )
    return None


def _obs_groups(cfg: dict | None, obs: Any) -> Finding | None:
    if cfg is None or "obs_groups" not in cfg:
        return None
    available = list(obs.keys())
    mend = f"name groups that the environment returns: {', '.join(map(str, available))}."
    obs_groups = cfg["obs_groups"]
    if not isinstance(obs_groups, Mapping):
        reason = f"obs_groups is {obs_groups!r}, not a mapping of sets to lists of groups."
        return Finding("obs-groups", reason, mend)
    for obs_set, groups in obs_groups.items():
        if isinstance(groups, str) or not groups:
            reason = f"obs_groups[{obs_set!r}] is {groups!r}, not a list of groups."
            return Finding("obs-groups", reason, mend)
        unknown = [group for group in groups if group not in available]
        if unknown:
            reason = (
                f"obs_groups[{obs_set!r}] names {', '.join(map(repr, unknown))}, which the environment does not return."
            )
            return Finding("obs-groups", reason, mend)
    for obs_set in ("actor", "critic"):
        # rsl_rl takes the group of that name, then "policy"
        if obs_set in cfg and obs_set not in obs_groups and obs_set not in available and "policy" not in available:
            return Finding("obs-groups", f"obs_groups does not say what the {obs_set} reads.", mend)
    return None


# --- what comes back --------------------------------------------------------------------------------------------------


def _observations_format(env: VecEnv, cfg: dict | None, obs: Any) -> Finding | None:
    from tensordict import TensorDictBase

    mend = "return a TensorDict of float32 groups [E, ...] with batch_size=[E]."
    if not isinstance(obs, TensorDictBase):
        return Finding("observations-format", f"observations are a {type(obs).__name__}, not a TensorDict.", mend)
    if obs.batch_size[:1] != (env.num_envs,):
        reason = f"the TensorDict of observations has batch_size {list(obs.batch_size)}, not [{env.num_envs}]."
        return Finding("observations-format", reason, mend)
    obs_groups = (cfg or {}).get("obs_groups")
    used = None
    if isinstance(obs_groups, Mapping):
        used = {group for groups in obs_groups.values() if not isinstance(groups, str) for group in groups or ()}
    for name, values in _groups(obs).items():
        if values.dtype != torch.float32 and (used is None or name in used):
            reason = f"the observation {name!r} is {values.dtype}, but rsl_rl's networks are float32."
            return Finding("observations-format", reason, mend)
    return None


def _changed_groups(before: Groups, obs: Any) -> Finding | None:
    shapes = [{name: tuple(values.shape) for name, values in groups.items()} for groups in (before, _groups(obs))]
    if shapes[0] == shapes[1]:
        return None
    return Finding(
        "observations-format",
        f"step() returns the observations {shapes[1]}, but those before were {shapes[0]}.",
        "let get_observations() and step() return the same groups with the same shapes.",
    )


def _step_format(env: VecEnv, cfg: dict | None, result: Any) -> Finding | None:
    """The first thing wrong with the form of what step() has returned."""
    if not isinstance(result, tuple) or len(result) != 4 or not isinstance(result[3], dict):
        seen = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        return Finding(
            "step-result",
            f"step() returns {seen}, not (observations, rewards, dones, extras) with a dict of extras.",
            "dones = terminated | truncated; what is truncated alone is extras['time_outs'].",
        )
    obs, rewards, dones, extras = result
    tensors = {"rewards": rewards, "dones": dones}
    tensors |= {name: extras[name] for name in ("time_outs", "terminated") if name in extras}
    finding = _observations_format(env, cfg, obs)
    for name, values in tensors.items():
        finding = finding or _row_format(env, name, values)
    if finding is not None:
        return finding
    tensors["episode_length_buf"] = getattr(env, "episode_length_buf", None)
    return _device_mix(env, {**_groups(obs), **tensors, **_groups(extras.get("final_obs"), "final_obs")})


def _row_format(env: VecEnv, name: str, values: Any) -> Finding | None:
    """One number for each environment."""
    kind = "a floating-point tensor" if name == "rewards" else "a bool or integer tensor"
    if isinstance(values, Tensor):
        if values.shape == (env.num_envs,) and values.is_floating_point() == (name == "rewards"):
            return None
        seen = f"{values.dtype} {list(values.shape)}"
    else:
        seen = f"a {type(values).__name__}"
    return Finding(
        f"{name.replace('_', '-')}-format",
        f"{name} are {seen}, not {kind} [{env.num_envs}].",
        "return one number for each environment, without a further dimension: [E, 1] broadcasts to [E, E].",
    )


def _device_mix(env: VecEnv, tensors: Mapping[str, Any]) -> Finding | None:
    here = torch.device(env.device)
    for name, values in tensors.items():
        if not isinstance(values, Tensor):
            continue
        there = values.device
        if there.type != here.type or (None not in (there.index, here.index) and there.index != here.index):
            return Finding(
                "device-mix",
                f"{name!r} is on {there}, but env.device is {here}.",
                "return every tensor on env.device; copies between devices make each step wait.",
            )
    return None


def _observation_space(env: VecEnv, obs: Any) -> Finding | None:
    space = getattr(env, "observation_space", None)
    if space is None:
        space = getattr(env, "single_observation_space", None)
    if space is None:
        return None
    groups = _groups(obs)
    mend = (
        "declare a Dict with the returned groups; the wrapper of pyfast_ppo.isaaclab does so. rsl_rl does not read the"
        " space, but exporters and other libraries do."
    )
    declared = _space_shapes(space)
    if None in declared:  # a single box, without a name
        declared = {next(iter(groups)): declared[None]} if len(groups) == 1 else {"(one box)": declared[None]}
    if set(declared) != set(groups):
        reason = f"the observation space declares {', '.join(declared)}, but {', '.join(groups)} are returned."
        return Finding("observation-space", reason, mend)
    for name, shape in declared.items():
        returned = tuple(groups[name].shape)
        if shape not in (returned, returned[1:]):
            reason = f"the observation space declares {name!r} with the shape {shape}, but {returned} is returned."
            return Finding("observation-space", reason, mend)
    return None


def _space_shapes(space: Any, prefix: str = "") -> dict[str | None, tuple[int, ...]]:
    if not hasattr(space, "spaces"):
        return {prefix or None: tuple(space.shape)}
    shapes: dict[str | None, tuple[int, ...]] = {}
    items = space.spaces.items() if isinstance(space.spaces, Mapping) else enumerate(space.spaces)
    for name, subspace in items:
        shapes |= _space_shapes(subspace, f"{prefix}/{name}" if prefix else str(name))
    return shapes


def _environment_error(error: _EnvironmentRaised) -> Finding:
    cause = error.__cause__
    return Finding(
        "environment-error",
        f"{error} raised {type(cause).__name__}: {cause}",
        "run env.reset() and env.step() with random actions by themselves to see the whole traceback.",
    )


# --- checks of one step -----------------------------------------------------------------------------------------------


def _non_finite_observations(step: _Step) -> Finding | None:
    for name, values in step.obs.items():
        rows = _rows_with(~torch.isfinite(values))
        if rows.any():
            return Finding(
                "non-finite-observations",
                f"the observation {name!r} is NaN or infinite in {_count(rows)}: the networks and their normalizers"
                " do not recover from it. rsl_rl stops at NaN, but not at an infinite number.",
                "end an episode whose simulation has diverged, and divide by nothing that can be 0.",
            )
    return None


def _non_finite_rewards(step: _Step) -> Finding | None:
    rows = ~torch.isfinite(step.rewards)
    if not rows.any():
        return None
    return Finding(
        "non-finite-rewards",
        f"the reward is NaN or infinite in {_count(rows)}: advantages are normalized over the rollout, so that one such"
        " reward spoils them all.",
        "look for a division by 0, or a logarithm or power of a negative number, in the reward terms.",
    )


def _time_outs_at_terminations(step: _Step) -> Finding | None:
    return _both(step.time_outs, step.terminated)


def _both(time_outs: Tensor | None, terminated: Tensor | None) -> Finding | None:
    if time_outs is None or terminated is None:
        return None
    rows = time_outs & terminated
    if not rows.any():
        return None
    return Finding(
        "time-outs-at-terminations",
        f"extras['time_outs'] is true in {_count(rows)} that terminated on the same step: PPO adds the value of going"
        " on, although nothing comes after a termination.",
        "time_outs = truncated & ~terminated; the wrappers of pyfast_ppo.isaaclab and pyfast_ppo.mjlab do so.",
    )


def _time_outs_without_done(step: _Step) -> Finding | None:
    if step.time_outs is None:
        return None
    rows = step.time_outs & ~step.dones
    if not rows.any():
        return None
    return Finding(
        "time-outs-without-done",
        f"extras['time_outs'] is true in {_count(rows)} whose episode goes on: PPO adds the value of what follows to"
        " the reward a second time.",
        "compute extras['time_outs'] anew in each step, and let dones include it.",
    )


def _no_final_obs(step: _Step) -> Finding | None:
    if step.final_obs is not None or step.time_outs is None or not step.time_outs.any():
        return None
    return Finding(
        "no-final-obs",
        "episodes are cut off by time-outs, but extras['final_obs'], the observations before the reset, are missing:"
        " the value of what would have come is then taken from the observation before, as rsl_rl does.",
        "use the wrapper of pyfast_ppo.isaaclab or pyfast_ppo.mjlab, which hands them out; where episodes are long,"
        " it hardly matters.",
        is_note=True,
    )


_STEP_CHECKS: tuple[Callable[[_Step], Finding | None], ...] = (
    _non_finite_observations,
    _non_finite_rewards,
    _time_outs_at_terminations,
    _time_outs_without_done,
    _no_final_obs,
)


def _observations_overwritten(held: Any, copies: Groups) -> Finding | None:
    """``held``: what was returned a step ago, as it is now; ``copies``: as it was."""
    changed = [name for name, values in _groups(held).items() if not _same(values, copies[name]).all()]
    if not changed:
        return None
    return Finding(
        "observations-overwritten",
        f"step() writes into the tensor of {', '.join(map(repr, changed))} that the step before has returned: rsl_rl"
        " copies it after step(), and so stores the next observation beside the action.",
        "return a clone of the buffer.",
    )


def _actions_overwritten(given: Tensor, actions: Tensor) -> Finding | None:
    if torch.equal(given, actions):
        return None
    return Finding(
        "actions-overwritten",
        "step() writes into the actions that it is given: rsl_rl stores them after step(), with the log-probability of"
        " those it has drawn.",
        "work on a copy: actions = actions.clamp(low, high), not actions.clamp_(low, high).",
    )


# --- checks over many steps -------------------------------------------------------------------------------------------


class _LimitWatch:
    """Do episodes end at ``max_episode_length`` without being marked as time-outs?"""

    def __init__(self, limit: int | Tensor | None, is_finite_horizon: bool) -> None:
        self._limit = limit  # None: not known
        self._is_finite_horizon = is_finite_horizon
        self._age: Tensor | int = 0  # [E], steps of the running episodes; from the reset to the first move of the limit
        self._limit_was_moved = False
        self._ends_at_limit = 0
        self._moves = 0
        self._rows_moved = 0
        self._rows_ended_by_a_move = 0
        self._other_dones: list[float] = []
        self._time_outs = 0

    def see(self, step: _Step) -> None:
        time_outs = 0 if step.time_outs is None else int(step.time_outs.sum())
        self._limit_was_moved |= step.limit_moved
        if step.limit_moved:
            self._moves += 1
            self._rows_moved += len(step.dones)
            self._rows_ended_by_a_move += int(step.dones.sum())
            self._time_outs += time_outs
            return
        self._other_dones.append(float(step.dones.float().mean()))
        if not self._limit_was_moved and self._limit is not None:
            self._age = self._age + torch.ones_like(step.dones, dtype=torch.long)
            self._ends_at_limit += int((step.dones & (self._age >= self._limit)).sum())
            self._time_outs += time_outs
            self._age = torch.where(step.dones, 0, self._age)

    def finding(self) -> Finding | None:
        # One end on the step of the limit may be chance, and so may be a few that come with a move of it
        follows_moves = self._moves > 1 and self._rows_moved >= 8 and self._rows_ended_by_a_move == self._rows_moved
        follows_moves &= sum(self._other_dones) < 0.25 * len(self._other_dones)
        if self._is_finite_horizon or self._time_outs or not (follows_moves or self._ends_at_limit > 1):
            return None
        return Finding(
            "time-out-not-marked",
            "episodes end at max_episode_length, but extras['time_outs'] is never true there: the critic learns that"
            " nothing comes after the time limit, which it cannot see coming.",
            "set extras['time_outs'] (bool [E]) where the limit has ended an episode; where the limit belongs to the"
            " task, set is_finite_horizon in the environment's cfg.",
        )


_NOT_FINAL = {
    "after": "the first observation of the next episode",
    "before": "the observation before the last step",
    "stale": "that of an earlier step",
}


class _FinalObsWatch:
    """Are final observations those before the reset?"""

    def __init__(self) -> None:
        self._misfit: str | None = None
        self._previous: Groups | None = None
        self._rows: dict[
            tuple[str, str], list[int]
        ] = {}  # (group, of _NOT_FINAL) to rows that are the same, rows in all
        self._still: dict[str, bool] = {}  # group to whether it ever stayed as it was in a running episode
        self._ran = False

    def see(self, step: _Step) -> None:
        for name, values in step.obs.items():
            still = (_same_rows(values, step.before[name]) & ~step.dones).any()
            self._still[name] = self._still.get(name, False) or bool(still)
        self._ran |= bool((~step.dones).any())
        ended = step.dones if step.time_outs is None else step.time_outs
        if step.final_obs is None:
            return
        final = _copied(step.final_obs)
        if ended.any():
            self._compare(step, final, ended)
        self._previous = final

    def _compare(self, step: _Step, final: Groups, ended: Tensor) -> None:
        for name, values in step.obs.items():
            if name not in final or final[name].shape != values.shape:
                shape = tuple(final[name].shape) if name in final else None
                self._misfit = f"{name!r} is {'missing' if shape is None else shape}, not {tuple(values.shape)}"
                return
            others = {"after": values, "before": step.before[name]}
            if self._previous is not None and name in self._previous and self._previous[name].shape == values.shape:
                others["stale"] = self._previous[name]
            for kind, other in others.items():
                rows = self._rows.setdefault((name, kind), [0, 0])
                rows[0] += int((_same_rows(final[name], other) & ended).sum())
                rows[1] += int(ended.sum())

    def finding(self) -> Finding | None:
        mend = (
            "hand out a clone of the observations of all groups, computed after the physics and before the reset; the"
            " wrappers of pyfast_ppo.isaaclab and pyfast_ppo.mjlab do so."
        )
        if self._misfit is not None:
            return Finding("wrong-final-obs", f"extras['final_obs'] does not fit: {self._misfit}.", mend)
        for (name, kind), (same, total) in self._rows.items():
            # A group that also stays the same while an episode runs (a command) says nothing
            if same == total and self._ran and not self._still[name]:
                return Finding(
                    "wrong-final-obs",
                    f"extras['final_obs'][{name!r}] is {_NOT_FINAL[kind]}: a time-out then takes its value from the"
                    " wrong state.",
                    mend,
                )
        return None


class _LastActionWatch:
    """Which observations repeat the action that was just taken, up to a factor?"""

    def __init__(self) -> None:
        self._products: dict[str, Tensor] = {}  # [A, d]
        self._obs_squares: dict[str, Tensor] = {}  # [d]
        self._action_squares: Tensor | float = 0.0  # [A]

    def see(self, step: _Step) -> None:
        actions = step.actions[~step.dones].double()  # [rows, A]; others have been reset
        self._action_squares = self._action_squares + actions.square().sum(0)
        for name, values in step.obs.items():
            if values.dim() == 2:
                obs = values[~step.dones].double()  # [rows, d]
                self._products[name] = self._products.get(name, 0.0) + actions.T @ obs
                self._obs_squares[name] = self._obs_squares.get(name, 0.0) + obs.square().sum(0)

    def columns(self) -> list[tuple[str, int, int, float]]:
        """Group, column, action, factor."""
        found = []
        for name, products in self._products.items():
            squares = self._action_squares[:, None] * self._obs_squares[name]  # [A, d]
            collinear = (products.square() >= _COLLINEAR * squares) & (squares > 0.0)
            for action, column in collinear.nonzero().tolist():
                factor = float(products[action, column] / self._action_squares[action])
                found.append((name, column, action, factor))
        return found


# --- large actions ----------------------------------------------------------------------------------------------------


def _actions_beyond_space(env: VecEnv) -> Finding | None:
    """Try actions beyond the declared box: what reaches the environment, and does it make a difference there?"""
    bounds = _bounds(_declared_space(env), env)
    if bounds is None or not hasattr(env, "reset"):
        return None
    low, high = bounds
    width = torch.where(torch.isfinite(high - low), high - low, 1.0).clamp_min(1.0)
    for edge, beyond in ((high, high + 10.0 * width), (low, low - 10.0 * width)):
        if not torch.isfinite(edge).any():
            continue
        at_edge, far = (torch.where(torch.isfinite(edge), side, 0.0) for side in (edge, beyond))
        try:
            with _executed_actions(env) as executed:
                _repeatable_step(env, far)
            if executed and not _is_beyond(executed[-1], bounds):
                continue
            first, again = _repeatable_step(env, at_edge), _repeatable_step(env, at_edge)
            is_repeatable = _same(first, again).all()
            makes_a_difference = not _same(first, _repeatable_step(env, far)).all()
        except _EnvironmentRaised:  # it refuses such actions, which is as good as a clip
            continue
        # Where a step cannot be repeated, that it has reached the environment must do
        if makes_a_difference and (is_repeatable or executed):
            if _clip(env) is not None:
                return _widened(env, bounds)
            return Finding(
                "actions-beyond-space",
                f"the environment declares actions in {_range(bounds)}, but larger ones are executed: a policy learns"
                " to use what the robot does not have.",
                "clip actions in the wrapper (clip_actions in Isaac Lab and mjlab), or declare the space you mean.",
            )
    return None


def _is_beyond(actions: Tensor, bounds: tuple[Tensor, Tensor]) -> bool:
    tolerance = 1e-5  # bounds and actions may have gone through float32
    low, high = (side + sign * tolerance * side.abs() for side, sign in zip(bounds, (-1.0, 1.0), strict=True))
    return bool(((actions < low) | (actions > high)).any())


def _unbounded_last_action(env: VecEnv, columns: list[tuple[str, int, int, float]]) -> Finding | None:
    """``columns``: those that repeat a small action. Do they repeat a large one?"""
    if not columns or _clip(env) is not None:
        return None
    for size in _LARGE_ACTIONS:
        _reset(env)
        actions = torch.full((env.num_envs, env.num_actions), size, device=env.device)
        try:
            result = _call(env, "step", actions.clone())
        except _EnvironmentRaised:
            return None
        running = ~(result[2] > 0)
        if not running.any():  # such an action ends the episode; a smaller one may not
            continue
        obs = _groups(result[0])
        for name, column, action, factor in columns:
            seen = obs[name][running, column]
            if torch.allclose(seen, torch.full_like(seen, factor * size), rtol=1e-2):
                return Finding(
                    "unbounded-last-action",
                    f"the observation {name!r} repeats the last action (column {column}: action {action}), and nothing"
                    " bounds it: a policy that sees its own large action may answer with a larger one, until"
                    " everything is NaN.",
                    "set clip_actions (100 is common), or clip that observation term.",
                )
        return None
    return None


def _repeatable_step(env: VecEnv, action: Tensor) -> Tensor:
    """What comes of one action, ``[A]``, after a reset with the same random numbers: all numbers in one row."""
    _begin(env)
    actions = action.to(device=env.device, dtype=torch.float32).expand(env.num_envs, -1).contiguous()
    obs, rewards, _, _ = _call(env, "step", actions)
    return torch.cat([values.reshape(-1).double() for values in (*_groups(obs).values(), rewards)])


@contextlib.contextmanager
def _executed_actions(env: VecEnv) -> Iterator[list[Tensor]]:
    """The actions that reach the environment inside the wrapper, float64 ``[E, A]`` each; none where it has none."""
    executed: list[Tensor] = []
    inner = _innermost(env)
    if inner is env or not hasattr(inner, "step"):
        yield executed
        return
    step = inner.step

    def recording_step(actions: Any, *args: Any, **kwargs: Any) -> Any:
        values = torch.as_tensor(actions).detach().double().cpu().clone()
        if values.numel() == env.num_envs * env.num_actions:
            executed.append(values.reshape(env.num_envs, env.num_actions))
        return step(actions, *args, **kwargs)

    was_replaced = "step" in vars(inner)
    inner.step = recording_step
    try:
        yield executed
    finally:
        if was_replaced:
            inner.step = step
        else:
            del inner.step


# --- the first mini-batch ---------------------------------------------------------------------------------------------


def _first_kl(env: VecEnv, cfg: dict, steps: int) -> Finding | None:
    """One rollout as rsl_rl's runner does it: does the first mini-batch find the policy that has acted?"""
    from rsl_rl.utils import resolve_callable

    cfg = copy.deepcopy(cfg)
    try:
        cfg["num_steps_per_env"] = min(cfg["num_steps_per_env"], max(steps, 2))
        cfg["multi_gpu"] = None
        cfg["torch_compile_mode"] = None  # it would take a minute, and changes no number that matters here
        device = str(env.device)
        obs = _call(env, "get_observations")
        # rsl_rl prints its networks and warns of what _obs_groups has looked at
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alg = resolve_callable(cfg["algorithm"]["class_name"]).construct_algorithm(obs, env, cfg, device)
        if getattr(alg.storage, "training_type", None) != "rl":
            return None
        alg.train_mode()
        statistics = {name: values.clone() for name, values in alg.actor.named_buffers()}
        for _ in range(cfg["num_steps_per_env"]):
            obs, rewards, dones, extras = _call(env, "step", alg.act(obs))
            alg.process_env_step(obs, rewards, dones, extras)
        moved = [name for name, values in alg.actor.named_buffers() if not _same(values, statistics[name]).all()]
        return _compare_policies(alg, moved)
    except _EnvironmentRaised:
        raise
    except Exception as error:  # anything may be wrong with a config
        return Finding(
            "train-config",
            f"train_cfg gives no algorithm that runs on this environment: {type(error).__name__}: {error}",
            "correct what the error names; OnPolicyRunner has to take the same dict (in Isaac Lab, after"
            " handle_deprecated_rsl_rl_cfg).",
        )


def _compare_policies(alg: Any, moved: list[str]) -> Finding | None:
    """``moved``: buffers of the actor that are not as they were before the rollout."""
    from pyfast_ppo.rsl_rl import FusedPPO

    storage = alg.storage
    recurrent = alg.actor.is_recurrent or alg.critic.is_recurrent
    generate = storage.recurrent_mini_batch_generator if recurrent else storage.mini_batch_generator
    batch = next(iter(generate(min(alg.num_mini_batches, storage.num_envs), 1)))
    mixed = bool(getattr(alg, "use_mixed_precision", False))
    kl, rounding = _kl_to_stored(alg, batch, mixed)
    if kl <= rounding:
        return None
    cure = "find what differs between the observations, or the network, at acting and at updating."
    is_note = False
    if moved:
        if _rsl_rl_normalizes_while_acting():
            if isinstance(alg, FusedPPO):  # its learning rate waits for the first step
                return None
            is_note = True
        cause = f"{', '.join(sorted({name.partition('.')[0] for name in moved}))} moved while the rollout was collected"
        cure = (
            "update normalizers once per iteration, after the update, as rsl_rl 5.5 does; rsl_rl 5.4 does it in each"
            " step, where FusedPPO leaves its learning rate alone until the first step of the optimizer."
        )
    elif _is_random(alg, batch):
        cause = "the actor gives another output each time (dropout?)"
        cure = "take what is random out of the actor."
    elif mixed and _kl_to_stored(alg, batch, False)[0] <= rounding:
        cause = "the update runs in mixed precision, the rollout does not"
        cure = (
            "none is needed with FusedPPO; rsl_rl's PPO takes this KL for a reason to raise the learning rate, so set"
            " use_mixed_precision=False there."
        )
        is_note = True
    else:
        cause = "the actor is not the one that has acted, or not on these observations"
    return Finding(
        "first-kl",
        f"before any step was taken, the policy of the first mini-batch is {kl:.1e} nats from the one that has acted,"
        f" where rounding would be {rounding:.0e}: {cause}.",
        cure,
        is_note=is_note,
    )


def _rsl_rl_normalizes_while_acting() -> bool:
    return tuple(int(part) for part in version("rsl-rl-lib").split(".")[:2]) < (5, 5)


def _is_random(alg: Any, batch: Any) -> bool:
    means = []
    for _ in range(2):
        _act_as_in_update(alg, batch, mixed=False)
        means.append(alg.actor.output_mean)
    return not torch.allclose(*means, rtol=1e-3, atol=1e-5)  # GPUs do not always add in the same order


def _act_as_in_update(alg: Any, batch: Any, mixed: bool) -> Tensor:
    """Leaves its distribution in the actor, and returns the log-probabilities of the stored actions, float64."""
    with torch.autocast(device_type=torch.device(alg.device).type, dtype=torch.bfloat16, enabled=mixed):
        alg.actor(batch.observations, masks=batch.masks, hidden_state=batch.hidden_states[0], stochastic_output=True)
        return alg.actor.get_output_log_prob(batch.actions).double()


def _kl_to_stored(alg: Any, batch: Any, mixed: bool) -> tuple[float, float]:
    """Nats between the stored policy and the one that an update would see, and how many of them may be rounding."""
    log_prob = _act_as_in_update(alg, batch, mixed)
    old = tuple(values.double() for values in batch.old_distribution_params)
    new = tuple(values.double() for values in alg.actor.output_distribution_params)
    kl = float(alg.actor.get_kl_divergence(old, new).mean())
    # A stored log-probability that is not of the stored action, as from clipped actions
    log_ratio = log_prob.reshape(-1) - batch.old_actions_log_prob.double().reshape(-1)
    kl = max(kl, float(0.5 * log_ratio.square().mean()))
    mean, std = alg.actor.output_mean.double(), alg.actor.output_std.double()
    # Large observations that are not normalized give large means, which round more coarsely
    rounding = _FIRST_KL + float((0.5 * (1e-5 * mean / std).square()).sum(-1).mean())
    return kl, rounding


# --- what is known of an environment ----------------------------------------------------------------------------------


def _innermost(env: VecEnv) -> Any:
    """The environment without wrappers; ``env`` itself where it wraps none."""
    inner = getattr(env, "env", None)
    return getattr(env if inner is None else inner, "unwrapped", env if inner is None else inner)


def _declared_space(env: VecEnv) -> Any:
    """The action space that the environment declares, before a wrapper may have written over it; None: unknown."""
    inner = _innermost(env)
    if hasattr(inner, "action_manager"):  # its actions have no bounds of their own
        return int(inner.action_manager.total_action_dim)
    spec = getattr(getattr(inner, "cfg", None), "action_space", None)  # Isaac Lab's direct workflow
    if isinstance(spec, int | set | list) or hasattr(spec, "shape"):
        return math.prod(spec) if isinstance(spec, list) and all(isinstance(n, int) for n in spec) else spec
    for owner in (inner, env):
        for name in ("single_action_space", "action_space"):
            if getattr(owner, name, None) is not None:
                return getattr(owner, name)
    return None


def _bounds(space: Any, env: VecEnv) -> tuple[Tensor, Tensor] | None:
    """Lowest and highest action of one environment, float64 ``[size]`` on the CPU; None where ``space`` is no box."""
    if not (hasattr(space, "low") and hasattr(space, "high") and hasattr(space, "shape")):
        return None
    shape = tuple(space.shape)
    low, high = (torch.as_tensor(side, dtype=torch.float64) for side in (space.low, space.high))
    low, high = (side.expand(shape).reshape(-1) for side in (low, high))
    is_batched = len(low) != env.num_actions and shape[:1] == (env.num_envs,)
    size = len(low) // env.num_envs if is_batched else len(low)
    return low[:size], high[:size]


def _clip(env: VecEnv) -> tuple[Any, Any] | None:
    """The wrapper's ``clip_actions`` as (low, high)."""
    clip = getattr(env, "clip_actions", None)
    if clip is None or isinstance(clip, bool):
        return None
    return tuple(clip) if isinstance(clip, tuple | list) else (-clip, clip)


def _per_action(side: Any, num_actions: int) -> Tensor:
    """One side of a clip, float64 ``[A]`` on the CPU."""
    return torch.as_tensor(side, dtype=torch.float64).cpu().expand(num_actions)


def _initial_std(cfg: dict | None) -> float:
    """Of an untrained policy; rsl_rl's default is 1."""
    distribution = ((cfg or {}).get("actor") or {}).get("distribution_cfg") or {}
    std = distribution.get("init_std", 1.0)
    return float(std) if isinstance(std, int | float) and std > 0.0 else 1.0


def _is_finite_horizon(env: VecEnv) -> bool:
    cfgs = (getattr(env, "cfg", None), getattr(_innermost(env), "cfg", None))
    return any(
        cfg.get("is_finite_horizon", False) if isinstance(cfg, Mapping) else getattr(cfg, "is_finite_horizon", False)
        for cfg in cfgs
    )


def _terminated(env: VecEnv, extras: dict) -> Tensor | None:
    """Published by the wrapper, or read from Isaac Lab's and mjlab's environments; bool ``[E]`` or None."""
    values = extras["terminated"] if "terminated" in extras else getattr(_innermost(env), "reset_terminated", None)
    return values > 0 if isinstance(values, Tensor) and values.shape == (env.num_envs,) else None


# --- small things -----------------------------------------------------------------------------------------------------


def _require_vec_env(env: Any) -> None:
    from rsl_rl.env import VecEnv

    if not isinstance(env, VecEnv):
        raise TypeError(
            f"env must be an rsl_rl VecEnv, but is {type(env).__name__}: wrap it in"
            " pyfast_ppo.gymnasium.GymnasiumVecEnv, in the RslRlVecEnvWrapper of pyfast_ppo.isaaclab or"
            " pyfast_ppo.mjlab, or derive your wrapper from rsl_rl.env.VecEnv."
        )


def _as_dict(train_cfg: Any) -> dict | None:
    """A copy of the config as a dict."""
    if train_cfg is None:
        return None
    if isinstance(train_cfg, Mapping):
        return copy.deepcopy(dict(train_cfg))
    if isinstance(train_cfg, type):
        raise TypeError(f"train_cfg must be a config, but is the class {train_cfg.__name__}: make one, with ().")
    if callable(getattr(train_cfg, "to_dict", None)):
        return copy.deepcopy(train_cfg.to_dict())
    if dataclasses.is_dataclass(train_cfg):
        return _without_absent_options(dataclasses.asdict(train_cfg))
    raise TypeError(
        f"train_cfg must be a dict, a dataclass or have to_dict(), but is {type(train_cfg).__name__}: give what"
        " OnPolicyRunner takes."
    )


def _without_absent_options(cfg: dict) -> dict:
    """Without the options of other kinds of networks, which mjlab's dataclass has and its runner takes out."""
    for network in (cfg[name] for name in ("actor", "critic") if isinstance(cfg.get(name), dict)):
        is_recurrent = network.get("rnn_type") is not None
        for option in list(network):
            if network[option] is None or (option.startswith("rnn_") and not is_recurrent):
                del network[option]
    return cfg


def _call(env: VecEnv, method: str, *args: Any) -> Any:
    try:
        return getattr(env, method)(*args)
    except Exception as error:
        raise _EnvironmentRaised(f"{method}()") from error


def _reset(env: VecEnv) -> None:
    if hasattr(env, "reset"):  # rsl_rl does not ask for one
        _call(env, "reset")


def _move_to_limit(env: VecEnv) -> None:
    """All episodes have one step left."""
    counts = env.episode_length_buf
    env.episode_length_buf = (torch.zeros_like(counts) + env.max_episode_length - 1).to(counts.dtype)


def _gaussian_actions(env: VecEnv) -> Tensor:
    return torch.randn(env.num_envs, env.num_actions, device=env.device)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Draws inside are always the same, and leave no trace outside."""
    cuda_devices = [device] if device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda_devices):
        _seed(device)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _seed(device: torch.device) -> None:
    random.seed(_SEED)
    np.random.seed(_SEED)
    # torch.manual_seed would seed GPUs whose state is not kept
    torch.default_generator.manual_seed(_SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_SEED)


def _groups(obs: Any, prefix: str = "") -> Groups:
    """All tensors in a TensorDict or dict; none in anything else."""
    groups: Groups = {}
    for name, values in obs.items() if hasattr(obs, "items") else ():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(values, Tensor):
            groups[path] = values
        else:
            groups |= _groups(values, path)
    return groups


def _copied(obs: Any) -> Groups:
    return {name: values.clone() for name, values in _groups(obs).items()}


def _as_bool(values: Tensor | None) -> Tensor | None:
    return None if values is None else values > 0


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Element by element, and NaN is the same as NaN."""
    return (a == b) | ((a != a) & (b != b))


def _same_rows(a: Tensor, b: Tensor) -> Tensor:
    """bool ``[E]``."""
    return ~_rows_with(~_same(a, b))


def _rows_with(elements: Tensor) -> Tensor:
    """bool ``[E]``: a true element in ``[E, ...]``, which may be ``[E]`` or empty."""
    return elements.unsqueeze(-1).flatten(1).any(dim=1)


def _count(rows: Tensor) -> str:
    return f"{int(rows.sum())} of {len(rows)} environments"


def _range(bounds: tuple[Tensor, Tensor]) -> str:
    low, high = bounds
    return f"[{float(low.min()):g}, {float(high.max()):g}]"


def _shown(clip_actions: Any) -> str:
    return f"{clip_actions:g}" if isinstance(clip_actions, int | float) else str(clip_actions)
