"""The namespace of the operators that torch.compile sees: ``torch.ops.pyfast_ppo``."""

import torch

LIBRARY = torch.library.Library("pyfast_ppo", "DEF")
