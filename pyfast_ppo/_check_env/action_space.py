"""The declared action space and the wrapper's clip; what is wrong with them shows without a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.config import initial_std
from pyfast_ppo._check_env.environment import innermost
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo.vec_env import clip_range, clip_shown

_CUT_OFTEN = 0.05
"""Share of an untrained policy's actions that a clip may cut without a finding: [-2, 2] at a std of 1 is below."""

Bounds = tuple[Tensor, Tensor]
"""Lowest and highest action of one environment, float64 ``[A]`` on the CPU."""


def discrete_actions(env: VecEnv) -> Finding | None:
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


def num_actions(env: VecEnv) -> Finding | None:
    space, bounds = _declared_space(env), declared_bounds(env)
    declared = env.num_actions
    if isinstance(space, int):
        declared = space
    elif bounds is not None:
        declared = len(bounds[0])
    if declared == env.num_actions:
        return None
    return Finding(
        "num-actions",
        f"num_actions is {env.num_actions}, but the action space has {declared} dimensions.",
        "set num_actions to the size of one environment's action.",
    )


def clip_cuts_actions(env: VecEnv, cfg: dict | None) -> Finding | None:
    clip, declared = clip_of(env), declared_bounds(env)
    if clip is None:
        return None
    low, high = map(torch.tensor, clip)  # copies: broadcast arrays cannot be written to
    if declared is not None:  # bounds that the task itself has are no business of the clip's
        low = torch.where(low > declared[0], low, -math.inf)
        high = torch.where(high < declared[1], high, math.inf)
    std = initial_std(cfg)
    normal = torch.distributions.Normal(0.0, std)
    share = float((normal.cdf(low) + 1.0 - normal.cdf(high)).mean())
    if share <= _CUT_OFTEN:
        return None
    return Finding(
        "clip-cuts-actions",
        f"clip_actions={_clip_shown(env)} cuts {share:.0%} of the actions of an untrained policy (std {std:g}), which"
        " the action space allows: they all have the same effect, and tasks that need larger ones cannot be learned.",
        f"let clip_actions be about {5.0 * std:g} or more, and scale actions in the environment; or lower init_std.",
    )


def clip_widens_space(env: VecEnv) -> Finding | None:
    """Isaac Lab's wrapper writes ±clip_actions over the space that the environment has declared."""
    present = _bounds(getattr(innermost(env), "single_action_space", None), env)
    declared = declared_bounds(env)
    if clip_of(env) is None or present is None or declared is None or len(present[0]) != len(declared[0]):
        return None
    if bool((present[0] >= declared[0]).all() and (present[1] <= declared[1]).all()):
        return None
    return widened(env, declared)


def widened(env: VecEnv, declared: Bounds) -> Finding:
    return Finding(
        "clip-widens-space",
        f"the environment declares actions in {range_of(declared)}, but clip_actions={_clip_shown(env)} lets larger"
        " ones through.",
        "use the wrapper of pyfast_ppo.isaaclab or pyfast_ppo.mjlab, which clips to both, or lower clip_actions.",
    )


def declared_bounds(env: VecEnv) -> Bounds | None:
    """None where the declared space is no box."""
    return _bounds(_declared_space(env), env)


def clip_of(env: VecEnv) -> tuple[Any, Any] | None:
    """The wrapper's ``clip_actions`` as (low, high), [A] each; None where there is none, or it means something else."""
    clip = getattr(env, "clip_actions", None)
    if clip is None or isinstance(clip, bool):
        return None
    try:
        return clip_range(clip, env.num_actions)
    except (TypeError, ValueError):
        return None


def range_of(bounds: Bounds) -> str:
    low, high = bounds
    return f"[{float(low.min()):g}, {float(high.max()):g}]"


def _declared_space(env: VecEnv) -> Any:
    """The action space that the environment declares, before a wrapper may have written over it; None: unknown."""
    inner = innermost(env)
    if hasattr(inner, "action_manager"):  # its actions have no bounds of their own
        return int(inner.action_manager.total_action_dim)
    spec = getattr(getattr(inner, "cfg", None), "action_space", None)  # Isaac Lab's direct workflow
    if isinstance(spec, list) and all(isinstance(n, int) for n in spec):
        return math.prod(spec)
    if isinstance(spec, int | set | list) or hasattr(spec, "shape"):
        return spec
    for owner in (inner, env):
        for name in ("single_action_space", "action_space"):
            if getattr(owner, name, None) is not None:
                return getattr(owner, name)
    return None


def _bounds(space: Any, env: VecEnv) -> Bounds | None:
    """``space`` may be that of one environment or of all of them together."""
    if not (hasattr(space, "low") and hasattr(space, "high") and hasattr(space, "shape")):
        return None
    shape = tuple(space.shape)
    low, high = (
        torch.as_tensor(side, dtype=torch.float64).expand(shape).reshape(-1) for side in (space.low, space.high)
    )
    is_batched = len(low) != env.num_actions and shape[:1] == (env.num_envs,)
    size = len(low) // env.num_envs if is_batched else len(low)
    return low[:size], high[:size]


def _clip_shown(env: VecEnv) -> str:
    clip = env.clip_actions
    return f"{clip:g}" if isinstance(clip, int | float) else clip_shown(clip)
