"""Versions as they come: releases, candidates, builds from a checkout."""

from __future__ import annotations

import pytest

from pyfast_ppo.versions import release


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("5.5.1", (5, 5)), ("5.5rc1", (5, 5)), ("5.10.dev3", (5, 10)), ("3.6.0+git1234", (3, 6)), ("6", (6, 0))],
)
def test_major_and_minor_number(version: str, numbers: tuple[int, int]) -> None:
    assert release(version) == numbers


def test_what_is_no_version() -> None:
    with pytest.raises(ValueError, match="'main' is no version"):
        release("main")
