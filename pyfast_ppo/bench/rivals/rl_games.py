"""rl_games' PPO (1.6): its own model, ``calc_losses`` and ``policy_kl``, on the outputs of a network.

``ModelA2CContinuousLogStd.Network.forward`` runs with a network that hands out the given tensors, under
``torch.compile`` in "default" mode, as rl_games' runner does it unless told otherwise; ``A2CAgent.calc_losses`` is
called with an object that has the agent's attributes. Nothing is copied but the two lines that follow ``backward`` in
``calc_gradients``, the KL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from rl_games.algos_torch import torch_ext
from rl_games.algos_torch.a2c_continuous import A2CAgent
from rl_games.algos_torch.models import ModelA2CContinuousLogStd
from rl_games.common import common_losses
from rl_games.common.a2c_common import A2CBase
from torch import Tensor

from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves, log_of
from pyfast_ppo.bench.stock import COEFFICIENTS, GAMMA, LAM, MiniBatch

NAME = "rl_games"
CLIPS_VALUES_ALIKE = True
NOTE = (
    "The same loss, its value coefficient counted double; its KL has an epsilon of 1e-5 and is taken the other way "
    "round. Without its bounds loss, which rsl_rl has not."
)


class _Outputs(torch.nn.Module):
    """Stands in for the network; its last line spreads the std over the rows, as that of rl_games' own."""

    def forward(self, inputs: dict) -> tuple[Tensor, Tensor, Tensor, None]:
        mu, sigma, value = inputs["obs"]
        return mu, mu * 0 + sigma, value, None


@functools.cache
def _model() -> Callable[[dict], dict]:
    """One for all input sets: the compiler sees the same code each time."""
    network = ModelA2CContinuousLogStd.Network(
        _Outputs(), obs_shape=(1,), normalize_value=False, normalize_input=False, value_size=1
    )
    return torch.compile(network, mode="default")


def make_loss(batch: MiniBatch, clip_value: bool) -> LossAndLeaves:
    """rl_games' loss on this batch."""
    log_std = log_of(batch.std)
    outputs = batch.mean, log_std, batch.values
    model = _model()
    agent = SimpleNamespace(
        ppo=True,
        has_value_loss=True,
        model=None,
        clip_value=clip_value,
        bound_loss_type=None,
        ppo_device=batch.mean.device,
        critic_coef=2.0 * COEFFICIENTS["value_loss_coef"],  # halved again in calc_losses
        entropy_coef=COEFFICIENTS["entropy_coef"],
        bounds_loss_coef=0.0,
    )
    old_neglogp, advantage = -batch.old_log_prob.squeeze(-1), batch.advantages.squeeze(-1)
    old_sigma = batch.old_std.expand_as(batch.old_mean)

    def loss() -> Tensor:
        found = model({"is_train": True, "prev_actions": batch.actions, "obs": outputs})
        total, *_ = A2CAgent.calc_losses(
            agent,
            common_losses.actor_loss,
            old_neglogp,
            found["prev_neglogp"],
            advantage,
            COEFFICIENTS["clip_param"],
            batch.old_values,
            found["values"],
            batch.returns,
            found["mus"],
            found["entropy"],
            None,
        )
        with torch.no_grad():
            torch_ext.policy_kl(found["mus"].detach(), found["sigmas"].detach(), batch.old_mean, old_sigma, True)
        return total

    return LossAndLeaves(loss, outputs, std_is_logarithm=True)


def make_gae(rollout):
    """``discount_values`` as it is, and the lines of ``play_steps`` and ``prepare_dataset`` that follow it."""
    agent = SimpleNamespace(horizon_length=rollout.rewards.shape[0], gamma=GAMMA, tau=LAM)
    dones = rollout.dones.squeeze(-1).float()
    before = torch.cat([torch.zeros_like(dones[:1]), dones[:-1]])  # rl_games stores what held before each step

    def gae() -> tuple[Tensor, Tensor]:
        advantages = A2CBase.discount_values(
            agent, dones[-1], rollout.last_values, before, rollout.values, rollout.rewards
        )
        returns = advantages + rollout.values
        return common_losses.normalize_advantage((returns - rollout.values).sum(dim=-1)), returns

    return gae
