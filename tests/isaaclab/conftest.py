"""The virtual environment with Isaac Lab, in which the scripts in ``runs/`` are run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def isaaclab() -> Any:
    """Isaac Lab 3.0 on the CPU; ``isaaclab.run("train.py", ...)`` returns what the script reports."""
    # by its path: with tests/ on sys.path the folder isaaclab in it would pass for a package of that name
    spec = importlib.util.spec_from_file_location("simulator_venv", HERE.parent / "simulator_venv.py")
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module.simulator_venv(HERE, python_versions=("3.11",))
