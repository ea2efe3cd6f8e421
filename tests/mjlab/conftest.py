"""mjlab in a virtual environment of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def mjlab() -> Any:
    """The environment (``SimulatorVenv``), built when first asked for."""
    # by its path: with the folder of tests on sys.path, "mjlab" would be this folder
    spec = importlib.util.spec_from_file_location("simulator_venv", HERE.parent / "simulator_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.simulator_venv(HERE, ["3.11", "3.12", "3.13"])
