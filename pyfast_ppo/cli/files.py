"""Directories of runs: what lies where in them."""

from __future__ import annotations

import json
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.cli.train_config import Settings
from pyfast_ppo.files import write_atomically

CONFIG = "config.json"
HISTORY = "progress.csv"
PICTURE = "learning_curve.png"
POLICY = "policy.pt"

_CHECKPOINT_NAME = re.compile(r"model_(\d+)\.pt")


def make_run_dir(log_dir: str | None, env: str) -> Path:
    """Make the directory of a new run and see that it can be written to.

    Raises:
        UserError: It cannot be written to, or it already holds a run's checkpoints, or another program's file.
    """
    if log_dir is None:
        safe_name = re.sub(r"[^\w.-]", "_", env)
        path = Path("logs", "pyfast_ppo", safe_name, time.strftime("%Y-%m-%d_%H-%M-%S"))
        while path.exists():  # another run was started within the same second
            path = path.with_name(path.name + "_")
    else:
        path = Path(log_dir)
    make_directory(path, "--log-dir")
    if checkpoints(path):
        raise UserError(f"{path} already holds a run; continue it with --resume {path}, or choose another --log-dir.")
    if (path / CONFIG).exists():
        # Of a run that ended before it saved anything, it may be replaced; another program's file may not
        read_settings(path)
    return path


def make_directory(path: Path, flag: str) -> None:
    """Make a directory that files can be written to. ``flag``: the argument that names it.

    Raises:
        UserError: It cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path} ({error.strerror}); choose another {flag}.") from error
    check_writable(path)


def check_writable(run_dir: Path) -> None:
    """Find out now and not after the first iteration.

    Raises:
        UserError: No file can be made in the directory.
    """
    try:
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {run_dir} ({error.strerror}); make it writable.") from error


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Checkpoints of a run directory by their iteration."""
    return {int(match[1]): file for file in run_dir.iterdir() if (match := _CHECKPOINT_NAME.fullmatch(file.name))}


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint itself, or the newest one of a run directory.

    Raises:
        UserError: There is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; --resume needs a checkpoint or a run directory.")
    found = checkpoints(path)
    if not found:
        raise UserError(
            f"{path} holds no checkpoint (model_<iteration>.pt); start the run anew, with --log-dir {path} if you like."
        )
    return found[max(found)]


def set_aside_checkpoints(run_dir: Path, since: int) -> None:
    """Rename those of iterations that will be made again, or the next resume would take them for the newest."""
    for number, file in checkpoints(run_dir).items():
        if number >= since:
            file.rename(free_name(file.with_name(f"{file.name}.old")))  # there may be one from a resume before


def free_name(path: Path) -> Path:
    """The path, with the first number behind it that no file has if it is taken: ``a``, ``a2``, ``a3``."""
    free, count = path, 2
    while free.exists():
        free, count = path.with_name(f"{path.name}{count}"), count + 1
    return free


def write_config(run_dir: Path, settings: Settings, config: dict) -> None:
    """Write the settings, which ``--resume`` reads again, and rsl_rl's configuration, for the record."""
    text = json.dumps({"settings": asdict(settings), "train_config": config}, indent=2, default=str)
    write_atomically(run_dir / CONFIG, text.encode() + b"\n")


def read_settings(run_dir: Path) -> Settings:
    """Read the settings of a run.

    Raises:
        UserError: They are missing or damaged.
    """
    path = run_dir / CONFIG
    try:
        return Settings(**json.loads(path.read_bytes())["settings"])
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, so the task of the run is not known; resume a directory written by pyfast-ppo train."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as the settings of a run ({error}); choose another directory."
        ) from error
