"""The tests that need a GPU, without one, on an imitated CUDA runtime: all of the host's part is torch's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import libraries
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("imitated_gpu", "ops/oracles")  # of what plugin.py imports
# Which of a file's tests, and how many those are at least. Kernels of compiled models do nothing here.
TESTS = {
    "tests/rsl_rl/test_no_host_sync.py": ("test", 7),
    "tests/rsl_rl/test_captured.py": ("on_a_gpu and not compiled", 29),
    "tests/rsl_rl/test_parity.py": ("on_a_gpu and (plain or rnd or adamw or rmsprop)", 4),
    "tests/rsl_rl/launches.py": ("test", 3),
}

pytestmark = pytest.mark.skipif(libraries.why_not() is not None, reason=libraries.why_not() or "")


@pytest.mark.parametrize("path", TESTS)
def test_on_an_imitated_gpu(path: str) -> None:
    choice, least = TESTS[path]
    built = libraries.build()
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, built)),
        "LD_LIBRARY_PATH": str(built[0].parent),
        "PYTHONPATH": os.pathsep.join(str(ROOT / "tests" / folder) for folder in ("imitated_gpu", "ops/oracles")),
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-qs", "-p", "plugin", "-p", "no:xdist", "-k", choice, path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least
