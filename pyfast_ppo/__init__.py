"""Fused PPO for rsl_rl and Isaac Lab: the loss, its metrics and all gradients in one pass.

``ppo_loss`` is the operation, ``pyfast_ppo.rsl_rl:FusedPPO`` the drop-in for a runner config, ``pyfast-ppo`` the
command line.

torch is imported with the first name that needs it: the command line shows its help without.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyfast_ppo._version import __version__
from pyfast_ppo.check_env import check_env  # now, or it would give way to the module of its name

if TYPE_CHECKING:
    from pyfast_ppo import kl, schedules
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

_MODULES = ("backends", "kl", "schedules")
_MODULE_OF = {
    "PPOLossOutput": "ops.ppo_loss",
    "gae": "ops.gae",
    "gaussian_entropy": "ops.gaussian",
    "gaussian_kl": "ops.gaussian",
    "gaussian_log_prob": "ops.gaussian",
    "ppo_loss": "ops.ppo_loss",
    "ppo_loss_and_grad": "ops.ppo_loss",
    "ppo_loss_reference": "ops.ppo_loss",
}


if not TYPE_CHECKING:  # type checkers would take it for a promise of any name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # the next time it is found without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
