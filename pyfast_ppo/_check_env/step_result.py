"""Findings about the form of what ``step()`` returns, and about its rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import Groups, count, groups_of
from pyfast_ppo._check_env.observations import changed_groups, observations_format
from pyfast_ppo._check_env.step import Step


def step_format(env: VecEnv, cfg: dict | None, before: Groups, result: Any) -> Finding | None:
    """The first thing wrong with the form of what step() has returned; ``before``: observations of the step before."""
    if not isinstance(result, tuple) or len(result) != 4 or not isinstance(result[3], dict):
        seen = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        return Finding(
            "step-result",
            f"step() returns {seen}, not (observations, rewards, dones, extras) with a dict of extras.",
            "dones = terminated | truncated; what is truncated alone is extras['time_outs'].",
        )
    obs, rewards, dones, extras = result
    rows = {"rewards": rewards, "dones": dones}
    rows |= {name: extras[name] for name in ("time_outs", "terminated") if name in extras}
    tensors = groups_of(obs) | rows | {"episode_length_buf": getattr(env, "episode_length_buf", None)}
    findings = (
        observations_format(env, cfg, obs),
        *(_row_format(env, name, values) for name, values in rows.items()),
        device_mix(env, tensors | groups_of(extras.get("final_obs"), "final_obs")),
        changed_groups(before, obs),
    )
    return next((finding for finding in findings if finding is not None), None)


def device_mix(env: VecEnv, tensors: Mapping[str, Any]) -> Finding | None:
    here = torch.device(env.device)
    for name, values in tensors.items():
        there = values.device if isinstance(values, Tensor) else here
        if there.type != here.type or (None not in (there.index, here.index) and there.index != here.index):
            return Finding(
                "device-mix",
                f"{name!r} is on {there}, but env.device is {here}.",
                "return every tensor on env.device; copies between devices make each step wait.",
            )
    return None


def non_finite_rewards(step: Step) -> Finding | None:
    rows = ~torch.isfinite(step.rewards)
    if not rows.any():
        return None
    return Finding(
        "non-finite-rewards",
        f"the reward is NaN or infinite in {count(rows)}: advantages are normalized over the rollout, so that one such"
        " reward spoils them all.",
        "look for a division by 0, or a logarithm or power of a negative number, in the reward terms.",
    )


def _row_format(env: VecEnv, name: str, values: Any) -> Finding | None:
    """One number for each environment."""
    is_real = name == "rewards"
    if not isinstance(values, Tensor):
        seen = f"a {type(values).__name__}"
    elif values.shape != (env.num_envs,) or values.is_floating_point() != is_real:
        seen = f"{values.dtype} {list(values.shape)}"
    else:
        return None
    kind = "a floating-point tensor" if is_real else "a bool or integer tensor"
    return Finding(
        f"{name.replace('_', '-')}-format",
        f"{name} are {seen}, not {kind} [{env.num_envs}].",
        "return one number for each environment, without a further dimension: [E, 1] broadcasts to [E, E].",
    )
