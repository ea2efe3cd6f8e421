"""Does ``step()`` write into tensors that are not its own any more?"""

from __future__ import annotations

import torch

from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import changed
from pyfast_ppo._check_env.step import Step


def observations_overwritten(step: Step) -> Finding | None:
    names = changed(step.held, step.before)
    if not names:
        return None
    return Finding(
        "observations-overwritten",
        f"step() writes into the tensor of {', '.join(map(repr, names))} that the step before has returned: rsl_rl"
        " copies it after step(), and so stores the next observation beside the action.",
        "return a clone of the buffer.",
    )


def actions_overwritten(step: Step) -> Finding | None:
    if torch.equal(step.given, step.actions):
        return None
    return Finding(
        "actions-overwritten",
        "step() writes into the actions that it is given: rsl_rl stores them after step(), with the log-probability of"
        " those it has drawn.",
        "work on a copy: actions = actions.clamp(low, high), not actions.clamp_(low, high).",
    )
