"""Rules that set the learning rate from the KL of the update: device tensors in, device tensors out, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor


class RslRlSchedule:
    """The adaptive learning rate of rsl_rl 5.x, decided before each step of the optimizer.

    kl > 2 · desired_kl lowers the rate by 1.5, down to ``min_rate``; kl < ½ · desired_kl raises it by 1.5, up to
    ``max_rate``. rsl_rl raises it only if kl > 0, which is meant to leave out the first mini-batch, where the policy
    has not moved yet; but there the KL is 0 only if rounding makes it so. Here ``step_taken`` says it. A KL that is NaN
    changes nothing.
    """

    factor = 1.5

    def __init__(self, desired_kl: float, min_rate: float = 1e-5, max_rate: float = 1e-2) -> None:
        if not desired_kl >= 0.0:
            raise ValueError(f"desired_kl must not be negative, got {desired_kl}")
        self.desired_kl = desired_kl
        self.min_rate = min_rate
        self.max_rate = max_rate

    def update(self, kl: Tensor, lr: Tensor, step_taken: bool = True) -> Tensor:
        """The rate for the next step.

        Args:
            kl: Mean KL(old‖new) of this mini-batch, in nats. 0-dim.
            lr: The present rate. 0-dim float64, on the same device.
            step_taken: Whether the policy has moved since the rollout.
        """
        lowered = torch.clamp(lr / self.factor, min=self.min_rate)
        raised = torch.clamp(lr * self.factor, max=self.max_rate) if step_taken else lr
        return torch.where(kl > self.desired_kl * 2.0, lowered, torch.where(kl < self.desired_kl / 2.0, raised, lr))
