"""How torch multiplies float32 matrices on a GPU."""

from __future__ import annotations

import torch


def multiply_in_tf32() -> None:
    """Products and convolutions in TF32 from now on, as the training scripts of Isaac Lab and mjlab have it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def matmul_precision() -> tuple:
    """What torch was told of products, in whichever of its interfaces."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # told by the newer one, which the older cannot express
        precision = None
    return precision, getattr(torch.backends.cuda.matmul, "fp32_precision", None)
