"""Isaac Lab's own Cartpole, direct and manager-based, on the CPU with Newton: no Isaac Sim, nothing downloaded."""

from __future__ import annotations

import atexit
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def report(result: Any) -> None:
    """Hand the result to the test."""
    print("\nRESULT " + json.dumps(result), flush=True)


def make_env(
    workflow: str,
    num_envs: int,
    *,
    configure: Callable[[Any], None] | None = None,
    env_class: Callable[[], type] | None = None,
    seed: int = 1,
) -> Any:
    """The task's environment, not wrapped.

    Args:
        workflow: "direct" or "manager".
        num_envs: Number of environments.
        configure: Changes the config.
        env_class: Returns a class to be used in place of the task's own.
        seed: Of the environment.
    """
    from isaaclab_tasks.utils.hydra import resolve_presets

    cfg, cls = direct_task() if workflow == "direct" else manager_task()
    cfg = resolve_presets(cfg)
    cfg.scene.num_envs = num_envs
    cfg.sim.device = "cpu"
    cfg.seed = seed
    if configure is not None:
        configure(cfg)
    return (env_class() if env_class else cls)(cfg)


def direct_task() -> tuple[Any, type]:
    from isaaclab_tasks.core.cartpole.cartpole_direct_env import CartpoleEnv
    from isaaclab_tasks.core.cartpole.cartpole_direct_env_cfg import CartpoleEnvCfg

    cfg = CartpoleEnvCfg()
    cfg.scene.cartpole.spawn.usd_path = cartpole_usd()
    cfg.scene.ground = None  # would be downloaded
    return cfg, CartpoleEnv


def manager_task() -> tuple[Any, type]:
    from isaaclab.envs import ManagerBasedRLEnv
    from isaaclab_tasks.core.cartpole.cartpole_manager_env_cfg import CartpoleEnvCfg

    cfg = CartpoleEnvCfg()
    cfg.scene.robot.spawn.usd_path = cartpole_usd()
    cfg.scene.ground = None
    return cfg, ManagerBasedRLEnv


@functools.cache
def cartpole_usd() -> str:
    """Isaac Lab's cartpole as Newton ships it, with the name of its default prim spelt right."""
    import newton.examples

    text = Path(newton.examples.get_asset("cartpole_single_pendulum.usda")).read_text()
    handle, path = tempfile.mkstemp(suffix=".usda", prefix="cartpole-")
    atexit.register(os.unlink, path)
    with os.fdopen(handle, "w") as file:
        file.write(text.replace('defaultPrim = "cartPole"', 'defaultPrim = "cartpole"'))
    return path


def actions_of(step: int, num_envs: int) -> torch.Tensor:
    """The same in every run, ``[E, 1]``."""
    phases = torch.arange(num_envs, dtype=torch.float32).unsqueeze(1)
    return 0.3 * torch.sin(0.7 * step + phases)
