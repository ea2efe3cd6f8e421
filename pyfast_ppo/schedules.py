"""Rules that set the learning rate from the KL of the update: device tensors in, device tensors out, no host sync.

What they return carries no gradient: a state that is fed back in each update would keep the graphs of all before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_ppo.ops.learning_rate import adapted_rate


class RslRlSchedule:
    """The adaptive learning rate of rsl_rl 5.x, decided before each step of the optimizer.

    kl > 2 · desired_kl lowers the rate by 1.5, down to ``min_rate``; kl < ½ · desired_kl raises it by 1.5, up to
    ``max_rate``. rsl_rl raises it only if kl > 0, which is meant to leave out the first mini-batch, where the policy
    has not moved yet; but there the KL is 0 only if rounding makes it so. Here ``step_taken`` says it. A KL that is NaN
    changes nothing, and one that is infinite never raises the rate.
    """

    factor = 1.5

    def __init__(self, desired_kl: float, min_rate: float = 1e-5, max_rate: float = 1e-2) -> None:
        """The rule for a target.

        Args:
            desired_kl: In nats.
            min_rate: A rate that is lowered is this at least.
            max_rate: A rate that is raised is this at most.

        Raises:
            ValueError: ``desired_kl`` is negative; ``min_rate`` is above ``max_rate``.
        """
        if not desired_kl >= 0.0:
            raise ValueError(f"desired_kl must be 0 or more, got {desired_kl}")
        _check_range(min_rate=min_rate, max_rate=max_rate)
        self.desired_kl = desired_kl
        self.min_rate = min_rate
        self.max_rate = max_rate

    def update(self, kl: Tensor, lr: Tensor, step_taken: bool | Tensor = True) -> Tensor:
        """The rate for the next step. 0-dim, of the dtype of ``lr``.

        Args:
            kl: Mean KL(old‖new) of this mini-batch, in nats. 0-dim.
            lr: The present rate. 0-dim float64, on the same device.
            step_taken: Whether the policy has moved since the rollout; a tensor is read on its device.

        Raises:
            TypeError: ``kl`` or ``lr`` is no tensor.
        """
        if isinstance(step_taken, Tensor):
            return torch.where(step_taken, self.following(kl, lr), self.following(kl, lr, rise_above=torch.inf))
        return self.following(kl, lr, rise_above=-torch.inf if step_taken else torch.inf)

    @torch.no_grad()
    def following(
        self,
        kl: Tensor,
        lr: Tensor,
        *,
        rise_above: float = -torch.inf,
        lost: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """As ``update``, with more to say: see ``ops.learning_rate.adapted_rate``."""
        _check_tensors(kl=kl, lr=lr)
        return adapted_rate(
            kl,
            lr,
            desired_kl=self.desired_kl,
            min_rate=self.min_rate,
            max_rate=self.max_rate,
            factor=self.factor,
            rise_above=rise_above,
            lost=lost,
            backend=backend,
        )


class RslRlScheduleBefore5(RslRlSchedule):
    """The adaptive learning rate of rsl_rl before 5.0: the same thresholds, another KL, and the rate rises if kl > 0.

    Its KL (``kl``) had an epsilon inside the logarithm: 1e-5 too much per action, 1.2e-4 for 12 of them at equality. So
    the first mini-batch of each update, at which the policy has not moved, raises the rate. For runs that have to be
    compared with old ones.
    """

    @staticmethod
    def kl(mean_old: Tensor, std_old: Tensor, mean_new: Tensor, std_new: Tensor) -> Tensor:
        """KL(old‖new) as it was computed, with its epsilon. [N, A], [A] or [N, A], … -> [N]."""
        ratio = torch.log(std_new / std_old + 1e-5)
        spread = (std_old.square() + (mean_old - mean_new).square()) / (2.0 * std_new.square())
        return (ratio + spread - 0.5).sum(-1)

    def following(
        self,
        kl: Tensor,
        lr: Tensor,
        *,
        rise_above: float = 0.0,
        lost: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """As ``RslRlSchedule.following``; neither ``rise_above`` nor whether a step was taken matters."""
        return super().following(kl, lr, rise_above=0.0, lost=lost, backend=backend)


class ProportionalSchedule:
    """A learning rate that moves with the square root of desired_kl / kl, once per update.

    The KL of a small step grows with the square of its length, so this is the factor that would have met the target,
    within ``factor`` either way, and within [min_rate, max_rate]. It is decided after an update, from the KL of its
    last epoch: not rsl_rl's behaviour at the same ``desired_kl``. If that is not finite, the rate goes down by
    ``factor``.
    """

    def __init__(self, desired_kl: float, min_rate: float = 1e-5, max_rate: float = 1e-2, factor: float = 1.5) -> None:
        """The rule for a target.

        Args:
            desired_kl: In nats.
            min_rate: The lowest rate.
            max_rate: The highest rate.
            factor: The most that a rate is multiplied or divided by at once.

        Raises:
            ValueError: ``desired_kl`` is not positive; ``factor`` is not greater than 1; ``min_rate`` is above
                ``max_rate``.
        """
        if not desired_kl > 0.0:
            raise ValueError(f"desired_kl must be positive, got {desired_kl}")
        if not factor > 1.0:
            raise ValueError(f"factor must be greater than 1, got {factor}")
        _check_range(min_rate=min_rate, max_rate=max_rate)
        self.desired_kl = desired_kl
        self.min_rate = min_rate
        self.max_rate = max_rate
        self.factor = factor

    @torch.no_grad()
    def update(self, kl: Tensor, lr: Tensor) -> Tensor:
        """The rate for the next update. 0-dim, of the dtype of ``lr``.

        Args:
            kl: Mean KL(old‖new) over the last epoch of the update, in nats. 0-dim.
            lr: The present rate. 0-dim float64, on the same device.

        Raises:
            TypeError: One of them is no tensor.
        """
        _check_tensors(kl=kl, lr=lr)
        change = torch.sqrt(self.desired_kl / kl.clamp(min=0.0).to(lr.dtype)).clamp(1.0 / self.factor, self.factor)
        change = torch.where(torch.isfinite(kl), change, 1.0 / self.factor)
        return torch.clamp(lr * change, self.min_rate, self.max_rate)


class EarlyStop:
    """No further steps in an update once a mini-batch's KL is beyond ``limit``, or not finite.

    Spinning Up's PPO and SB3's ``target_kl`` leave the loop, for which the host has to know; here the steps that follow
    are computed and not applied.
    """

    def __init__(self, limit: float) -> None:
        """``limit`` in nats.

        Raises:
            ValueError: It is not positive.
        """
        if not limit > 0.0:
            raise ValueError(f"limit must be positive, got {limit}")
        self.limit = limit

    def update(self, kl: Tensor, stopped: Tensor | None) -> Tensor:
        """Whether the next step is to be left out, and all that follow. 0-dim, boolean.

        Args:
            kl: Mean KL of this mini-batch, before its step, in nats. 0-dim.
            stopped: What the call before has returned; None at the first mini-batch of an update.

        Raises:
            TypeError: ``kl`` is no tensor.
        """
        _check_tensors(kl=kl)
        beyond = ~((kl <= self.limit) & torch.isfinite(kl))
        return beyond if stopped is None else stopped | beyond


class AdaptivePenalty:
    """The coefficient of the KL penalty of PPO (Schulman et al. 2017, section 4), decided once per update.

    kl < desired_kl / 1.5 halves it, kl > 1.5 · desired_kl doubles it. A KL that is not finite doubles it, too: the
    policy must not be let go because of it. The coefficient stays within [min_coef, max_coef], so that it can always
    recover.
    """

    def __init__(self, desired_kl: float, min_coef: float = 1e-6, max_coef: float = 1e6) -> None:
        """The rule for a target.

        Args:
            desired_kl: In nats.
            min_coef: The lowest coefficient.
            max_coef: The highest coefficient.

        Raises:
            ValueError: ``desired_kl`` is not positive; ``min_coef`` is above ``max_coef``.
        """
        if not desired_kl > 0.0:
            raise ValueError(f"desired_kl must be positive, got {desired_kl}")
        _check_range(min_coef=min_coef, max_coef=max_coef)
        self.desired_kl = desired_kl
        self.min_coef = min_coef
        self.max_coef = max_coef

    @torch.no_grad()
    def update(self, kl: Tensor, coef: Tensor) -> Tensor:
        """The coefficient for the next update: pass it to ``ppo_loss`` as ``kl_coef``, where it is read on its device.

        0-dim, of the dtype of ``coef``.

        Args:
            kl: Mean KL over the update, in nats. 0-dim.
            coef: The present coefficient. 0-dim, on the same device.

        Raises:
            TypeError: One of them is no tensor.
        """
        _check_tensors(kl=kl, coef=coef)
        doubled = (kl > 1.5 * self.desired_kl) | ~torch.isfinite(kl)
        halved = kl < self.desired_kl / 1.5
        following = torch.where(doubled, 2.0 * coef, torch.where(halved, 0.5 * coef, coef))
        return torch.clamp(following, self.min_coef, self.max_coef)


def _check_range(**ends: float) -> None:
    (lowest, low), (highest, high) = ends.items()
    if not low <= high:
        raise ValueError(f"{lowest} must not be above {highest}, got {low} and {high}")


def _check_tensors(**arguments: Tensor) -> None:
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(t).__name__}; "
                f"convert it with torch.as_tensor({name}, dtype=torch.float64)"
            )
