"""Result files and figures, from made-up runs."""

from __future__ import annotations

import sys
from pathlib import Path

import learning
import pytest
import soak
from made_up_records import run
from matplotlib.image import imread
from runs import results
from runs.comparison import ARMS


def runs(iterations: int = 60) -> dict[str, list[dict]]:
    return {arm: [run(seed, arm, iterations) for seed in (1, 2, 3)] for arm in ARMS}


def learning_result() -> dict:
    return learning.learning_result({name: learning.task_result(runs()) for name in reversed(learning.TASKS)})


@pytest.mark.parametrize(
    ("program", "make"), [(learning, learning_result), (soak, lambda: soak.soak_result(runs(iterations=200)))]
)
def test_a_figure_is_drawn_from_the_file_alone(
    program, make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    result = make()
    program.print_report(result)
    assert "permutation" in capsys.readouterr().out
    results.keep(result, "some-machine", program.SUBJECT, tmp_path, program.draw)
    data, picture = results.results_path("some-machine", program.SUBJECT), results.figure_path(program.SUBJECT)
    first = imread(picture)
    picture.unlink()
    assert results.redraw("some-machine", program.SUBJECT, program.draw) == 0
    assert (imread(picture) == first).all()
    assert results.read("some-machine", program.SUBJECT).keys() == result.keys()
    assert max(map(len, data.read_text().splitlines())) < 4000
    assert results.redraw("no-such-machine", program.SUBJECT, program.draw) == 1


def test_both_arms_of_a_task_are_the_same_but_for_the_arm() -> None:
    for task in learning.TASKS:
        pair = learning.pairs_of(task, 2, "/isaac/python")[1]
        stock, fused = (pair.of_arm(arm) for arm in ARMS)
        assert (stock.task, stock.seed, stock.num_envs, stock.iterations) == (task, 2, fused.num_envs, fused.iterations)
        assert (pair.python == "/isaac/python") == task.startswith("Isaac-")


def test_tasks_that_were_not_asked_for_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(learning, "run_pairs", lambda pairs, work: None)
    monkeypatch.setattr(learning, "gather", lambda pairs, work: runs())
    for task in ("HalfCheetah-v5", "Hopper-v5"):
        monkeypatch.setattr(
            sys, "argv", ["learning.py", "--tasks", task, "--save", "some-machine", "--work", str(tmp_path)]
        )
        assert learning.main() == 0
    assert list(results.read("some-machine", "learning")["tasks"]) == ["Hopper-v5", "HalfCheetah-v5"]
