"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, on random arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [*sorted((CSRC / "cpu").glob("*.cpp")), HERE / "kernel_driver.cpp"]

ISAS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}
AVAILABLE_ISAS = ISAS.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers and their words are Linux's")


def run(program: Path, *args: object, isa: str = "avx512") -> subprocess.CompletedProcess:
    env = {**os.environ, "PYFAST_PPO_ISA": isa}
    return subprocess.run([program, *map(str, args)], env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def checked_addresses(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """-O0: what a kernel accesses does not depend on it, and it compiles in a fifth of the time."""
    flags = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return build(tmp_path_factory.mktemp("addresses") / "kernel_driver", SOURCES, flags)


@pytest.fixture(scope="session")
def checked_threads(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("threads") / "kernel_driver", SOURCES, ["-O0", "-g1", "-fsanitize=thread"])


@on_linux
@pytest.mark.parametrize("isa", AVAILABLE_ISAS)
def test_no_access_outside_of_the_buffers(checked_addresses: Path, isa: str) -> None:
    """Buffers end at the last element that the strides reach; every element of every output is written."""
    done = run(checked_addresses, "random", 1, 150, 4, isa=isa)
    assert done.returncode == 0, done.stderr


@on_linux
def test_each_buffer_that_is_too_short_is_caught(checked_addresses: Path) -> None:
    """The test above can fail: with one element less in any buffer, input or output, the sanitizer stops the kernel."""
    names = [line.split() for line in run(checked_addresses, "names").stdout.splitlines()]
    kernels = {"adam", "rate", "elu", "relu", "tanh", "ppo_loss", "gae", "log_prob", "kl_loss", "entropy", "kl"}
    assert {kernel for kernel, _ in names} == kernels
    assert len(names) >= 74
    for kernel, buffer in names:
        done = run(checked_addresses, "short", kernel, buffer)
        assert done.returncode != 0, f"{kernel} does not touch the last element of {buffer}"
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, f"{kernel}, {buffer}:\n{done.stderr}"


@on_linux
def test_no_data_races(checked_threads: Path) -> None:
    """With std::thread, as in a process without torch's OpenMP, or after fork()."""
    done = run(checked_threads, "random", 1, 60, 5)
    assert done.returncode == 0, done.stderr


def test_bindings_compile_without_a_warning(compiler: Callable[..., None]) -> None:
    """As the kernels do above. The headers of pybind11 are torch's: those of the build are gone by now."""
    include = [Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    flags = [f"-isystem{folder}" for folder in include]
    compiler(
        "-fsyntax-only",
        '-DPYFAST_PPO_VERSION="test"',
        '-DPYFAST_PPO_SOURCES="test"',
        '-DPYFAST_PPO_CUDA_NOTE="test"',
        *flags,
        CSRC / "bindings.cpp",
    )
