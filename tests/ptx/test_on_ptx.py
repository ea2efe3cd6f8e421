"""What compilers made of the GPU kernels, run on the CPU: results, races, bounds, and how memory is accessed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "on_ptx.py"
UNKNOWN = re.compile(r"unknown instruction \S+")
LARGEST_ERROR = 5e-5  # of 256 actions, whose log-probability is a sum of some hundreds
# Of the bytes in the sectors that a warp's instruction touches: how many it wants. Triton gives a row to a warp where A
# is no multiple of 4, and then loads each row's five numbers by themselves. Its last program reads the coefficients
# again, one in a sector, which shows where there is hardly more to load.
LEAST_LOADED = {
    "cuda": {"aligned": 0.75, "others": 0.9},
    "triton": {"loss A=1": 0.84, "aligned": 0.85, "others": 0.55},
}
# The few sums that a block of CUDA's loss leaves lie beside those of other blocks, each in a sector of its own.
LEAST_STORED = {"cuda": {"aligned": 0.93, "others": 0.83}, "triton": {"aligned": 0.9, "others": 0.65}}


@pytest.fixture(scope="module", params=["triton sm_90", "triton sm_100", "cuda sm_90"])
def compiler(request: pytest.FixtureRequest) -> list[str]:
    """Blackwell has instructions of its own, which Triton uses."""
    backend, architecture = request.param.split(" sm_")
    if backend == "triton":
        pytest.importorskip("triton")
    elif shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    return [backend, architecture]


@pytest.fixture(scope="module")
def backend(compiler: list[str]) -> str:
    return compiler[0]


@pytest.fixture(scope="module")
def found(compiler: list[str]) -> dict:
    backend, architecture = compiler
    command = [sys.executable, SCRIPT, backend, "--capability", architecture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    if (match := UNKNOWN.search(done.stderr)) and "CI" not in os.environ:  # of another compiler than ours
        pytest.skip(f"machine.cpp does not know what this compiler writes: {match[0]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_results(found: dict, backend: str, capsys: pytest.CaptureFixture) -> None:
    """As float64 has them, in any order of warps and blocks, with no race and nothing read or written elsewhere."""
    with capsys.disabled():
        print()
        for name, case in found["cases"].items():
            traffic = f"{case['load_efficiency']:4.0%} {case['store_efficiency']:4.0%} of what is loaded and stored"
            print(f"  {backend:<6}  {name:<46}  {case['instructions']:>7,} instructions of warps  {traffic}")
    assert len(found["cases"]) >= 30
    for name, case in found["cases"].items():
        assert case["error"] < LARGEST_ERROR, name
        assert case["same"], name


def test_launches(found: dict) -> None:
    for name, case in found["cases"].items():
        if name == "learning rate":
            assert set(case["kernels"]) == {"adapt_rate_kernel"}
            continue
        kernels = {"loss": 1, "gae": 1 if "not normalized" in name else 2, "hidden": 3, "gaussian": 6}
        assert len(case["kernels"]) == kernels.get(name.split()[0], 2), name


def test_coalesced(found: dict, backend: str) -> None:
    """Whatever A is, a warp's loads and stores want most of what they touch."""
    for name, case in found["cases"].items():
        if not name.startswith("loss A=") or "A=256" in name:
            continue
        kind = "aligned" if re.search(r"A=(1|2|4|12)\b", name) else "others"
        least_loaded = LEAST_LOADED[backend]
        assert case["load_efficiency"] >= least_loaded.get(name, least_loaded[kind]), name
        assert case["store_efficiency"] >= LEAST_STORED[backend][kind], name
    assert found["cases"]["gae T=24"]["load_efficiency"] > 0.98
    assert found["cases"]["gae T=24"]["store_efficiency"] > 0.98
    for name in ("hidden layer N=1300 H=128", "hidden layer N=333 H=32") if backend == "cuda" else ():
        assert found["cases"][name]["load_efficiency"] > 0.98, name
        assert found["cases"][name]["store_efficiency"] > 0.98, name


def test_next_tiles_are_asked_for(found: dict, backend: str) -> None:
    """CUDA's blocks, four at a time here, ask for what further tiles read, but odd bytes at the ends."""
    wanted = {
        "loss A=12": 0,  # 333 rows are three tiles of 128
        "loss A=19": (333 - 4 * 80) * 4 * (4 * 19 + 5),  # four matrices and five numbers a row
        "loss A=29": (333 - 4 * 52) * 4 * (4 * 29 + 5),
        "loss A=19 std [A], old std [A]": (333 - 4 * 80) * 4 * (3 * 19 + 5),
        "loss A=19 std [N, A], new_old": (333 - 4 * 80) * 4 * (3 * 19 + 5),  # 111 rows have an old policy
        "loss A=29 torch.bfloat16": (333 - 4 * 52) * (3 * 4 * 29 + 2 * 29 + 4 * 4 + 2),
    }
    for name, num_bytes in wanted.items() if backend == "cuda" else ():
        asked = found["cases"][name]["prefetched_bytes"]
        assert num_bytes - 16 * 10 * 3 < asked < num_bytes + 16 * 10 * 3 and (asked > 0) == (num_bytes > 0), name


def test_missing_barriers_show(found: dict, backend: str) -> None:
    """Each of them does, but where Triton puts two in a row."""
    said = found["without_barriers"]
    if backend == "cuda":
        assert [len(of_kernel) for of_kernel in said.values()] == [9, 3, 2, 4, 4]
        assert all("nothing" not in of_kernel for of_kernel in said.values())
    else:
        assert sum(s == "nothing" for s in said["loss"]) <= 2 < len(said["loss"])
        assert sum(s == "nothing" for s in said["gae"]) <= len(said["gae"]) / 3
        assert "nothing" not in said["normalize"]


def test_one_compilation_for_all_sizes(found: dict, backend: str) -> None:
    if backend == "triton":
        assert found["compilations"] == {"loss": 1, "gae": 1}
