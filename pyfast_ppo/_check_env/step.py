"""One step of the environment, as the checks see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyfast_ppo._check_env.groups import Groups


@dataclass
class Step:
    """What went into a step and what came out of it."""

    held: Groups
    """What the step before has returned, as it is now."""
    before: Groups
    """Copies of it, as it was."""
    given: Tensor
    """The tensor that ``step()`` got, as it is now."""
    actions: Tensor
    """What it was, ``[E, A]``."""
    obs: Groups
    """Copies."""
    rewards: Tensor  # [E]
    dones: Tensor  # bool [E]
    time_outs: Tensor  # bool [E]
    terminated: Tensor  # bool [E]
    extras: dict
    limit_moved: Tensor
    """bool ``[E]``: whose episodes had been given one step left."""
