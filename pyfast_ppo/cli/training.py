"""One training run from its arguments to its summary."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import os
import random
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from pyfast_ppo.cli import files
from pyfast_ppo.cli.console import Console, ProgressTable
from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.cli.history import History, Record
from pyfast_ppo.cli.report import draw_learning_curve, print_summary
from pyfast_ppo.cli.runner import TrainRunner
from pyfast_ppo.cli.simulators import default_device
from pyfast_ppo.cli.stop import StopRequest
from pyfast_ppo.cli.task import Task, make_task
from pyfast_ppo.cli.train_config import Settings, default_iterations

SIMULATED_ON_GPU, SIMULATED_ON_CPU = 4096, 64  # environments, where none are asked for

_NOTHING_SAVED = "nothing was saved yet"
_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(args: argparse.Namespace) -> int:
    """Train as the arguments say. Returns 0, or 130 when a signal stopped the run."""
    started = time.monotonic()
    settings, checkpoint = _resolve(args)
    _check_device(settings.device)
    if settings.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # these networks are so small that handing work to threads costs more than it gives
    _seed(settings.seed)
    with contextlib.closing(make_task(settings)) as task:
        if settings.simulated and checkpoint is None and args.iterations is None:
            settings = dataclasses.replace(settings, iterations=task.config["max_iterations"])
        if checkpoint is None:
            run_dir = files.make_run_dir(args.log_dir, settings.env)
        else:
            run_dir = checkpoint.parent
            files.check_writable(run_dir)
        try:
            return _train(settings, task, run_dir, checkpoint, started)
        except OSError as error:
            if not _is_of_writing(error, run_dir):
                raise
            raise UserError(f"cannot write to {run_dir} ({error.strerror or error}).", exit_code=1) from error


def _train(settings: Settings, task: Task, run_dir: Path, checkpoint: Path | None, started: float) -> int:
    runner = TrainRunner(task.env, task.config, run_dir, settings.device)
    if checkpoint is not None:
        _restore(runner, task, checkpoint, settings)
        files.set_aside_checkpoints(run_dir, since=runner.current_learning_iteration)
    files.write_config(run_dir, settings, task.config)

    steps_per_iteration = settings.num_envs * task.config["num_steps_per_env"]
    console = Console()
    console.say(
        f"{settings.env}: {settings.algorithm} PPO, {settings.num_envs} environments, {settings.iterations} iterations"
        f" of {steps_per_iteration:,} steps, seed {settings.seed}, {settings.device}"
    )
    console.say(f"run directory {run_dir}\n" if checkpoint is None else f"resumed from {checkpoint}\n")

    history = History(run_dir / files.HISTORY, before=runner.current_learning_iteration)
    stopped = False
    with StopRequest() as stop:
        observer = _IterationObserver(settings, steps_per_iteration, runner, history, stop, console, started)
        try:
            runner.learn_until(settings.iterations, observer, task.random_first_lengths)
        except _Stopped:
            stopped = True
            runner.save(str(_last_checkpoint(runner, run_dir)))
        except KeyboardInterrupt:
            unfinished = _save_unfinished(runner, run_dir)
            how = _how_to_go_on(run_dir, unfinished)
            console.say(f"stopped within iteration {runner.whole_iterations + 1}; {how}")
            return 130
        except task.divergence as error:
            saved = f"checkpoints from before are in {run_dir}" if files.checkpoints(run_dir) else _NOTHING_SAVED
            raise UserError(f"training has met numbers that are not finite; {saved}: {error}", 1) from error
        finally:
            runner.close_logs()
            draw_learning_curve(run_dir / files.PICTURE, settings, history.records, task.threshold)

    runner.export_policy(run_dir / files.POLICY)
    paths = {
        "checkpoint": _last_checkpoint(runner, run_dir),
        "policy": run_dir / files.POLICY,
        "learning curve": run_dir / files.PICTURE,
        "history": run_dir / files.HISTORY,
    }
    console.say()
    print_summary(console, settings, history.records, task.threshold, paths)
    console.say(f"TensorBoard: tensorboard --logdir {shlex.quote(str(run_dir))}")
    if stopped:
        console.say(f"stopped by a signal; {_how_to_go_on(run_dir)}")
    return 130 if stopped else 0


class _Stopped(Exception):
    """A signal has asked for an end, and the iteration is complete."""


class _IterationObserver:
    """Takes down and shows each iteration, and ends the training when a signal has asked for it."""

    def __init__(
        self,
        settings: Settings,
        steps_per_iteration: int,
        runner: TrainRunner,
        history: History,
        stop: StopRequest,
        console: Console,
        started: float,
    ) -> None:
        self._settings = settings
        self._steps_per_iteration = steps_per_iteration
        self._runner = runner
        self._history = history
        self._stop = stop
        self._table = ProgressTable(console, settings.iterations)
        wall_before = history.records[-1].wall_s if history.records else 0.0
        self._zero = started - wall_before
        self._first_iteration = runner.current_learning_iteration
        self._learning_since = time.monotonic()

    def __call__(
        self, *, it: int, collect_time: float, learn_time: float, loss_dict: dict, learning_rate: float, **_: object
    ) -> None:
        """Take the keyword arguments of rsl_rl's ``Logger.log``."""
        now = time.monotonic()
        kl = loss_dict.get("kl")
        record = Record(
            iteration=it,
            env_steps=self._runner.logger.tot_timesteps,
            mean_reward=self._runner.mean_reward,
            mean_episode_length=self._runner.mean_episode_length,
            kl=None if kl is None else float(kl),
            learning_rate=float(learning_rate),
            collect_s=collect_time,
            learn_s=learn_time,
            wall_s=now - self._zero,
        )
        self._history.append(record)

        done = it + 1
        seconds_per_iteration = (now - self._learning_since) / (done - self._first_iteration)
        self._table.row(
            record,
            steps_per_second=self._steps_per_iteration / (collect_time + learn_time),
            eta=seconds_per_iteration * (self._settings.iterations - done),
        )
        if self._stop.requested and done < self._settings.iterations:
            raise _Stopped


