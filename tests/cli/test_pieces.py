"""The small parts of the command line, each on its own."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest

from pyfast_ppo.cli.console import Console, ProgressTable, clock
from pyfast_ppo.cli.files import make_run_dir, set_aside_checkpoints
from pyfast_ppo.cli.history import History, Record
from pyfast_ppo.cli.report import draw_learning_curve, print_summary
from pyfast_ppo.cli.stop import StopRequest
from pyfast_ppo.cli.train_config import Settings
from pyfast_ppo.files import write_atomically


def record(iteration: int, reward: float | None = 1.0, wall_s: float | None = None) -> Record:
    return Record(
        iteration=iteration,
        env_steps=(iteration + 1) * 100,
        mean_reward=reward,
        mean_episode_length=10.0,
        kl=0.01,
        learning_rate=1e-3,
        collect_s=60.0,
        learn_s=1.0,
        wall_s=float(iteration) if wall_s is None else wall_s,
    )


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_in_one_second_have_two_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    first, second = make_run_dir(None, "space/Task:v0"), make_run_dir(None, "space/Task:v0")
    assert first != second and first.parent == second.parent == Path("logs/pyfast_ppo/space_Task_v0")


def test_history_survives_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "progress.csv"
    written = History(path, before=0)
    for iteration in range(3):
        written.append(record(iteration, reward=None if iteration == 0 else 0.1 * iteration))
    path.write_text(path.read_text()[:-20])
    read = History(path, before=10)
    assert read.records == written.records[:2]
    read.append(record(2))
    assert History(path, before=10).records == read.records


def test_progress_shows_at_most_a_line_a_second_and_always_the_last(capsys):
    table = ProgressTable(Console(), total=30)
    for iteration in range(30):
        table.row(record(iteration, wall_s=iteration / 10), steps_per_second=1.0, eta=0.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["iteration", "1/30", "11/30", "21/30", "30/30"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_characters_that_the_terminal_does_not_know_do_not_stop_the_run():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(stream).say("KL(old‖new) ± 0.1")
    assert stream.buffer.getvalue() == b"KL(old?new) ? 0.1\n"


def test_checkpoints_that_are_set_aside_twice_are_all_kept(tmp_path):
    for content in (b"first", b"second", b"third"):
        (tmp_path / "model_5.pt").write_bytes(content)
        set_aside_checkpoints(tmp_path, 5)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {"model_5.pt.old": b"first", "model_5.pt.old2": b"second", "model_5.pt.old3": b"third"}


def test_reader_that_goes_away_does_not_stop_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        console = Console(stream)
        console.say("nobody reads this")
        console.say("nor this")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_full_disk_of_the_terminal_does_not_stop_the_run():
    with open("/dev/full", "w") as stream:
        console = Console(stream)
        console.say("nobody can keep this")
        console.say("nor this")


@pytest.mark.parametrize(
    ("reward", "threshold", "text"),
    [
        (950.0, 950.0, "yes (threshold 950)"),
        (949.9, 950.0, "no (threshold 950)"),
        (None, 950.0, "no (threshold 950)"),
        (5.0, None, "the task names no threshold"),
    ],
)
def test_summary(capsys, reward, threshold, text):
    records = [record(0, reward=7.0), record(1, reward=reward)]
    print_summary(Console(), Settings(), records, threshold, {"checkpoint": Path("model_1.pt")})
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines()[1:-1] if line[0] != " ")
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["solved"] == text
    assert rows["iterations"] == f"2 of {Settings.iterations}" and rows["environment steps"] == "200"
    assert rows["best mean reward"] == f"{max(7.0, reward or 0):.1f}"
    assert rows["checkpoint"] == "model_1.pt"


@pytest.mark.parametrize("rewards", [[], [None], [None, 3.0]])
@pytest.mark.parametrize("threshold", [None, 950.0])
def test_picture_of_few_points(tmp_path, rewards, threshold):
    records = [record(iteration, reward) for iteration, reward in enumerate(rewards)]
    draw_learning_curve(tmp_path / "picture.png", Settings(), records, threshold)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_first_signal_asks_second_signal_stops():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
