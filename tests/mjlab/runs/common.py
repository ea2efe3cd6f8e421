"""What the scripts share: environments without their tables on the terminal, and a result for the test."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ["MJLAB_WARP_QUIET"] = "1"
warnings.filterwarnings("ignore")

import mjlab.tasks  # noqa: E402, F401  registers the tasks
import torch  # noqa: E402
from mjlab.envs import ManagerBasedRlEnv, ManagerBasedRlEnvCfg  # noqa: E402
from mjlab.rl import RslRlVecEnvWrapper as StockWrapper  # noqa: E402
from mjlab.tasks.registry import load_env_cfg  # noqa: E402

from pyfast_ppo.mjlab import RslRlVecEnvWrapper  # noqa: E402

__all__ = ["RslRlVecEnvWrapper", "StockWrapper", "make_env", "random_actions", "report"]

CARTPOLE = "Mjlab-Cartpole-Balance"


def make_env(
    task: str = CARTPOLE, num_envs: int = 6, edit: Callable[[ManagerBasedRlEnvCfg], None] | None = None
) -> ManagerBasedRlEnv:
    """The bare environment, its config changed by ``edit``."""
    cfg = load_env_cfg(task)
    cfg.scene.num_envs = num_envs
    cfg.seed = 3
    if edit is not None:
        edit(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        return ManagerBasedRlEnv(cfg, device="cpu")


def random_actions(steps: int, env: StockWrapper) -> torch.Tensor:
    """Actions in [-1, 1], ``[steps, E, A]``, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(steps, env.num_envs, env.num_actions, generator=generator) * 2 - 1


def report(result: dict[str, Any]) -> None:
    """Hand the result to the test."""
    print("RESULT", json.dumps(result))
