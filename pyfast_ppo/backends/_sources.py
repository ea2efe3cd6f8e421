"""Tells builds of different sources apart. setup.py reads this file by itself: it imports nothing of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMPILED = (".cpp", ".cu", ".cuh", ".h", ".inl")


def fingerprint(csrc: Path) -> str:
    """Of the names and contents of all that is compiled in this folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in COMPILED):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
