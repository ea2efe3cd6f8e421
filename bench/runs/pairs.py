"""Runs of both arms in pairs, at the same time on two cores, resumable: a file per run in a work folder.

What disturbs the machine disturbs both arms of a pair, and the arms change cores from seed to seed, so that their times
can be compared pair by pair.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pyfast_ppo.files import write_atomically
from runs.comparison import ARMS, final_return
from runs.training import Spec

_POLL = 0.1  # s
_PROGRAM = Path(__file__).parents[1] / "train_once.py"


class RunError(Exception):
    """A run failed, or runs cannot be compared."""


@dataclass(frozen=True)
class Pair:
    """Both arms of a task with one seed."""

    spec: Spec  # of either arm
    python: str  # interpreter

    def of_arm(self, arm: str) -> Spec:
        return replace(self.spec, arm=arm)


def result_path(work: Path, spec: Spec) -> Path:
    return work / f"{spec.task}.{spec.arm}.{spec.seed}.json"


def load(work: Path, spec: Spec) -> dict | None:
    """The result of a run, if there is one of this very spec."""
    try:
        result = json.loads(result_path(work, spec).read_bytes())
    except (OSError, ValueError):
        return None
    return result if result.get("spec") == asdict(spec) else None


def run_pairs(pairs: Sequence[Pair], work: Path) -> None:
    """Run what is missing, as many pairs at once as there are two cores for. Ctrl-C keeps the pairs that are done.

    A pair of which one run is missing is run again as a whole: times are compared within a pair.

    Raises:
        RunError: A run failed; its output is in the message.
    """
    work.mkdir(parents=True, exist_ok=True)
    missing = [pair for pair in pairs if any(load(work, pair.of_arm(arm)) is None for arm in ARMS)]
    print(f"{len(pairs) - len(missing)} of {len(pairs)} pairs of runs are in {work}", flush=True)
    free = _core_pairs()
    running: list[_RunningPair] = []
    started, done = time.monotonic(), 0
    try:
        while missing or running:
            while missing and free:
                running.append(_RunningPair(missing.pop(0), work, free.pop()))
            time.sleep(_POLL)
            for pair in [pair for pair in running if pair.has_ended()]:
                running.remove(pair)
                free.append(pair.cores)
                done += 1
                left = (time.monotonic() - started) / done * (len(missing) + len(running))
                print(f"{pair.summary()}  {len(missing) + len(running)} to go, {left / 60:.1f} min", flush=True)
    finally:
        for pair in running:
            pair.stop()


def gather(pairs: Sequence[Pair], work: Path) -> dict[str, list[dict]]:
    """Results of a task by arm, in the order of the pairs.

    Raises:
        RunError: The runs were made with different versions or configs.
    """
    results = {arm: [load(work, pair.of_arm(arm)) for pair in pairs] for arm in ARMS}
    every = [result for runs in results.values() for result in runs]
    for what, of in (("made_with", lambda r: r["made_with"]), ("config", shared_config)):
        different = [r["spec"] for r in every if of(r) != of(every[0])]
        if different:
            paths = ", ".join(str(result_path(work, Spec(**spec))) for spec in different)
            raise RunError(f"runs with another {what!r} than the first cannot be compared with it; remove {paths}")
    return results


def shared_config(result: dict) -> dict:
    """The runner's config without what differs between the runs of a task: the algorithm's class and the seed."""
    config = {name: value for name, value in result["config"].items() if name != "seed"}
    algorithm = {name: value for name, value in config["algorithm"].items() if name != "class_name"}
    return {**config, "algorithm": algorithm}


class _RunningPair:
    """Two processes."""

    def __init__(self, pair: Pair, work: Path, cores: tuple[int, int]) -> None:
        self.pair, self.work, self.cores = pair, work, cores
        self._started = time.monotonic()
        swapped = cores if pair.spec.seed % 2 else cores[::-1]
        self._processes = {arm: self._start(pair.of_arm(arm), core) for arm, core in zip(ARMS, swapped, strict=True)}

    def _start(self, spec: Spec, core: int) -> subprocess.Popen:
        result = result_path(self.work, spec)
        result.unlink(missing_ok=True)
        spec_path = result.with_suffix(".spec")
        write_atomically(spec_path, json.dumps(asdict(spec)).encode())
        command = [self.pair.python, str(_PROGRAM), str(spec_path), str(result), str(core)]
        # before torch is loaded: two processes that each start a thread per core would fight for them
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(result.with_suffix(".log"), "wb") as log:
            # a session of its own: Ctrl-C in the terminal comes to this process, which ends the runs
            try:
                return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            except OSError as error:
                raise RunError(f"{self.pair.python} cannot be started: {error.strerror}") from error

    def has_ended(self) -> bool:
        """Whether both runs are done.

        Raises:
            RunError: One failed.
        """
        codes = {arm: process.poll() for arm, process in self._processes.items()}
        for arm, code in codes.items():
            if code:
                log = result_path(self.work, self.pair.of_arm(arm)).with_suffix(".log")
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise RunError(f"{self.pair.python} {_PROGRAM.name} ended with {code}; the end of {log}:\n{tail}")
        return all(code == 0 for code in codes.values())

    def summary(self) -> str:
        spec = self.pair.spec
        finals = {arm: final_return(load(self.work, self.pair.of_arm(arm))["record"]) for arm in ARMS}
        returns = ", ".join(f"{arm} {value:.4g}" for arm, value in finals.items())
        return f"{spec.task} seed {spec.seed}: final return {returns}; {time.monotonic() - self._started:.0f} s;"

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def _core_pairs() -> list[tuple[int, int]]:
    """Cores two by two; on a machine with one core both runs of a pair share it."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]
    if len(cores) == 1:
        return [(cores[0], cores[0])]
    return list(zip(cores[::2], cores[1::2], strict=False))


def exit_status(program: Callable[[], int]) -> int:
    """Run it, and say in a sentence what ended it early. SIGTERM ends it as Ctrl-C does: with the runs it started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return program()
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the pairs that are missing", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
