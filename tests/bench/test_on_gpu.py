"""bench/on_gpu.sh with stand-ins for Python and compute-sanitizer: its steps, and what it says of those that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
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
env > "$CALLS.environment"
[ -z "$ARCHIVE" ] || cp "$ARCHIVE" "$CALLS.archive" 2>/dev/null  # as a kill in this step would leave it
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
        *("bench/bench_launch.py", "bench/kernels_once.py", "bench/bench_loss.py", "bench/bench_gae.py"),
        *("bench/bench_kl.py", "bench/bench_timeline.py", "bench/bench_update.py", "bench/bench_profile.py"),
    ]
    assert [call.split(" -k ")[1] for call in calls if " -k " in call] == ["cuda and not triton", "triton"]
    assert [call.split()[1] for call in calls if call.startswith("--tool")] == ["memcheck", "racecheck", "initcheck"]
    assert (tmp_path / "bench" / "results" / "nvidia-test" / "loss.log").read_text().startswith("bench/bench_loss.py")
    for call in calls:
        for word in call.split():  # what it runs is there
            if word.startswith(("bench/", "tests/")):
                assert (SCRIPT.parents[1] / word.split("::")[0]).exists(), word


def test_some_steps(run: Callable, tmp_path: Path) -> None:
    _, calls = run("h200", STEPS="kl build")
    assert len(calls) == 2
    assert calls[0].startswith("-m pip install")
    assert calls[1].startswith("bench/bench_kl.py")
    assert calls[1].endswith(f"--save {tmp_path}/bench/results/h200")


@pytest.mark.parametrize("steps", ["build kl", "wheels build kl"])
def test_wheels_are_installed_whatever_the_steps(run: Callable, tmp_path: Path, steps: str) -> None:
    (tmp_path / "some.whl").touch()
    _, calls = run(STEPS=steps, WHEELS=str(tmp_path))
    assert len(calls) == 3
    assert calls[0].endswith(f"--no-deps {tmp_path}/some.whl")
    assert calls[1].endswith("--no-deps .")
    assert calls[2].startswith("bench/bench_kl.py")


def test_the_callers_modules_stay(run: Callable, tmp_path: Path) -> None:
    for given, wanted in (("/its/modules", f"{tmp_path}:/its/modules"), ("", f"{tmp_path}")):
        run(STEPS="kl", PYTHONPATH=given)
        lines = (tmp_path / "calls.environment").read_text().splitlines()
        assert f"PYTHONPATH={wanted}" in lines
        assert "PYTHONUNBUFFERED=1" in lines


def test_results_where_they_are_wanted(run: Callable, tmp_path: Path) -> None:
    done, calls = run(STEPS="kl", RESULTS="to/take/home")
    folder = tmp_path / "to" / "take" / "home"
    assert calls[0].endswith(f"--save {folder}")
    assert (folder / "kl.log").exists() and str(folder) in done.stdout
    assert not (tmp_path / "bench" / "results").exists()


def test_what_was_measured_outlives_a_kill(run: Callable, tmp_path: Path) -> None:
    archive = tmp_path / "home.tgz"
    run(STEPS="loss gae kl", ARCHIVE=str(archive), failing="bench_gae")
    for path, names in ((tmp_path / "calls.archive", {"loss", "gae"}), (archive, {"loss", "gae", "kl"})):
        with tarfile.open(path) as found:
            assert {Path(name).stem for name in found.getnames() if name.endswith(".log")} == names
    assert not Path(f"{archive}.new").exists()


def test_a_budget(run: Callable, tmp_path: Path) -> None:
    """Steps get what is left of it, without the time between an interrupt and the kill; then they are left out."""
    timeout = tmp_path / "stubs" / "timeout"
    timeout.write_text('#!/bin/sh\necho "$5" >> "$CALLS.limits"\nshift 5\nexec "$@"\n')
    timeout.chmod(0o755)
    done, calls = run(STEPS="doctor loss update", BUDGET="300")
    assert done.returncode == 0 and len(calls) == 3
    doctor, *others = map(int, (tmp_path / "calls.limits").read_text().split())
    assert doctor == 60
    assert all(200 < limit <= 275 for limit in others)
    done, calls = run(STEPS="doctor loss update", BUDGET="40")
    assert done.returncode == 1 and calls == []
    assert done.stdout.rstrip().endswith("failed: update (left out: no time left)")


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
