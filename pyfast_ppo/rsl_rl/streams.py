"""Two networks at the same time on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn as nn


@contextmanager
def beside(module: nn.Module) -> Iterator[None]:
    """While a graph is recorded: what the module launches within may run beside all else that is launched within.

    Its forward passes go to a second stream, and autograd sends their backward passes there, too. They read what was
    launched before; what follows finds their results. Elsewhere nothing changes: it is the host that launches one
    kernel after the other, and two streams would only add to its work.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        yield
        return
    here = torch.cuda.current_stream()
    there = _second_stream(here.device)
    there.wait_stream(here)
    hooks = [
        module.register_forward_pre_hook(lambda *_: torch.cuda.set_stream(there)),
        module.register_forward_hook(lambda *_: torch.cuda.set_stream(here), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        here.wait_stream(there)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
