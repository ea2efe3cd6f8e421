"""The drop-in for rsl_rl: ``class_name = "pyfast_ppo.rsl_rl:FusedPPO"`` in the algorithm section of a runner config."""

from pyfast_ppo.rsl_rl.fused_ppo import FusedPPO
from pyfast_ppo.rsl_rl.nonfinite import NonFiniteError

__all__ = ["FusedPPO", "NonFiniteError"]
