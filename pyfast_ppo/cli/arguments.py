"""Types of arguments, for argparse: each says what is wrong with a text."""

from __future__ import annotations

import argparse

_MOST = 10**9  # of anything; far more, and numbers overflow somewhere


def positive(text: str) -> int:
    """A number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}")
    return value


def positive_float(text: str) -> float:
    """A finite amount."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def seed(text: str) -> int:
    """What all random generators take."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError("must be between 0 and 2147483647")
    return value
