"""Findings about observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDictBase

from pyfast_ppo._check_env.config import groups_read
from pyfast_ppo._check_env.environment import innermost
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import Groups, count, groups_of, rows_with
from pyfast_ppo._check_env.step import Step


def observations_format(env: VecEnv, cfg: dict | None, obs: Any) -> Finding | None:
    fault = _fault_of_format(env, cfg, obs)
    if fault is None:
        return None
    return Finding("observations-format", fault, "return a TensorDict of float32 groups [E, ...] with batch_size=[E].")


def _fault_of_format(env: VecEnv, cfg: dict | None, obs: Any) -> str | None:
    if not isinstance(obs, TensorDictBase):
        return f"observations are a {type(obs).__name__}, not a TensorDict."
    if obs.batch_size[:1] != (env.num_envs,):
        return f"the TensorDict of observations has batch_size {list(obs.batch_size)}, not [{env.num_envs}]."
    read = groups_read(cfg)
    for name, values in groups_of(obs).items():
        if values.dtype != torch.float32 and (read is None or name in read):
            return f"the observation {name!r} is {values.dtype}, but rsl_rl's networks are float32."
    return None


def changed_groups(before: Groups, obs: Any) -> Finding | None:
    shapes = [{name: tuple(values.shape) for name, values in groups.items()} for groups in (before, groups_of(obs))]
    if shapes[0] == shapes[1]:
        return None
    return Finding(
        "observations-format",
        f"step() returns the observations {shapes[1]}, but those before were {shapes[0]}.",
        "let get_observations() and step() return the same groups with the same shapes.",
    )


def observation_space(env: VecEnv, obs: Any) -> Finding | None:
    space = getattr(env, "observation_space", None)
    if space is None:
        space = getattr(env, "single_observation_space", None)
    fault = None if space is None else _fault_of_space(space, groups_of(obs))
    if fault is None:
        return None
    return Finding(
        "observation-space",
        f"the observation space declares {fault}",
        "declare a Dict with the returned groups, as the wrapper of pyfast_ppo.isaaclab does. rsl_rl does not read the"
        " space, but exporters and other libraries do.",
    )


def _fault_of_space(space: Any, groups: Groups) -> str | None:
    declared = _shapes(space, next(iter(groups)) if len(groups) == 1 else "(one box)")
    if set(declared) != set(groups):
        return f"{', '.join(declared)}, but {', '.join(groups)} are returned."
    for name, shape in declared.items():
        returned = tuple(groups[name].shape)
        if shape not in (returned, returned[1:]):
            return f"{name!r} with the shape {shape}, but {returned} is returned."
    return None


def _shapes(space: Any, name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shape of each box in a space, which is called ``name`` where the space is one itself."""
    if not hasattr(space, "spaces"):
        return {name: tuple(space.shape)}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, subspace in space.spaces.items() if isinstance(space.spaces, Mapping) else enumerate(space.spaces):
        shapes |= _shapes(subspace, f"{prefix}{key}", f"{prefix}{key}/")
    return shapes


def flat_image(env: VecEnv, obs: Any) -> Finding | None:
    for name, shape in flat_images(env, groups_of(obs)).items():
        return Finding(
            "flat-image",
            f"the observation {name!r} is an image of the shape {shape}, but is handed out as a row of numbers: an MLP"
            " would have to learn which of them are neighbours.",
            "hand it out as [E, C, H, W] and let a CNNModel read it; GymnasiumVecEnv keeps images whose channels come"
            " first.",
        )
    return None


def flat_images(env: VecEnv, groups: Groups) -> dict[str, tuple[int, ...]]:
    """Groups ``[E, d]`` that the environment declares as images, three dimensions of bytes; and their shapes there."""
    space = getattr(innermost(env), "single_observation_space", None)
    spaces = getattr(space, "spaces", {name: space for name in groups} if len(groups) == 1 else {})
    return {
        name: tuple(spaces[name].shape)
        for name, values in groups.items()
        if values.dim() == 2 and isinstance(spaces, Mapping) and _is_image(spaces.get(name))
    }


def _is_image(space: Any) -> bool:
    return len(getattr(space, "shape", None) or ()) == 3 and str(space.dtype) == "uint8"


def non_finite_observations(step: Step) -> Finding | None:
    for name, values in step.obs.items():
        rows = rows_with(~torch.isfinite(values))
        if rows.any():
            return Finding(
                "non-finite-observations",
                f"the observation {name!r} is NaN or infinite in {count(rows)}: the networks and their normalizers"
                " do not recover from it. rsl_rl stops at NaN, but not at an infinite number.",
                "end an episode whose simulation has diverged, and divide by nothing that can be 0.",
            )
    return None
