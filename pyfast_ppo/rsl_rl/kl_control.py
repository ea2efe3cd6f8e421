"""What the KL of an update does to its learning rate, to the steps that follow, and to the penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast_ppo.ops.learning_rate import lower_if_lost
from pyfast_ppo.rsl_rl.metrics import Run
from pyfast_ppo.rsl_rl.optimizer import DeviceRate
from pyfast_ppo.rsl_rl.ranks import mean_over_ranks
from pyfast_ppo.schedules import (
    AdaptivePenalty,
    EarlyStop,
    ProportionalSchedule,
    RslRlSchedule,
    RslRlScheduleBefore5,
)

_NOT_MOVED = 1e-12  # nats: more than rounding of a float32 forward pass makes, less than any step

KL_RULES = {"rsl_rl": RslRlSchedule, "rsl_rl_4": RslRlScheduleBefore5, "proportional": ProportionalSchedule}


class KLControl:
    """The rule for the learning rate, early stop and the adaptive penalty, those of them that are wanted.

    Everything is decided on the device, and alike in all processes.
    """

    def __init__(
        self,
        rate: DeviceRate,
        desired_kl: float | None,
        kl_rule: str,
        kl_target: float | None,
        early_stop_kl: float | None,
        adapt_before_first_step: bool,
        world_size: int,
    ) -> None:
        """``desired_kl``: None for a learning rate that is not adaptive. Otherwise as the arguments of FusedPPO."""
        self.rate = rate
        self.rule: Any = None if desired_kl is None else KL_RULES[kl_rule](desired_kl)
        self.penalty = None if kl_target is None else AdaptivePenalty(kl_target)
        self._early_stop = None if early_stop_kl is None else EarlyStop(early_stop_kl)
        self._adapt_before_first_step = adapt_before_first_step
        self._world_size = world_size
        if self._early_stop is not None and not rate.can_skip:
            raise ValueError(
                "early_stop_kl needs an optimizer that can skip a step on the device: adam, adamw, or sgd without "
                f"momentum, not {rate.optimizer_name}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the learning rate is."""
        return self.rule is not None

    @property
    def kl_before_5(self) -> bool:
        """Whether the rule is fed with the KL of rsl_rl before 5.0."""
        return isinstance(self.rule, RslRlScheduleBefore5)

    @property
    def _once_per_update(self) -> bool:
        return isinstance(self.rule, ProportionalSchedule)

    def begin(self) -> None:
        """An update begins."""
        if self.adaptive:
            self.rate.begin()

    def before_step(self, run: Run) -> None:
        """The last mini-batch has its metrics; its step is still to be taken."""
        stopped_before = run.stopped
        if self._early_stop is not None:
            (kl,) = run.last_kls(1)
            run.stopped = self._early_stop.update(mean_over_ranks(kl, self._world_size), run.stopped)
            run.skipped.append(run.stopped)
        if self.adaptive:
            rule_kl = mean_over_ranks(run.last_rule_kl(), self._world_size)
            run.rule_kls.append(rule_kl)
            if not self._once_per_update:
                may_rise = len(run.metrics) > 1 or self._adapt_before_first_step
                # a policy that cannot move, with a frozen actor say, is no reason to raise the rate
                rise_above = _NOT_MOVED if may_rise else math.inf
                lost, backend = run.lost[-1] if run.lost else None, self.rate.backend
                rate = self.rule.following(rule_kl, self.rate.value, rise_above=rise_above, lost=lost, backend=backend)
                if stopped_before is not None:  # no step follows that would answer to the rate
                    rate = torch.where(stopped_before, self.rate.value, rate)
                self.rate.set(rate)
            run.rates.append(self.rate.value)

    def after_last_step(self, run: Run, num_mini_batches: int) -> None:
        """What is decided once per update, from the KL of its last epoch."""
        if self._once_per_update:
            kl = torch.stack(run.rule_kls[-num_mini_batches:]).mean()
            self.rate.set(self._lower_if_lost(self.rule.update(kl, self.rate.value), run))
        elif self.adaptive:
            self.rate.set(self._lower_if_lost(self.rate.value, run))
        if self.adaptive:
            run.last_rate = self.rate.value
        if self.penalty is not None:
            kl = torch.stack(run.last_kls(num_mini_batches)).mean()
            run.kl_coef = self.penalty.update(mean_over_ranks(kl, self._world_size), run.kl_coef)

    def _lower_if_lost(self, rate: Tensor, run: Run) -> Tensor:
        """``rate``, or a lower one than the present if the last step could not be taken."""
        if not run.lost:
            return rate
        rule = self.rule
        return lower_if_lost(rate, self.rate.value, run.lost[-1], min_rate=rule.min_rate, factor=rule.factor)
