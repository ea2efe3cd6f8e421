"""Documents made by hand, and no compiler: one that takes seconds a case is no test of the harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyfast_ppo.bench import operations as ops
from pyfast_ppo.bench import results
from pyfast_ppo.bench.counts import Work
from pyfast_ppo.bench.harness import Timing

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def load_script() -> Callable[[str], ModuleType]:
    """``load_script("plot")`` is bench/plot.py."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"bench_script_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where torch.compile finds none: it says so when a compiled function is called."""

    def compile_nothing(function: Callable, **_: object) -> Callable:
        def call(*_: object, **__: object) -> None:
            raise RuntimeError("no compiler here\nand more about it")

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile hands back what it is given."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def timing(seconds: float, rounds: int = 10) -> Timing:
    """Around ``seconds``, within two percent."""
    return Timing([seconds * (1.0 + 0.004 * (i % 10 - 5)) for i in range(rounds)])


@pytest.fixture
def document() -> dict:
    """A loss over N and over A, and as a sequence of operations; an iteration, and what it is spent on."""
    made = results.new_document("cpu")
    shapes = [(1_024, 12), (4_096, 12), (24_576, 12), (24_576, 1), (24_576, 37)]
    for rows, actions in shapes:
        seconds = 1e-8 * rows * actions
        timings = {"rsl_rl": timing(20 * seconds), "torch.compile": timing(3 * seconds)}
        timings["ppo_loss_and_grad"] = timing(seconds)
        case = {"N": rows, "A": actions, "old_std": "[N, A]", "input sets": 4}
        moved, floor = 20 * rows * actions, timing(0.2 * seconds)
        row = results.make_row(
            case, "rsl_rl", ["ppo_loss_and_grad"], timings, moved=moved, floor=floor, skipped={"skrl": "?"}
        )
        results.add(made, "loss", [row], 8.0)
    for size in ("cartpole", "anymal_flat"):
        parts = {"act": 0.02, "process_env_step": 0.002, "compute_returns": 0.001, "update": 0.2, "iteration": 0.223}
        for part, seconds in parts.items():
            timings = {"rsl_rl": timing(seconds), "FusedPPO": timing(0.6 * seconds)}
            row = results.make_row({"size": size, "part": part}, "rsl_rl", ["FusedPPO"], timings)
            results.add(made, "update", [row], 8.0)
        for line in (*ops.LINES, "between operations", "iteration"):
            timings = {"rsl_rl": timing(0.03), "FusedPPO": timing(0.02)}
            floor = None if line == "between operations" else timing(0.01)
            counts = {} if floor is None else dict.fromkeys(timings, Work(1000, 20, 5_000_000))
            case = {"size": size, "line": line}
            row = results.make_row(case, "rsl_rl", ["FusedPPO"], timings, counts=counts, floor=floor)
            results.add(made, "profile", [row], 8.0)
    timings = {"rsl_rl": timing(5e-3), "ppo_loss_and_grad": timing(3e-4)}
    row = results.make_row({"N": 24_576, "A": 12}, "rsl_rl", ["ppo_loss_and_grad"], timings)
    row["contenders"]["rsl_rl"]["operations"] = [["log", 2e-3], ["sum", 1e-3], ["where", 2e-3]]
    row["contenders"]["ppo_loss_and_grad"]["operations"] = [["ppo_loss", 3e-4]]
    results.add(made, "timeline", [row], 8.0)
    return made
