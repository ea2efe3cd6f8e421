"""Every test of an operation runs once per backend that this machine has: a new backend joins without a new test."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from pyfast_ppo import backends

sys.path.append(str(Path(__file__).parent / "oracles"))

from backends_here import AVAILABLE


# session: hypothesis calls a test many times with one fixture
@pytest.fixture(scope="session", params=[row.name for row in AVAILABLE])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def device(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def float64_where_it_is_computed() -> Iterator[None]:
    """A test that draws float64 does without it on a backend that refuses it; test_backends.py tests the refusal."""
    find = backends._find

    @functools.wraps(find)
    def find_or_skip(*args: object) -> object:
        try:
            return find(*args)
        except TypeError as error:
            if hypothesis.currently_in_test_context():
                hypothesis.reject()
            pytest.skip(str(error))

    backends._find = find_or_skip
    yield
    backends._find = find


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
