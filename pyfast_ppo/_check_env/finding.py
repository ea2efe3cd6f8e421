"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something about an environment or its config that harms training."""

    name: str
    """Which check has found it, a row of docs/check_env.md."""
    reason: str
    """What was seen, and what comes of it."""
    mend: str
    """What to do."""
    is_note: bool = False
    """Whether training goes on well enough without the mend."""

    def __str__(self) -> str:
        """One line."""
        text = f"{'note: ' if self.is_note else ''}{self.name}: {self.reason} Mend: {self.mend}"
        return " ".join(text.split())
