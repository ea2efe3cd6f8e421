"""Every test of an operation runs once per backend that this machine has: a new backend joins without a new test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyfast_ppo import backends

sys.path.append(str(Path(__file__).parent / "oracles"))

AVAILABLE = [status.name for status in backends.status() if status.available]


@pytest.fixture(scope="session", params=AVAILABLE)  # session: hypothesis calls a test many times with one fixture
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def device(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
