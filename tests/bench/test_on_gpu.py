"""bench/on_gpu.sh with stand-ins for Python and compute-sanitizer: its steps, and what it says of those that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "on_gpu.sh"
PYTHON = """\
#!/bin/sh
case "$*" in
  *"unavailable_reason"*) case "$FAILING" in *kernels*) echo "no driver" >&2; exit 1 ;; *) exit 0 ;; esac ;;
  *get_device_name*) echo nvidia-test; exit 0 ;;
  *"import xdist"*) exit 1 ;;
esac
echo "$*" | tee -a "$CALLS"
case "$*" in *"$FAILING"*) exit 3 ;; esac
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess, list[str]]]:
    """What the script printed, and the commands that it ran."""
    (tmp_path / "bench").mkdir()
    shutil.copy(SCRIPT, tmp_path / "bench")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("python3", "compute-sanitizer"):
        (stubs / name).write_text(PYTHON)
        (stubs / name).chmod(0o755)

    def run(*args: str, failing: str = "nothing fails", **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{stubs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(tmp_path / "bench" / "on_gpu.sh"), *args],
            env={"PATH": path, "CALLS": str(calls), "FAILING": failing, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, calls.read_text().splitlines()

    return run


def test_every_step(run: Callable, tmp_path: Path) -> None:
    done, calls = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls[0].startswith("-m pip install")
    assert [call.split()[0] for call in calls if call.startswith("bench/")] == [
        *("bench/kernels_once.py", "bench/bench_loss.py", "bench/bench_gae.py", "bench/bench_launch.py"),
        *("bench/bench_kl.py", "bench/bench_timeline.py", "bench/bench_update.py", "bench/bench_profile.py"),
    ]
    assert [call.split()[1] for call in calls if call.startswith("--tool")] == ["memcheck", "racecheck", "initcheck"]
    assert (tmp_path / "bench" / "results" / "nvidia-test" / "loss.log").read_text().startswith("bench/bench_loss.py")
    for call in calls:
        for word in call.split():  # what it runs is there
            if word.startswith(("bench/", "tests/")):
                assert (SCRIPT.parents[1] / word.split("::")[0]).exists(), word


def test_some_steps(run: Callable) -> None:
    _, calls = run("h200", STEPS="kl build")
    assert len(calls) == 2
    assert calls[0].startswith("-m pip install")
    assert calls[1].startswith("bench/bench_kl.py")
    assert calls[1].endswith("--save h200")


def test_nothing_is_measured_without_the_kernels(run: Callable) -> None:
    done, calls = run(STEPS="loss", failing="the kernels")
    assert done.returncode == 1
    assert calls == []
    assert done.stdout.rstrip().endswith("does STEPS have build?")
    assert "no driver" in done.stderr


def test_goes_on_where_a_step_fails(run: Callable) -> None:
    done, calls = run(failing="bench_gae")
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("failed: gae (exit 3)")
    assert calls[-1].startswith("bench/bench_profile.py")
