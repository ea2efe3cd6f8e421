"""Tasks of Isaac Lab and mjlab by their names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import TYPE_CHECKING

from pyfast_ppo.cli.errors import UserError

if TYPE_CHECKING:
    from rsl_rl.env import VecEnv

SIMULATORS = {"Isaac-": "isaaclab", "Mjlab-": "mjlab"}
"""How the names of a simulator's tasks begin, and its package; ``pyfast_ppo`` has a module of the same name."""


def default_device() -> str:
    """The first GPU, where simulators are at home, if there is one."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def make_simulated(task: str, num_envs: int, device: str, seed: int) -> tuple[VecEnv, dict]:
    """The task in pyfast_ppo's wrapper, and the runner config that its simulator registers with it.

    The simulator is the one that the name belongs to; for any other name each that is installed is asked.

    Raises:
        UserError: There is no such task, or its simulator cannot be used.
    """
    packages = [package for prefix, package in SIMULATORS.items() if task.startswith(prefix)]
    packages = packages or [package for package in SIMULATORS.values() if importlib.util.find_spec(package)]
    if not packages:
        raise UserError(
            f"--task {task} needs Isaac Lab or mjlab, and neither is installed; --env takes Gymnasium's ids."
        )
    from pyfast_ppo.precision import multiply_in_tf32  # torch

    _quieten_warp()
    multiply_in_tf32()
    reasons = []
    for package in packages:
        try:
            return importlib.import_module(f"pyfast_ppo.{package}").make(task, num_envs, device, seed)
        except (ImportError, LookupError, ValueError) as error:
            reasons.append(str(error))
    raise UserError(f"--task {task} cannot be made: {'; '.join(reasons)}")


def _quieten_warp() -> None:
    """No line for each kernel that Warp loads: there are hundreds."""
    with contextlib.suppress(ImportError):
        importlib.import_module("warp").config.quiet = True
