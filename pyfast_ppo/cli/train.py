"""Train a task of Gymnasium, Isaac Lab or mjlab and leave a policy, logs and a picture of the learning curve."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from pyfast_ppo.cli import files
from pyfast_ppo.cli.arguments import positive, seed
from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.cli.train_config import ALGORITHMS, Settings, default_iterations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command. An absent flag is None: on ``--resume`` it means what the run had."""
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--env",
        metavar="ID",
        help=f"Gymnasium id of a continuous-action task, module:id where a module registers it ({Settings.env})",
    )
    task.add_argument(
        "--task",
        metavar="NAME",
        help="a task of Isaac Lab or mjlab: Isaac-Cartpole-Direct, Mjlab-Cartpole-Balance, ...",
    )
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, help=f"pyfast_ppo's FusedPPO or rsl_rl's PPO ({Settings.algorithm})"
    )
    parser.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help="iterations of the whole run, also of a resumed one"
        f" ({default_iterations(Settings.env)}; {default_iterations('')} for other tasks of Gymnasium; with --task what"
        " the task says)",
    )
    parser.add_argument(
        "--num-envs",
        type=positive,
        metavar="N",
        help=f"environments ({Settings.num_envs}; with --task 4096 on a GPU, 64 on the CPU)",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help=f"seed of everything random ({Settings.seed})")
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=f"device of actor and critic ({Settings.device}; with --task cuda:0 if there is one)",
    )
    directory = parser.add_mutually_exclusive_group()
    directory.add_argument("--log-dir", metavar="DIR", help="directory of the run (logs/pyfast_ppo/<env>/<timestamp>)")
    directory.add_argument(
        "--resume", metavar="PATH", help="a checkpoint, or a run directory (its newest) to go on from"
    )


def run(args: argparse.Namespace) -> int:
    """Train. Returns 0, or 130 when a signal stopped the run.

    Raises:
        UserError: An argument is wrong, something is missing, or the run failed for a known reason.
    """
    needed = ("matplotlib",) if _is_simulated(args) else ("gymnasium", "mujoco", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training needs {' and '.join(missing)}; install with: pip install 'pyfast-ppo[gym]'")
    from pyfast_ppo.cli.training import train  # torch, rsl_rl and matplotlib: only when they are used

    return train(args)


def _is_simulated(args: argparse.Namespace) -> bool:
    """Whether it is a task of Isaac Lab or mjlab; where a run is resumed, its settings say so."""
    if args.task is not None or args.resume is None:
        return args.task is not None
    return files.read_settings(files.find_checkpoint(Path(args.resume)).parent).simulated
