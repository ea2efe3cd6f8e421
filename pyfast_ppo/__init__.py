"""Fused PPO for rsl_rl and Isaac Lab: the loss, its metrics and all gradients in one pass.

``ppo_loss`` is the operation, ``pyfast_ppo.rsl_rl:FusedPPO`` the drop-in for a runner config, ``pyfast-ppo`` the
command line.
"""

from pyfast_ppo import kl, schedules
from pyfast_ppo._version import __version__
from pyfast_ppo.check_env import check_env
from pyfast_ppo.ops.gae import gae
from pyfast_ppo.ops.gaussian import gaussian_entropy, gaussian_kl, gaussian_log_prob
from pyfast_ppo.ops.ppo_loss import PPOLossOutput, ppo_loss, ppo_loss_and_grad, ppo_loss_reference

__all__ = [
    "PPOLossOutput",
    "__version__",
    "check_env",
    "gae",
    "gaussian_entropy",
    "gaussian_kl",
    "gaussian_log_prob",
    "kl",
    "ppo_loss",
    "ppo_loss_and_grad",
    "ppo_loss_reference",
    "schedules",
]
