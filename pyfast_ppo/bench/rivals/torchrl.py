"""TorchRL (0.14): ``ClipPPOLoss`` as it is, with networks that hand out the given tensors.

``functional=False``, since there are no parameters to be swapped; metrics of its own (effective sample size, explained
variance) are on, as they are by default where they can be left on.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.modules import IndependentNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    vec_generalized_advantage_estimate,
)

from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves
from pyfast_ppo.bench.stock import COEFFICIENTS, GAMMA, LAM, MiniBatch

NAME = "TorchRL"
CLIPS_VALUES_ALIKE = True
NOTE = (
    "The same loss, with the ratio clipped as a logarithm; k1 from samples, where rsl_rl has the exact KL. It looks on "
    "the host whether the entropy is finite."
)


class _Outputs(torch.nn.Module):
    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, observation: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._outputs if len(self._outputs) > 1 else self._outputs[0]


class _Policy(_Outputs):
    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._outputs
        return mean, std.expand_as(mean)


def make_loss(batch: MiniBatch, clip_value: bool) -> LossAndLeaves:
    """TorchRL's loss on this batch."""
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(_Policy(batch.mean, batch.std), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=IndependentNormal, return_log_prob=True
        ),
    )
    critic = TensorDictModule(_Outputs(batch.values), in_keys=["observation"], out_keys=["state_value"])
    module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=COEFFICIENTS["clip_param"],
        entropy_coeff=COEFFICIENTS["entropy_coef"],
        critic_coeff=COEFFICIENTS["value_loss_coef"],
        loss_critic_type="l2",
        clip_value=clip_value,
        functional=False,
        device=batch.mean.device,
    )
    data = TensorDict(
        {
            "observation": batch.actions,
            "action": batch.actions,
            module.tensor_keys.sample_log_prob: batch.old_log_prob.squeeze(-1),
            "advantage": batch.advantages,
            "value_target": batch.returns,
            "state_value": batch.old_values,
        },
        batch_size=[batch.mean.shape[0]],
    )

    def loss() -> Tensor:
        out = module(data)
        return out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]

    return LossAndLeaves(loss, batch.leaves, std_is_logarithm=False)


def make_gae(rollout):
    """Its loop over the steps, on data as TorchRL keeps them, [E, T, 1]; its normalisation by hand.

    The vectorised estimator, which is its default, takes ten times as long on a CPU.
    """

    def by_environment(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous()

    rewards, values, dones = (by_environment(t) for t in (rollout.rewards, rollout.values, rollout.dones.bool()))
    last_values = rollout.last_values.unsqueeze(1)
    estimate = vec_generalized_advantage_estimate if rewards.is_cuda else generalized_advantage_estimate

    def gae() -> tuple[Tensor, Tensor]:
        next_values = torch.cat([values[:, 1:], last_values], dim=1)
        advantages, returns = estimate(GAMMA, LAM, values, next_values, rewards, dones)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return advantages.transpose(0, 1), returns.transpose(0, 1)

    return gae
