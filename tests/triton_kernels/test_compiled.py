"""The machine code for GPUs that need not be there: nothing spilled, loads as wide as A allows, one kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

COMPILE = Path(__file__).parent / "compile_for.py"
CAPABILITIES = (80, 90, 100, 120)
# older compilers put a few registers aside, in some kernels
MOST_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 8


@pytest.fixture(scope="module", params=CAPABILITIES)
def kernels(request: pytest.FixtureRequest) -> dict[str, dict]:
    """By name. In a process of its own: this one's Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILE), str(request.param), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {row["kernel"]: row for row in json.loads(done.stdout)}


def test_machine_code(kernels: dict[str, dict], capsys: pytest.CaptureFixture) -> None:
    """Registers hold everything; where A is a multiple of 4, four neighbours are one load of 128 bits."""
    with capsys.disabled():
        print()
        for name, row in kernels.items():
            numbers = f"{row['registers']:>3} registers  {row['shared']:>5} bytes shared  {row['spills']} spills"
            print(f"  sm_{row['sm']:<3}  {name:<40}  {numbers}")
    assert len(kernels) >= 9
    for name, row in kernels.items():
        assert row["kernels"] == 1, name
        assert row["local"] == 0, name
        assert row["spills"] <= MOST_SPILLS, name
        if name in ("kl A=12", "log_prob A=12"):  # the interpreter, which divides exactly, would not notice
            assert row["rough_divisions"] == 0, name
        # rows of partial sums are 17 numbers at A = 1; of others, one is also loaded alone: the largest ratio
        if "ppo_loss" in name and name != "ppo_loss A=1":
            assert row["partials"]["128"] >= row["partials"]["32"], name
        if "ppo_loss A=12" in name or "ppo_loss A=32" in name or "ppo_loss A=256" in name:
            small = "bf16" in name or "fp16" in name
            # two loads a thread of actions, old_mean and (unless it is one row) old_std; the mean is the network's
            rollout = 3 if "old_std=[A]" not in name else 2
            assert row["loads"]["128"] >= 2 * (rollout if small else rollout + 1), name
            assert row["loads"]["64" if small else "128"] >= 2, name
            assert row["stores"]["64" if small else "128"] >= 2, name


def test_the_tool_notices_spills(tmp_path: Path) -> None:
    """A kernel that needs more registers than there are: facts() must say so, or the test above could not fail."""
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path.insert(0, {str(COMPILE.parent)!r})\n"
        "import json, compile_for\n"
        "function, constants, warps, types = compile_for.ppo_loss(29)\n"
        "constants['BLOCK_N'] = 64\n"
        "print(json.dumps(compile_for.facts(compile_for.compiled(function, constants, warps, types, 90))))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(child)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["spills"] > 0
    assert row["stack"] > 0
