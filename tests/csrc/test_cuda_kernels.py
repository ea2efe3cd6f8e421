"""The CUDA kernels on the CPU (tests/csrc/emulation): addresses, barriers, and whether a fault would be noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "kernel_driver.cpp"]
EMULATED = ["-DPYFAST_PPO_EMULATED_CUDA", f"-I{HERE / 'emulation'}", "-Wno-unknown-pragmas"]
# It orders a block's writes before those of the blocks that come after it; in the emulation they come after it anyway.
BETWEEN_BLOCKS = "// after what every thread of this block has written"
BARRIERS = sorted(
    f"{path.name}:{number}"
    for path in (CSRC / "cuda").glob("*.cu*")
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\b__syncthreads\(\);", line) and BETWEEN_BLOCKS not in line
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers and fibers are Linux's")


def run(program: Path, *args: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([program, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checked(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *EMULATED]
    return build(tmp_path_factory.mktemp("checked") / "kernel_driver", SOURCES, flags)


@pytest.fixture(scope="module")
def plain(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain") / "kernel_driver", SOURCES, ["-O1", *EMULATED])


def test_no_access_outside_of_the_buffers(checked: Path) -> None:
    """Inputs and scratch memory end at the last element that may be touched; every output is written."""
    done = run(checked, "random", 1, 40, 2)
    assert done.returncode == 0, done.stderr


def test_each_buffer_that_is_too_short_is_caught(checked: Path) -> None:
    """The test above can fail."""
    names = [line.split() for line in run(checked, "names").stdout.splitlines()]
    kernels = {"adam", "rate", "elu", "relu", "tanh", "ppo_loss", "gae", "log_prob", "kl_loss", "entropy", "kl"}
    assert {kernel for kernel, _ in names} == kernels
    assert len(names) >= 74
    for kernel, buffer in names:
        done = run(checked, "short", kernel, buffer)
        assert done.returncode != 0, f"{kernel} does not touch the last element of {buffer}"
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, f"{kernel}, {buffer}:\n{done.stderr}"


CASES = ("random", 5, 25, 2)
FEW_CASES = ("random", 5, 4, 2)  # without the rarer sizes, as rows that no tile holds


@pytest.fixture(scope="module")
def results(plain: Path) -> dict[tuple, str]:
    """What the kernels write, by cases."""
    runs = {cases: run(plain, *cases) for cases in (FEW_CASES, CASES)}
    for done in runs.values():
        assert done.returncode == 0, done.stderr
    return {cases: done.stdout for cases, done in runs.items()}


@pytest.mark.parametrize("seed", range(2, 6))
def test_the_order_of_threads_and_blocks_does_not_matter(plain: Path, results: dict[tuple, str], seed: int) -> None:
    """The same bits, whichever thread of a block and whichever block of a grid comes first."""
    assert run(plain, *CASES, PYFAST_PPO_EMULATION_SEED=str(seed)).stdout == results[CASES]


def test_all_barriers_are_known() -> None:
    assert len(BARRIERS) >= 18


@pytest.mark.parametrize("barrier", BARRIERS)
def test_each_barrier_is_needed(plain: Path, results: dict[tuple, str], barrier: str) -> None:
    """Without it the results change in one order of threads at least: the test above would find that it is missing."""
    for cases, seed in [(FEW_CASES, 1), *((CASES, seed) for seed in range(1, 6))]:
        environment = {"PYFAST_PPO_EMULATION_WITHOUT_BARRIER": barrier, "PYFAST_PPO_EMULATION_SEED": str(seed)}
        if run(plain, *cases, **environment).stdout != results[cases]:
            return
    pytest.fail(f"nothing changes without the barrier of {barrier}")


def run_backend(script: str, **environment: str) -> None:
    """A Python program in which the emulation is the ``cuda`` backend."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ops" / "oracles")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", f"import cuda_on_cpu; cuda_on_cpu.install()\n{script}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


LOSSES = """
import pyfast_ppo
from pyfast_ppo.bench.stock import COEFFICIENTS, make_mini_batch
from torch.testing import assert_close

for num_rows, num_actions in [(10_300, 12), (830, 150), (430, 300), (1_700, 300), (250, 400), (90, 1600)]:
    batch = make_mini_batch(num_rows, num_actions, num_rows % 4 == 0, 0, "cpu")
    exact = [t.detach().double() for t in batch]
    options = {**COEFFICIENTS, "num_original": num_rows - 7}
    ours, grads = pyfast_ppo.ppo_loss_and_grad(*batch, **options, backend="cuda")
    expected, expected_grads = pyfast_ppo.ppo_loss_and_grad(*exact, **options, backend="eager")
    assert_close(ours._metrics.double(), expected._metrics, rtol=1e-4, atol=1e-6)
    for grad, wanted in zip(grads, expected_grads):
        assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("processors", [3, 40, 200])
def test_sums_of_many_blocks(processors: int) -> None:
    """Of up to 6, 80 and 340 blocks, which are more than the last one reads in a round; of few sums and of many."""
    run_backend(LOSSES, PYFAST_PPO_EMULATION_PROCESSORS=str(processors))


NORMALIZED = """
import torch
import pyfast_ppo

torch.manual_seed(0)
CASES = [(0.0, 1.0, 1e-6), (1e4, 1.0, 6e-4), (-1e4, 0.1, 6e-3), (0.1, 0.0, 0.0), (1e4 / 3, 0.0, 0.0)]
for shape in [(1, 3), (5, 70), (24, 300), (37, 129)]:
    for mean, spread, error in CASES:
        x = (mean + spread * torch.randn(shape, dtype=torch.float64)).float()
        ends, zero = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
        advantages, _ = pyfast_ppo.gae(x, zero, ends, zero[0], 0.9, 0.9, normalize=True, backend="cuda")
        exact = (x.double() - x.double().mean()) / (x.double().std() + 1e-8) if spread else torch.zeros(shape)
        assert (advantages - exact).abs().max() <= error * exact.abs().max().clamp(min=1.0), (shape, mean, spread)
"""


def test_normalized_advantages_far_from_zero() -> None:
    """As exact as the mean's rounding lets them be; what is constant becomes 0."""
    run_backend(NORMALIZED)
