"""Versions of other libraries, as far as something here depends on them."""

from __future__ import annotations

import importlib.metadata
import re

RSL_RL = "rsl-rl-lib>=5.4,<6"
"""As in pyproject.toml."""


def installed(package: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """Major and minor number: (5, 5) of "5.5.1" as of "5.5rc1"; what follows may be anything.

    Raises:
        ValueError: It begins with no number.
    """
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        raise ValueError(f"{version!r} is no version")
    return int(numbers[1]), int(numbers[2] or 0)


def fault_of_rsl_rl(version: str | None) -> str | None:
    """Why FusedPPO cannot stand on this version of rsl-rl-lib (None: none is installed), or None if it can."""
    if version is not None and (5, 4) <= release(version) < (6, 0):
        return None
    return f"FusedPPO needs rsl-rl-lib 5.4 or 5.5, found {version or 'none'}; pip install '{RSL_RL}'"
