"""Where there is no GPU, the CUDA kernels are compiled for the CPU (tests/csrc/emulation), through the same tests."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from pyfast_ppo.backends import cuda

ROOT = Path(__file__).parents[3]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "csrc"
SOURCES = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "cuda" / "bindings.cpp", TESTS / "emulated_module.cpp"]
INCLUDES = [CSRC, TESTS / "emulation"]
# pybind11's headers: torch brings them
SYSTEM_INCLUDES = [Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


ORIGINAL = {"unavailable_reason": cuda.unavailable_reason}


def install() -> ModuleType:
    """Makes the emulated kernels the ``cuda`` backend, for CPU tensors. Returns them."""
    cuda._cuda = load()
    cuda.DEVICE_TYPE = "cpu"
    cuda.FOR_TESTS_ONLY = True
    cuda.unavailable_reason = lambda: None
    cuda.detail = lambda: "emulated on the CPU, for tests"
    return cuda._cuda


def load() -> ModuleType:
    path = build()
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> Path:
    """The module, compiled anew only if a source changed."""
    suffixes = (".cu", ".cuh", ".cpp", ".h")
    files = [p for folder in (CSRC, TESTS) for p in sorted(folder.rglob("*")) if p.suffix in suffixes]
    contents = hashlib.sha256(b"".join(p.read_bytes() for p in files) + repr((sys.version, FLAGS, COMPILER)).encode())
    folder = ROOT / "build" / "cuda_on_cpu" / contents.hexdigest()[:16]
    target = folder / f"cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several processes may run tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_all(folder, target)
    return target


def compile_all(folder: Path, target: Path) -> None:
    objects = [folder / f"{source.name}.o" for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    unfinished = target.with_suffix(f".{os.getpid()}")
    run([*COMPILER, "-shared", *objects, "-o", unfinished])
    unfinished.replace(target)


def compile_one(source: Path, target: Path) -> None:
    includes = [*(f"-I{p}" for p in INCLUDES), *(f"-isystem{p}" for p in SYSTEM_INCLUDES)]
    run([*COMPILER, *FLAGS, *includes, "-x", "c++", "-c", source, "-o", target])


def run(command: list[object]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")
