"""Run the command line inside the test's process: importing torch and mujoco anew takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from pyfast_ppo.cli.main import main


@dataclass
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture) -> Iterator[Callable[..., Outcome]]:
    """``run_command("train", "--seed", 3)`` runs ``pyfast-ppo train --seed 3``."""
    threads = torch.get_num_threads()

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def train(run_command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """A run of two short iterations with two environments; flags given later win."""

    def run(*flags: object) -> Outcome:
        return run_command("train", "--num-envs", 2, "--iterations", 2, *flags)

    return run
