"""Versions of other libraries, as far as something here depends on them."""

from __future__ import annotations

import re


def release(version: str) -> tuple[int, int]:
    """Major and minor number: (5, 5) of "5.5.1" as of "5.5rc1"; what follows may be anything.

    Raises:
        ValueError: It begins with no number.
    """
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        raise ValueError(f"{version!r} is no version")
    return int(numbers[1]), int(numbers[2] or 0)
