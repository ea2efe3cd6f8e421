"""skrl's PPO (2.1): its ``GaussianMixin`` as it is, and the lines of ``skrl.agents.torch.ppo.PPO.update``.

``update`` is one method, with storage, networks and optimizer in it; the lines from ``policy.act`` to ``backward`` are
copied below. Those of ``GaussianMixin.act`` are called: it also draws an action that the update does not use.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from skrl.agents.torch.ppo.ppo import compute_gae
from skrl.models.torch import GaussianMixin, Model
from torch import Tensor

from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves, log_of
from pyfast_ppo.bench.stock import COEFFICIENTS, GAMMA, LAM, MiniBatch

NAME = "skrl"
CLIPS_VALUES_ALIKE = False
NOTE = (
    "The clipped value alone, where rsl_rl takes the larger of the clipped and the plain loss; k3 from samples, where "
    "rsl_rl has the exact KL. Less work in both."
)


class _Policy(GaussianMixin, Model):
    """Hands out the given outputs of a network."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        space = gymnasium.spaces.Box(-np.inf, np.inf, (mean.shape[-1],))
        Model.__init__(self, observation_space=space, action_space=space, device=mean.device)
        GaussianMixin.__init__(self)
        self._outputs = mean, log_std

    def compute(self, inputs: dict, role: str = "") -> tuple[Tensor, dict]:
        mean, log_std = self._outputs
        return mean, {"log_std": log_std}


def make_loss(batch: MiniBatch, clip_value: bool) -> LossAndLeaves:
    """skrl's loss on this batch."""
    log_std = log_of(batch.std)
    policy = _Policy(batch.mean, log_std)
    clip = COEFFICIENTS["clip_param"]

    def loss() -> Tensor:
        # PPO.update
        _, outputs = policy.act({"taken_actions": batch.actions}, role="policy")
        next_log_prob = outputs["log_prob"]
        with torch.no_grad():
            ratio = next_log_prob - batch.old_log_prob
            ((torch.exp(ratio) - 1) - ratio).mean()
        entropy_loss = -COEFFICIENTS["entropy_coef"] * policy.get_entropy(role="policy").mean()
        ratio = torch.exp(next_log_prob - batch.old_log_prob)
        surrogate = batch.advantages * ratio
        surrogate_clipped = batch.advantages * torch.clip(ratio, 1.0 - clip, 1.0 + clip)
        policy_loss = -torch.min(surrogate, surrogate_clipped).mean()
        predicted_values = batch.values
        if clip_value:
            predicted_values = batch.old_values + torch.clip(predicted_values - batch.old_values, min=-clip, max=clip)
        value_loss = COEFFICIENTS["value_loss_coef"] * F.mse_loss(batch.returns, predicted_values)
        return policy_loss + entropy_loss + value_loss

    return LossAndLeaves(loss, (batch.mean, log_std, batch.values), std_is_logarithm=True)


def make_gae(rollout):
    """``compute_gae`` as it is, which normalises, too."""
    terminated = rollout.dones.bool()
    truncated = torch.zeros_like(terminated)

    def gae() -> tuple[Tensor, Tensor]:
        returns, advantages = compute_gae(
            rewards=rollout.rewards,
            terminated=terminated,
            truncated=truncated,
            values=rollout.values,
            last_values=rollout.last_values,
            discount_factor=GAMMA,
            lambda_coefficient=LAM,
        )
        return advantages, returns

    return gae
