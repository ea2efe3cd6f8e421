"""Whether torch has a GPU."""

from __future__ import annotations

import torch


def missing_reason() -> str | None:
    """Why there is none, or None."""
    if torch.cuda.is_available():
        return None
    return "torch finds no GPU" if torch.version.cuda else "this build of torch has no CUDA"
