"""Compiling C++ of this checkout for a test."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{CSRC / 'cpu'}", f"-I{HERE}"]


def run_compiler(*arguments: object) -> None:
    """A warning is an error, and the compiler's words are the test's."""
    command = [*COMPILER, *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


@pytest.fixture(scope="session")
def compiler() -> Callable[..., None]:
    return run_compiler


@pytest.fixture(scope="session")
def build() -> Callable[..., Path]:
    """``build(target, sources, flags)`` compiles several sources at a time and links them."""

    def compile_and_link(target: Path, sources: list[Path], flags: list[str]) -> Path:
        objects = [target.parent / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda s, o: run_compiler(*flags, "-x", "c++", "-c", s, "-o", o), sources, objects))
        run_compiler(*flags, *objects, "-o", target, "-pthread", "-ldl")
        return target

    return compile_and_link
