"""Every folder of Python files is in the wheel: setuptools is told their names one by one. No stray file is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {path.parent.relative_to(ROOT) for path in (ROOT / "pyfast_ppo").rglob("*.py")}
    assert {".".join(folder.parts) for folder in there} == set(listed) - {"pyfast_ppo.triton_kernels"}


FILES_AT_THE_ROOT = {
    ".clang-format",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_notes_are_kept_at_the_root():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {name for name in tracked.splitlines() if "/" not in name} == FILES_AT_THE_ROOT
