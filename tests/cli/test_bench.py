"""The command: progress, tables, files, what was measured before Ctrl-C, and wrong arguments."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pyfast_ppo.bench import gae, loss, results
from pyfast_ppo.bench.harness import Options
from pyfast_ppo.cli import bench as command
from pyfast_ppo.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """Two cases of the loss, one of the returns, and no compiler, which would take longer than all the rest."""

    def compile_nothing(function, **_):
        def call(*_, **__):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(loss, "cases", lambda device, quick: [loss.Case(64, 3), loss.Case(128, 3)])
    monkeypatch.setattr(gae, "cases", lambda device, quick: [gae.Case(4, 8)])


@pytest.fixture
def bench(run_command, small, tmp_path):
    def run(*flags):
        return run_command("bench", "--device", "cpu", "--quick", "--seconds", 1e-3, *flags)

    return run


def test_run_leaves_tables_json_and_picture(bench, tmp_path):
    out = tmp_path / "a" / "b"
    outcome = bench("--subjects", "loss", "gae", "--out", out)
    assert outcome.code == 0
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", command.RESULTS]
    document = results.load(out / command.RESULTS)
    assert {name: len(entry["rows"]) for name, entry in document["subjects"].items()} == {"loss": 2, "gae": 1}
    for text in (
        "[1/3 0:00] loss: N = 64, A = 3",
        "ppo_loss_and_grad",
        "10th to 90th",
        "launches",
        "peak MB",
        "torch  ",
    ):
        assert text in outcome.out
    assert document["method"] in outcome.out
    assert f"Written to {out}: results.json, loss.png" in outcome.out
    assert "torch.compile (RuntimeError: no compiler)" in outcome.out


def test_directory_is_named_after_machine_and_date(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench("--subjects", "gae").code == 0
    assert bench("--subjects", "gae").code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    document = results.load(tmp_path / names[0] / command.RESULTS)
    assert names[0].startswith("bench-") and names[0].endswith(document["date"])
    assert names[1] == f"{names[0]}-2"


@pytest.mark.parametrize(("after", "kept"), [(1, 1), (0, 0)])
def test_interrupt_keeps_what_was_measured(bench, tmp_path, monkeypatch, after, kept):
    measure, calls = loss.measure, []

    def interrupted(case, options: Options):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(case)
        return measure(case, options)

    monkeypatch.setattr(loss, "measure", interrupted)
    outcome = bench("--subjects", "loss", "gae", "--out", tmp_path / "out")
    assert outcome.code == 130
    assert "stopped" in outcome.out
    if kept:
        document = results.load(tmp_path / "out" / command.RESULTS)
        assert [len(entry["rows"]) for entry in document["subjects"].values()] == [kept]
        assert "ppo_loss_and_grad" in outcome.out.partition("stopped")[2]  # the table
    else:
        assert "Nothing was measured." in outcome.out
        assert not (tmp_path / "out").exists()


def test_a_case_that_fails_leaves_the_others(bench, tmp_path, monkeypatch):
    measure = loss.measure

    def failing(case, options: Options):
        if case.num_rows == 64:
            raise RuntimeError("out of memory\nand a lot more")
        return measure(case, options)

    monkeypatch.setattr(loss, "measure", failing)
    outcome = bench("--subjects", "loss", "gae", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "left out: RuntimeError: out of memory" in outcome.out and "a lot more" not in outcome.out
    document = results.load(tmp_path / "out" / command.RESULTS)
    assert {name: len(entry["rows"]) for name, entry in document["subjects"].items()} == {"loss": 1, "gae": 1}


def test_a_subject_that_cannot_be_loaded_leaves_the_others(bench, tmp_path, monkeypatch):
    load = importlib.import_module

    def failing(name: str):
        if name.endswith(".loss"):
            raise ImportError("cannot import name 'OnPolicyRunner'")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", failing)
    outcome = bench("--subjects", "loss", "gae", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "Without loss: cannot import name 'OnPolicyRunner'" in outcome.out
    assert list(results.load(tmp_path / "out" / command.RESULTS)["subjects"]) == ["gae"]


def test_without_matplotlib_it_says_how_to_get_it(bench, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    outcome = bench("--subjects", "loss", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert "pip install 'pyfast-ppo[gym]'" in outcome.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == [command.RESULTS]


def test_without_rsl_rl_the_rest_runs(bench, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rsl_rl" else find_spec(name))
    outcome = bench("--out", tmp_path / "out")
    assert outcome.code == 0
    assert "Without update: rsl_rl is not installed" in outcome.out
    assert list(results.load(tmp_path / "out" / command.RESULTS)["subjects"]) == ["loss", "gae"]
    outcome = bench("--subjects", "update", "--out", tmp_path / "other")
    assert outcome.code == 2
    assert "pip install rsl-rl-lib" in outcome.err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--subjects", "lose"], "invalid choice: 'lose'"),
        (["--sizes", "ant"], "invalid choice: 'ant'"),
        (["--seconds", "0"], "--seconds: must be a positive number, got '0'"),
        (["--seconds", "abc"], "--seconds: must be a positive number, got 'abc'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_flags(flags, text, capsys):
    with pytest.raises(SystemExit) as info:
        main(["bench", *flags])
    assert info.value.code == 2
    assert text in capsys.readouterr().err


def test_sizes_without_the_update(run_command):
    outcome = run_command("bench", "--subjects", "loss", "--sizes", "cartpole")
    assert outcome.code == 2
    assert "add one to --subjects" in outcome.err


def test_gpu_that_is_not_there(run_command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run_command("bench", "--device", "cuda")
    assert outcome.code == 2
    assert outcome.err.startswith("pyfast-ppo: --device cuda cannot be used") and "--device cpu" in outcome.err


def test_old_results_are_not_overwritten(bench, tmp_path):
    (tmp_path / command.RESULTS).write_text("before")
    outcome = bench("--out", tmp_path)
    assert outcome.code == 2
    assert "choose another --out" in outcome.err
    assert (tmp_path / command.RESULTS).read_text() == "before"
    (tmp_path / "file").touch()
    outcome = bench("--out", tmp_path / "file" / "out")
    assert outcome.code == 2
    assert "cannot make" in outcome.err


@pytest.mark.parametrize("name", ["loss", "timeline", "gae", "kl", "update", "profile", "launch"])
def test_scripts_have_their_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", "--help"])
    with pytest.raises(SystemExit) as info:
        runpy.run_path(str(ROOT / "bench" / f"bench_{name}.py"), run_name="__main__")
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert "--save" in out and ("--sizes" in out) == (name in ("update", "profile"))


def test_script_measures_and_keeps(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gae.py", "--device", "cpu", "--seconds", "0.001", "--save", "here"])
    document = command.script("gae", "What it is.", tmp_path)
    [path] = (tmp_path / "here").iterdir()
    assert results.load(path) == document
    assert f"written: {path}" in capsys.readouterr().out


def test_script_keeps_what_was_measured_before_it_was_stopped(small, tmp_path, monkeypatch, capsys):
    measure, calls = loss.measure, []

    def interrupted(case, options: Options):
        if calls:
            raise KeyboardInterrupt
        calls.append(case)
        return measure(case, options)

    monkeypatch.setattr(loss, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", ["bench_loss.py", "--device", "cpu", "--seconds", "0.001", "--save", "here"])
    with pytest.raises(SystemExit) as info:
        command.script("loss", "What it is.", tmp_path)
    assert info.value.code == 130
    [path] = (tmp_path / "here").iterdir()
    assert len(results.load(path)["subjects"]["loss"]["rows"]) == 1
    assert f"written: {path}" in capsys.readouterr().out
