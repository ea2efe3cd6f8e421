"""Calls of the environment, with random numbers that are the same every time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rsl_rl.env import VecEnv
from torch import Tensor

from pyfast_ppo._check_env.finding import Finding

_SEED = 0


class EnvironmentRaised(Exception):
    """An exception out of the environment; ``__cause__`` is the original."""


def environment_error(error: EnvironmentRaised) -> Finding:
    cause = error.__cause__
    return Finding(
        "environment-error",
        f"{error} raised {type(cause).__name__}: {cause}",
        "run env.reset() and env.step() with random actions by themselves to see the whole traceback.",
    )


def call(env: VecEnv, method: str, *args: Any) -> Any:
    try:
        return getattr(env, method)(*args)
    except Exception as error:
        raise EnvironmentRaised(f"{method}()") from error


def reset(env: VecEnv) -> None:
    if hasattr(env, "reset"):  # rsl_rl does not ask for one
        call(env, "reset")


def begin(env: VecEnv) -> Any:
    """Reset and return the observations; as far as random numbers are torch's, the same steps can follow again."""
    _seed(torch.device(env.device))
    reset(env)
    return call(env, "get_observations")


def gaussian_actions(env: VecEnv) -> Tensor:
    return torch.randn(env.num_envs, env.num_actions, device=env.device)


def move_to_limit(env: VecEnv, rows: Tensor) -> None:
    """The episodes of these environments, bool ``[E]``, have one step left."""
    counts = env.episode_length_buf
    last = (torch.zeros_like(counts) + env.max_episode_length - 1).to(counts.dtype)
    env.episode_length_buf = torch.where(rows, last, counts)


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
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
