"""What the tests have to know of the backends that this machine has."""

from __future__ import annotations

import cuda_on_cpu
import torch

from pyfast_ppo import backends

if not torch.cuda.is_available():
    cuda_on_cpu.install()

AVAILABLE = [row for row in backends.status() if row.available]
KERNELS = [row.name for row in AVAILABLE if row.name != "eager"]
NATIVE = [row.name for row in AVAILABLE if not row.detail.endswith("for tests")]


def rows_that_it_can(backend: str, num_rows: int, num_actions: int) -> int:
    """Triton's interpreter takes some 20 ms for a tile: fewer rows for it, of several tiles still."""
    return num_rows if backend in NATIVE else min(num_rows, max(1, 6000 // num_actions))
