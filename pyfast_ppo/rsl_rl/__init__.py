"""The drop-in for rsl_rl: ``class_name = "pyfast_ppo.rsl_rl:FusedPPO"`` in the algorithm section of a runner config."""

from pyfast_ppo.versions import fault_of_rsl_rl, installed

# other versions lack modules, or have them and mean something else: to be told before either shows
if fault := fault_of_rsl_rl(installed("rsl-rl-lib")):
    raise ImportError(fault)

from pyfast_ppo.rsl_rl.fused_ppo import FusedPPO
from pyfast_ppo.rsl_rl.nonfinite import NonFiniteError

__all__ = ["FusedPPO", "NonFiniteError"]
