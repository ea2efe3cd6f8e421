from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "ops" / "oracles"))

import ptx


@pytest.fixture(scope="session")
def machine() -> ModuleType:
    return ptx.load_machine()