def _resolve(args: argparse.Namespace) -> tuple[Settings, Path | None]:
    """Settings of the run, and the checkpoint to go on from."""
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Settings)
        if getattr(args, field.name, None) is not None
    }
    if args.task is not None:
        given |= {"env": args.task, "simulated": True}
    if args.resume is None:
        if args.task is None:
            given.setdefault("iterations", default_iterations(given.get("env", Settings.env)))
        else:
            given.setdefault("device", default_device())
            given.setdefault("num_envs", SIMULATED_ON_GPU if given["device"].startswith("cuda") else SIMULATED_ON_CPU)
        return Settings(**given), None
    checkpoint = files.find_checkpoint(Path(args.resume))
    stored = files.read_settings(checkpoint.parent)
    if given.get("env", stored.env) != stored.env:
        raise UserError(f"{args.resume} is a run of {stored.env}, not of {given['env']}; leave --env and --task away.")
    return dataclasses.replace(stored, **given), checkpoint


def _restore(runner: TrainRunner, task: Task, checkpoint: Path, settings: Settings) -> None:
    runner.restore(checkpoint)
    done = runner.current_learning_iteration
    if done >= settings.iterations:
        raise UserError(
            f"{checkpoint} has had {done} iterations already; give a larger total, such as --iterations {2 * done}."
        )
    # Not the random numbers of the beginning once more
    _seed(settings.seed + done)
    task.reseed(settings.seed + done)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {name!r} cannot be used ({reason}); try --device cpu.") from error


def _is_of_writing(error: OSError, run_dir: Path) -> bool:
    """Whether it comes from the run's files; an environment may miss files of its own."""
    if error.filename is None:  # write() and fsync() do not know the name
        return error.errno in _FULL_OR_READ_ONLY
    return Path(str(error.filename)).absolute().is_relative_to(run_dir.absolute())


def _save_unfinished(runner: TrainRunner, run_dir: Path) -> Path | None:
    """Save the present state under the number of the last whole iteration, with the steps taken since.

    A checkpoint that has that number already, without these steps, is kept: the state then has a name beside it.

    Returns:
        The file; None before the first iteration is whole.
    """
    if runner.whole_iterations == 0:
        return None
    runner.current_learning_iteration = runner.whole_iterations - 1
    path = _last_checkpoint(runner, run_dir)
    if path.exists():
        path = files.free_name(path.with_name(f"{path.name}.stopped"))
    runner.save(str(path))
    return path


def _how_to_go_on(run_dir: Path, unfinished: Path | None = None) -> str:
    """``unfinished``: what was saved within an iteration."""
    newest = files.checkpoints(run_dir)
    if not newest:
        return _NOTHING_SAVED
    resume = f"resume with: pyfast-ppo train --resume {shlex.quote(str(run_dir))}"
    if unfinished is None or unfinished in newest.values():
        return resume
    return f"{resume}, or with the steps within the iteration: --resume {shlex.quote(str(unfinished))}"


def _last_checkpoint(runner: TrainRunner, run_dir: Path) -> Path:
    return run_dir / f"model_{runner.current_learning_iteration}.pt"  # rsl_rl's name for it
