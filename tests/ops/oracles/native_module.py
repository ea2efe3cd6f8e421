"""C++ of this checkout as a Python module for tests, compiled anew only if a source changed."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[3]
# pybind11's headers: torch brings them
SYSTEM_INCLUDES = [Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


def load(name: str, sources: Sequence[Path], depends: Sequence[Path], includes: Sequence[Path]) -> ModuleType:
    """The module ``name`` made of ``sources``, which include the files ``depends``, or files of these folders."""
    spec = importlib.util.spec_from_file_location(name, build(name, sources, depends, includes))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str, sources: Sequence[Path], depends: Sequence[Path], includes: Sequence[Path]) -> Path:
    suffixes = (".cu", ".cuh", ".cpp", ".h")
    files = [p for path in depends for p in [path, *sorted(path.rglob("*"))] if p.suffix in suffixes]
    flags = [*FLAGS, *(f"-I{p}" for p in includes), *(f"-isystem{p}" for p in SYSTEM_INCLUDES)]
    contents = hashlib.sha256(b"".join(p.read_bytes() for p in files) + repr((sys.version, flags, COMPILER)).encode())
    folder = ROOT / "build" / name / contents.hexdigest()[:16]
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several processes may run tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile_all(sources, flags, target)
    return target


def _compile_all(sources: Sequence[Path], flags: list[str], target: Path) -> None:
    objects = [target.parent / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s, o: _run([*COMPILER, *flags, "-x", "c++", "-c", s, "-o", o]), sources, objects))
    unfinished = target.with_suffix(f".{os.getpid()}")
    _run([*COMPILER, "-shared", *objects, "-o", unfinished])
    unfinished.replace(target)


def _run(command: list[object]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")
