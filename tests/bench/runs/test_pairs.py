"""Runs in pairs: resumed, compared only if alike, and explained where they fail. The runs are of a stand-in."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from runs import pairs
from runs.comparison import ARMS
from runs.pairs import Pair, RunError, gather, load, result_path, run_pairs
from runs.training import Spec

STAND_IN = """
import json, pathlib, sys, time
spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
with open(pathlib.Path(sys.argv[1]).with_name("started"), "a") as file:
    file.write(f"{spec['arm']} {spec['seed']} {sys.argv[3]}\\n")
if spec["seed"] == 13:
    sys.exit("the simulator has exploded")
if spec["seed"] == 14:
    time.sleep(60)
record = {"episodes": [1], "mean_return": [1.0]}
config = {"seed": spec["seed"], "algorithm": {"class_name": spec["arm"]}}
result = {"spec": spec, "record": record, "config": config, "made_with": {"torch": "2"}}
pathlib.Path(sys.argv[2]).write_text(json.dumps(result))
"""

FAILS, SLEEPS = 13, 14  # seeds


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(pairs, "_PROGRAM", program)
    monkeypatch.setattr(pairs, "_POLL", 0.01)


def pair(seed: int) -> Pair:
    return Pair(Spec("Task", "stock", seed, 4, 1), sys.executable)


def started(work: Path) -> list[str]:
    return (work / "started").read_text().splitlines()


def test_arms_change_cores_from_seed_to_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_core_pairs", lambda: [(4, 5)])
    run_pairs([pair(1), pair(2)], tmp_path)
    assert sorted(started(tmp_path)) == ["fused 1 5", "fused 2 4", "stock 1 4", "stock 2 5"]


def test_what_is_there_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_pairs([pair(1), pair(2)], tmp_path)
    run_pairs([pair(1), pair(2), pair(3)], tmp_path)
    assert len(started(tmp_path)) == 6
    assert "2 of 3 pairs" in capsys.readouterr().out


def test_a_pair_is_run_again_as_a_whole(tmp_path: Path) -> None:
    run_pairs([pair(1)], tmp_path)
    result_path(tmp_path, pair(1).of_arm("fused")).unlink()
    run_pairs([pair(1)], tmp_path)
    assert len(started(tmp_path)) == 4


def test_a_result_of_another_budget_or_a_damaged_one_does_not_count(tmp_path: Path) -> None:
    run_pairs([pair(1)], tmp_path)
    assert load(tmp_path, pair(1).spec) is not None
    assert load(tmp_path, Spec("Task", "stock", 1, 4, 2)) is None
    result_path(tmp_path, pair(1).spec).write_text('{"spec":')
    assert load(tmp_path, pair(1).spec) is None


def test_a_run_that_fails_is_told_with_its_words_and_keeps_the_others(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the simulator has exploded"):
        run_pairs([pair(1), pair(FAILS)], tmp_path)
    assert load(tmp_path, pair(1).spec) is not None


def test_runs_of_other_versions_or_configs_are_not_compared(tmp_path: Path) -> None:
    two = [pair(1), pair(2)]
    run_pairs(two, tmp_path)
    runs = gather(two, tmp_path)
    assert {arm: [run["spec"]["seed"] for run in runs[arm]] for arm in ARMS} == {"stock": [1, 2], "fused": [1, 2]}
    path = result_path(tmp_path, pair(2).of_arm("fused"))
    good = json.loads(path.read_text())
    for change in ({"made_with": {"torch": "1"}}, {"config": {"seed": 2, "algorithm": {"gamma": 1.0}}}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(RunError, match=path.name):
            gather(two, tmp_path)


def test_an_interpreter_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="/no/python cannot be started: No such file"):
        run_pairs([Pair(pair(1).spec, "/no/python")], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_in_progress_are_ended_with_the_program(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if number == signal.SIGINT:  # a shell that runs the tests in the background has it ignored
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    started_pairs = []

    def ended(running: pairs._RunningPair) -> bool:
        started_pairs.append(running)
        os.kill(os.getpid(), number)
        return False

    monkeypatch.setattr(pairs._RunningPair, "has_ended", ended)
    assert pairs.exit_status(lambda: run_pairs([pair(SLEEPS)], tmp_path)) == 130
    assert {process.returncode for process in started_pairs[0]._processes.values()} == {-signal.SIGKILL}
