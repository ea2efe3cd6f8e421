"""Steps of torch's Adam and AdamW by this package's kernels, as far as those can take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from pyfast_ppo import backends
from pyfast_ppo.ops.adam import AdamRow, AdamRule, adam_step

_UNUSUAL = ("amsgrad", "maximize", "differentiable")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


class KernelSteps:
    """What the kernels need of an optimizer, looked at once per update: users may change it between two of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Nothing is looked at yet."""
        self._optimizer: Any = optimizer
        self.forget()

    def forget(self) -> None:
        """The next step looks anew."""
        self._rule: AdamRule | None = None
        self._rows: list[AdamRow] = []
        self._is_known = False

    def step(
        self,
        modules: Sequence[nn.Module],
        max_norm: float,
        *,
        skip: Tensor | None,
        skip_nonfinite: bool,
        backend: str | None,
    ) -> Tensor | None:
        """As ``ops.adam.adam_step``, for all parameters of the modules; None where torch has to take the step.

        ``backend``: as in FusedPPO.
        """
        if not self._is_known:
            self._is_known = True
            self._rule = self._find_rule(modules, backend)
        if self._rule is None:
            return None
        rate = self._optimizer.param_groups[0]["lr"]
        for _ in range(2):
            lost = adam_step(
                self._rows,
                self._rule,
                max_norm=max_norm,
                rate=rate if isinstance(rate, Tensor) else float(rate),
                skip=skip,
                skip_nonfinite=skip_nonfinite,
                backend=backends.select(backend, self._rows[0].parameter.device),
            )
            if lost is not None:
                return lost
            if not self._make_states(modules):
                break
        self._rule = None
        return None

    def _find_rule(self, modules: Sequence[nn.Module], backend: str | None) -> AdamRule | None:
        """If the optimizer does what the kernels do, with all parameters of these modules and no others."""
        optimizer = self._optimizer
        if type(optimizer) not in (Adam, AdamW) or "step" in vars(optimizer):
            return None
        if any(getattr(optimizer, hooks) for hooks in _HOOKS):
            return None
        if any(getattr(torch_optimizer, hooks) for hooks in _GLOBAL_HOOKS):
            return None
        rules = [_rule_of(optimizer, group) for group in optimizer.param_groups]
        rates = {id(rate) if isinstance(rate := group["lr"], Tensor) else rate for group in optimizer.param_groups}
        if rules[0] is None or any(rule != rules[0] for rule in rules) or len(rates) > 1:
            return None
        of_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
        of_modules = [p for module in modules for p in module.parameters()]
        if len(of_modules) != len(of_optimizer) or {*map(id, of_modules)} != {*map(id, of_optimizer)}:
            return None
        if len({p.device for p in of_modules}) > 1:
            return None
        device, rate = of_modules[0].device, optimizer.param_groups[0]["lr"]
        if isinstance(rate, Tensor) and (rate.device != device or rate.dtype not in (torch.float32, torch.float64)):
            return None
        if not backends.select(backend, device).FUSES_UPDATE:
            return None
        self._rows = self._rows_of(modules)
        return rules[0]

    def _rows_of(self, modules: Sequence[nn.Module]) -> list[AdamRow]:
        state = self._optimizer.state
        of_each = [(p, state.get(p, {}), i) for i, module in enumerate(modules) for p in module.parameters()]
        return [AdamRow(p, s.get("exp_avg"), s.get("exp_avg_sq"), s.get("step"), i) for p, s, i in of_each]

    def _make_states(self, modules: Sequence[nn.Module]) -> bool:
        """As torch does at a parameter's first step; whether there was one without."""
        new = [row.parameter for row in self._rows if row.parameter.grad is not None and row.step is None]
        for parameter in new:
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self._rows = self._rows_of(modules)
        return bool(new)


def _rule_of(optimizer: Optimizer, group: dict[str, Any]) -> AdamRule | None:
    if any(group.get(name) for name in _UNUSUAL) or any(isinstance(beta, Tensor) for beta in group["betas"]):
        return None
    decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
    beta1, beta2 = group["betas"]
    return AdamRule(beta1, beta2, group["eps"], group["weight_decay"], decoupled)
