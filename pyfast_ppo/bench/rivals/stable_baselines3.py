"""Stable-Baselines3's PPO (2.9): ``DiagGaussianDistribution`` as it is, and the lines of ``PPO.train``.

``train`` is one method, with buffer, networks and optimizer in it; the lines from ``evaluate_actions`` to
``backward`` are copied below, the reads of numbers on the host among them, for they are made in each mini-batch.
Advantages come normalised, as they do for all.
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F
from stable_baselines3.common.distributions import DiagGaussianDistribution
from torch import Tensor
from torch.distributions import Distribution

from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves, log_of
from pyfast_ppo.bench.stock import COEFFICIENTS, MiniBatch

NAME = "Stable-Baselines3"
CLIPS_VALUES_ALIKE = False
NOTE = (
    "The clipped value alone, where rsl_rl takes the larger of the clipped and the plain loss; k3 from samples, where "
    "rsl_rl has the exact KL. Its distribution checks its arguments, and five numbers are read on the host."
)


def make_loss(batch: MiniBatch, clip_value: bool) -> LossAndLeaves:
    """Stable-Baselines3's loss on this batch."""
    log_std = log_of(batch.std)
    distribution = DiagGaussianDistribution(batch.mean.shape[-1])
    old_log_prob, advantages, returns, old_values = (
        t.squeeze(-1) for t in (batch.old_log_prob, batch.advantages, batch.returns, batch.old_values)
    )
    clip_range = COEFFICIENTS["clip_param"]

    def loss() -> Tensor:
        checked = Distribution._validate_args
        Distribution.set_default_validate_args(True)  # torch's default, which other libraries switch off for all
        # ActorCriticPolicy.evaluate_actions
        distribution.proba_distribution(batch.mean, log_std)
        log_prob = distribution.log_prob(batch.actions)
        entropy = distribution.entropy()
        values = batch.values.flatten()
        # PPO.train
        ratio = th.exp(log_prob - old_log_prob)
        policy_loss_1 = advantages * ratio
        policy_loss_2 = advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range)
        policy_loss = -th.min(policy_loss_1, policy_loss_2).mean()
        policy_loss.item()
        th.mean((th.abs(ratio - 1) > clip_range).float()).item()
        values_pred = values
        if clip_value:
            values_pred = old_values + th.clamp(values - old_values, -clip_range, clip_range)
        value_loss = F.mse_loss(returns, values_pred)
        value_loss.item()
        entropy_loss = -th.mean(entropy)
        entropy_loss.item()
        with th.no_grad():
            log_ratio = log_prob - old_log_prob
            th.mean((th.exp(log_ratio) - 1) - log_ratio).cpu().numpy()
        Distribution.set_default_validate_args(checked)
        return policy_loss + COEFFICIENTS["entropy_coef"] * entropy_loss + COEFFICIENTS["value_loss_coef"] * value_loss

    return LossAndLeaves(loss, (batch.mean, log_std, batch.values), std_is_logarithm=True)
