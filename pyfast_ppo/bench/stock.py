"""The lines of rsl_rl 5.5.1 that the operations replace, copied out of its methods, so that they can be timed alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

COEFFICIENTS: dict[str, Any] = {"clip_param": 0.2, "value_loss_coef": 1.0, "entropy_coef": 0.01}
GAMMA, LAM = 0.99, 0.95


class MiniBatch(NamedTuple):
    """The loss's tensors, in the order of ``ppo_loss``; the first three require gradients."""

    mean: Tensor  # [N, A]
    std: Tensor  # [A]
    values: Tensor  # [N, 1]
    actions: Tensor  # [N, A]
    old_log_prob: Tensor  # [N, 1]
    old_mean: Tensor  # [N, A]
    old_std: Tensor  # [N, A], as rsl_rl stores it, or [A]
    advantages: Tensor  # [N, 1]
    returns: Tensor  # [N, 1]
    old_values: Tensor  # [N, 1]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those that get a gradient."""
        return self.mean, self.std, self.values


class StockLoss(NamedTuple):
    """The loss, which has a gradient, and the metrics that rsl_rl reports."""

    loss: Tensor
    kl: Tensor
    surrogate: Tensor
    value_loss: Tensor
    entropy: Tensor


def make_mini_batch(
    num_rows: int, num_actions: int, old_std_per_row: bool, seed: int, device: str = "cpu"
) -> MiniBatch:
    """A mini-batch a few steps into an update.

    No ratio is at a bound of the clip: there, rounding decides whether a row has a gradient.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    old_mean = randn(num_rows, num_actions)
    old_std = 0.5 + torch.rand(num_actions, generator=g)
    actions = old_mean + old_std * randn(num_rows, num_actions)
    old_log_prob = Normal(old_mean, old_std).log_prob(actions).sum(-1, keepdim=True)
    mean = old_mean + 0.05 * randn(num_rows, num_actions)
    std = old_std * 1.02
    ratio = torch.exp(Normal(mean, std).log_prob(actions).sum(-1, keepdim=True) - old_log_prob)
    for bound in (1.0 - COEFFICIENTS["clip_param"], 1.0 + COEFFICIENTS["clip_param"]):
        old_log_prob[(ratio - bound).abs() < 1e-3] += 0.01
    old_values = randn(num_rows, 1)
    values = old_values + 0.1 * randn(num_rows, 1)
    if old_std_per_row:
        old_std = old_std.repeat(num_rows, 1)
    rollout = (actions, old_log_prob, old_mean, old_std, randn(num_rows, 1), randn(num_rows, 1), old_values)
    outputs = (t.to(device).requires_grad_() for t in (mean, std, values))
    return MiniBatch(*outputs, *(t.to(device) for t in rollout))


def in_another_order(batch: MiniBatch) -> MiniBatch:
    """The same rows shuffled, in memory of their own: quicker than drawing new ones."""
    num_rows = batch.mean.shape[0]
    order = torch.randperm(num_rows, device=batch.mean.device)
    rows = [t.detach()[order] if t.shape[0] == num_rows else t.detach().clone() for t in batch]
    return MiniBatch(*(t.requires_grad_(i < 3) for i, t in enumerate(rows)))


def stock_loss(
    mean: Tensor,
    std: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    *,
    clip_param: float = COEFFICIENTS["clip_param"],
    value_loss_coef: float = COEFFICIENTS["value_loss_coef"],
    entropy_coef: float = COEFFICIENTS["entropy_coef"],
) -> StockLoss:
    """The lines of ``PPO.update`` between the networks and ``backward()``, and its distribution's formulas."""
    distribution = Normal(mean, std, validate_args=False)
    actions_log_prob = distribution.log_prob(actions).sum(dim=-1)
    entropy = distribution.entropy().sum(dim=-1).mean()
    with torch.no_grad():
        old = Normal(old_mean, old_std, validate_args=False)
        new = Normal(distribution.mean, distribution.stddev, validate_args=False)
        kl_mean = kl_divergence(old, new).sum(dim=-1).mean()
    ratio = torch.exp(actions_log_prob - torch.squeeze(old_log_prob))
    surrogate = -torch.squeeze(advantages) * ratio
    surrogate_clipped = -torch.squeeze(advantages) * torch.clamp(ratio, 1.0 - clip_param, 1.0 + clip_param)
    surrogate_loss = torch.max(surrogate, surrogate_clipped).mean()
    value_clipped = old_values + (values - old_values).clamp(-clip_param, clip_param)
    value_losses = (values - returns).pow(2)
    value_losses_clipped = (value_clipped - returns).pow(2)
    value_loss = torch.max(value_losses, value_losses_clipped).mean()
    loss = surrogate_loss + value_loss_coef * value_loss - entropy_coef * entropy
    return StockLoss(loss, kl_mean, surrogate_loss, value_loss, entropy)


def stock_gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    gamma: float = GAMMA,
    lam: float = LAM,
) -> tuple[Tensor, Tensor]:
    """The lines of ``PPO.compute_returns``, with its normalisation. Tensors are [T, E, 1], ``last_values`` [E, 1]."""
    returns = torch.empty_like(values)
    advantage: Tensor | int = 0
    for step in reversed(range(rewards.shape[0])):
        next_values = last_values if step == rewards.shape[0] - 1 else values[step + 1]
        next_is_not_terminal = 1.0 - dones[step].float()
        delta = rewards[step] + next_is_not_terminal * gamma * next_values - values[step]
        advantage = delta + next_is_not_terminal * gamma * lam * advantage
        returns[step] = advantage + values[step]
    advantages = returns - values
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns
