"""Actions beyond the declared box: what reaches the environment, and does it make a difference there?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.action_space import Bounds, clip_of, declared_bounds, range_of, widened
from pyfast_ppo._check_env.calls import EnvironmentRaised, begin, call
from pyfast_ppo._check_env.environment import innermost
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import groups_of, same


def actions_beyond_space(env: VecEnv) -> Finding | None:
    bounds = declared_bounds(env)
    if bounds is None or not hasattr(env, "reset"):
        return None
    low, high = bounds
    width = torch.where(torch.isfinite(high - low), high - low, 1.0).clamp_min(1.0)
    sides = ((high, high + 10.0 * width), (low, low - 10.0 * width))
    if not any(_are_executed(env, bounds, edge, beyond) for edge, beyond in sides):
        return None
    if clip_of(env) is not None:
        return widened(env, bounds)
    return Finding(
        "actions-beyond-space",
        f"the environment declares actions in {range_of(bounds)}, but larger ones are executed: a policy learns to use"
        " what the robot does not have.",
        "clip actions in the wrapper (clip_actions in Isaac Lab and mjlab), or declare the space you mean.",
    )


def _are_executed(env: VecEnv, bounds: Bounds, edge: Tensor, beyond: Tensor) -> bool:
    has_edge = torch.isfinite(edge)
    if not has_edge.any():
        return False
    at_edge, far = (torch.where(has_edge, side, 0.0) for side in (edge, beyond))
    try:
        with _recorded_actions(env) as inside:
            _outcome(env, far)
        if inside and not _is_beyond(inside[-1], bounds):
            return False
        first, again, of_far = (_outcome(env, action) for action in (at_edge, at_edge, far))
    except EnvironmentRaised:  # it refuses such actions, which is as good as a clip
        return False
    # Where a step cannot be repeated, that it has reached the environment must do
    is_told_apart = bool(inside) or bool(same(first, again).all())
    return is_told_apart and not bool(same(first, of_far).all())


def _is_beyond(actions: Tensor, bounds: Bounds) -> bool:
    tolerance = 1e-5  # bounds and actions may have gone through float32
    low, high = (side + sign * tolerance * side.abs() for side, sign in zip(bounds, (-1.0, 1.0), strict=True))
    return bool(((actions < low) | (actions > high)).any())


def _outcome(env: VecEnv, action: Tensor) -> Tensor:
    """Observations and rewards after one action, ``[A]``, from the same reset: all numbers in one row."""
    begin(env)
    actions = action.to(device=env.device, dtype=torch.float32).expand(env.num_envs, -1).contiguous()
    obs, rewards, _, _ = call(env, "step", actions)
    return torch.cat([values.reshape(-1).double() for values in (*groups_of(obs).values(), rewards)])


@contextlib.contextmanager
def _recorded_actions(env: VecEnv) -> Iterator[list[Tensor]]:
    """The actions that reach the environment inside the wrapper, float64 ``[E, A]`` each; none where it has none."""
    recorded: list[Tensor] = []
    inner = innermost(env)
    if inner is env or not hasattr(inner, "step"):
        yield recorded
        return
    step = inner.step

    def recording_step(actions: Any, *args: Any, **kwargs: Any) -> Any:
        values = torch.as_tensor(actions).detach().double().cpu().clone()
        if values.numel() == env.num_envs * env.num_actions:
            recorded.append(values.reshape(env.num_envs, env.num_actions))
        return step(actions, *args, **kwargs)

    was_replaced = "step" in vars(inner)
    inner.step = recording_step
    try:
        yield recorded
    finally:
        if was_replaced:
            inner.step = step
        else:
            del inner.step
