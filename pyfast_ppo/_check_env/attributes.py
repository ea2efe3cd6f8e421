"""Findings about attributes that rsl_rl reads."""

from __future__ import annotations

from typing import Any

import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.finding import Finding


def missing_attribute(env: VecEnv) -> Finding | None:
    missing = [name for name in ("num_envs", "num_actions", "device", "cfg") if not hasattr(env, name)]
    if not missing:
        return None
    return Finding(
        "missing-attribute",
        f"the environment has no {', '.join(missing)}, which rsl_rl reads.",
        "set it in the wrapper's __init__: num_envs and num_actions are integers, device is where the returned tensors"
        " live, cfg anything that tells what the environment is.",
    )


def unknown_device(env: VecEnv) -> Finding | None:
    try:
        torch.empty(0, device=env.device)
    except (RuntimeError, TypeError, AssertionError) as error:
        return Finding(
            "device-mix",
            f"env.device is {env.device!r}, where no tensor can be made: {error}",
            'name a device that this machine has, such as "cpu" or "cuda:0".',
        )
    return None


def max_episode_length(env: VecEnv) -> Finding | None:
    length: Any = getattr(env, "max_episode_length", None)
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


def episode_length_buf(env: VecEnv) -> Finding | None:
    fault = _fault_of_counts(env, getattr(env, "episode_length_buf", None))
    if fault is None:
        return None
    return Finding(
        "episode-length-buf",
        f"episode_length_buf {fault}",
        "make it an integer tensor [E] that counts the steps of the running episodes, and can be assigned to.",
    )


def _fault_of_counts(env: VecEnv, counts: object) -> str | None:
    if not isinstance(counts, Tensor) or counts.shape != (env.num_envs,) or counts.is_floating_point():
        seen = f"{counts.dtype} {list(counts.shape)}" if isinstance(counts, Tensor) else repr(counts)
        return f"is {seen}, not an integer tensor [E]."
    before = counts.clone()  # a setter may write into the tensor that the environment has handed out
    try:
        env.episode_length_buf = before + 1
        is_set = bool((env.episode_length_buf == before + 1).all())
        env.episode_length_buf = before
    except Exception as error:
        return f"cannot be set ({error}), which init_at_random_ep_len=True does."
    if is_set:
        return None
    return (
        "does not keep what is assigned to it: with init_at_random_ep_len=True all environments would still reach"
        " their limit on the same step."
    )
