"""Every folder of Python files is in the wheel: setuptools is told their names one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {path.parent.relative_to(ROOT) for path in (ROOT / "pyfast_ppo").rglob("*.py")}
    assert {".".join(folder.parts) for folder in there} == set(listed) - {"pyfast_ppo.triton_kernels"}
