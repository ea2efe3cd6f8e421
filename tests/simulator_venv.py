"""Virtual environments with a simulator inside: tests run scripts in them as subprocesses.

A simulator pins its own torch and rsl_rl, and it is large. So its tests build an environment from pinned files, once,
and keep it in the folder that ``PYFAST_PPO_SIMULATORS`` names, or in the system's temporary folder. Where it cannot be
built, tests are skipped, with the reason as a warning; where ``CI`` is set they fail.

The package under test is the one that the running pytest imports, through a folder that holds a link to it alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

import pyfast_ppo

RESULT = "RESULT "
"""Begins the line of a script's output that holds its result, as JSON."""


class SimulatorVenv:
    """A built environment."""

    def __init__(self, folder: Path, scripts: Path) -> None:
        self.python = folder / "bin" / "python"
        self.scripts = scripts
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.environ = inherited | {
            "PYTHONPATH": str(_link_to_package(folder)),
            "WARP_CACHE_PATH": str(folder / "warp-cache"),  # compiled kernels: a minute the first time
            "OMP_NUM_THREADS": "1",
        }

    def run(self, script: str, *args: Any, timeout: float = 600.0) -> Any:
        """Run a script of the ``scripts`` folder and return what it printed after ``RESULT``, parsed.

        The test fails, with the end of the script's output, where it fails or prints no result.
        """
        command = [str(self.python), str(self.scripts / script), *map(str, args)]
        try:
            done = subprocess.run(
                command,
                env=self.environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            output = error.output or b""
            output = output if isinstance(output, str) else output.decode(errors="replace")
            pytest.fail(f"{script} took more than {timeout:.0f} s:\n{output[-4000:]}")
        results = [line[len(RESULT) :] for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if done.returncode != 0 or not results:
            pytest.fail(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stdout[-8000:]}")
        return json.loads(results[-1])


def simulator_venv(folder: Path, python_versions: Sequence[str]) -> SimulatorVenv:
    """The environment for the tests in ``folder``; built at first.

    Args:
        folder: Has ``requirements.txt``, the scripts in ``runs/``, and, if need be, ``requirements-no-deps.txt``: what
            is installed after it as it is, whatever versions it asks for.
        python_versions: Pythons that the simulator runs on ("3.11"), the best first.
    """
    files = [path for name in ("requirements.txt", "requirements-no-deps.txt") if (path := folder / name).exists()]
    python, version = _interpreter(folder.name, python_versions)
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]
    root = Path(os.environ.get("PYFAST_PPO_SIMULATORS") or Path(tempfile.gettempdir()) / "pyfast-ppo-simulators")
    venv = root / f"{folder.name}-py{version}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{venv.name}.lock"):
        if not (venv / "complete").exists():
            shutil.rmtree(venv, ignore_errors=True)
            _build(folder.name, venv, python, files)
            (venv / "complete").touch()
        return SimulatorVenv(venv, folder / "runs")


def _interpreter(name: str, versions: Sequence[str]) -> tuple[str, str]:
    """A Python that has one of the versions, and that version: the running one where it will do."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running in versions:
        return sys.executable, running
    for version in versions:
        found = shutil.which(f"python{version}")
        # a shim of pyenv is found for versions that are not installed; Debian's Python may lack ensurepip
        if found and subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return found, version
    _cannot_run(name, f"it runs on Python {' or '.join(versions)}, which this machine has not")


def _build(name: str, venv: Path, python: str, files: Sequence[Path]) -> None:
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip.append("--no-compile")  # bytecode is made of what a test imports, which is a small part
    _install(name, [python, "-m", "venv", str(venv)])
    for path in files:
        alone = ["--no-deps", "--ignore-requires-python"] if path.name == "requirements-no-deps.txt" else []
        _install(name, [*pip, *alone, "--requirement", str(path)])


def _install(name: str, command: list[str]) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        _cannot_run(name, f"`{' '.join(command)}` failed:\n{done.stdout[-4000:]}")


def _cannot_run(name: str, reason: str) -> NoReturn:
    message = f"{name} is NOT tested here: {reason}"
    if os.environ.get("CI"):
        pytest.fail(message)
    warnings.warn(message, stacklevel=2)  # pytest shows warnings without being asked, reasons of skips it does not
    pytest.skip(message)


def _link_to_package(venv: Path) -> Path:
    """A folder for PYTHONPATH with the package under test, and nothing that would shadow the environment's packages."""
    package = Path(pyfast_ppo.__file__).parent
    key = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    links = venv / f"package-under-test-{key}"
    links.mkdir(exist_ok=True)
    if not (links / "pyfast_ppo").is_symlink():
        (links / "pyfast_ppo").symlink_to(package, target_is_directory=True)
    return links


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process builds; the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
