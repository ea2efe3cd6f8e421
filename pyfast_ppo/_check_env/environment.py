"""What can be read off an environment, whichever simulator and wrapper it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rsl_rl.env import VecEnv
from torch import Tensor


def innermost(env: VecEnv) -> Any:
    """The environment without wrappers; ``env`` itself where it wraps none."""
    inner = getattr(env, "env", None)
    inner = env if inner is None else inner
    return getattr(inner, "unwrapped", inner)


def is_finite_horizon(env: VecEnv) -> bool:
    cfgs = (getattr(env, "cfg", None), getattr(innermost(env), "cfg", None))
    return any(
        cfg.get("is_finite_horizon", False) if isinstance(cfg, Mapping) else getattr(cfg, "is_finite_horizon", False)
        for cfg in cfgs
    )


def time_outs(env: VecEnv, extras: dict) -> Tensor:
    """bool ``[E]``; all false where the wrapper does not say."""
    return extras["time_outs"] > 0 if "time_outs" in extras else _none(env)


def tells_terminations(env: VecEnv, extras: dict) -> bool:
    return "terminated" in extras or hasattr(innermost(env), "reset_terminated")


def terminated(env: VecEnv, extras: dict) -> Tensor:
    """bool ``[E]``: from the wrapper, or from Isaac Lab's and mjlab's environments; all false where neither says."""
    values = extras["terminated"] if "terminated" in extras else getattr(innermost(env), "reset_terminated", None)
    return values > 0 if isinstance(values, Tensor) and values.shape == (env.num_envs,) else _none(env)


def _none(env: VecEnv) -> Tensor:
    return torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
