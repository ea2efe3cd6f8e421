"""An optimizer that reads its learning rate on the device, so that nobody has to wait for the number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from pyfast_ppo.rsl_rl.adam import KernelSteps
from pyfast_ppo.rsl_rl.nonfinite import any_nonfinite

_FUSED = (Adam, AdamW, SGD)
_OPTIONS = ("fused", "capturable", "foreach")  # of a group: which kind of step is taken


class DeviceRate:
    """The learning rate of an optimizer while an update runs: a 0-dim tensor that rules change without a host sync.

    Adam and AdamW step by our kernels where those can (``adam.py``); they and SGD else take a tensor in their fused
    step (torch's own, the same formulas to rounding), RMSprop in its capturable one, which is for GPUs. For others the
    number is read after each change. Outside of an update the optimizer holds plain numbers, as loggers, schedulers and
    checkpoints expect.
    """

    def __init__(self, optimizer: Optimizer, backend: str | None = None, in_graph: bool = False) -> None:
        """``backend``: as in FusedPPO; ``in_graph``: its steps may be recorded as a CUDA graph."""
        self._optimizer: Any = optimizer  # torch's stubs lack what fused steps read
        self.backend = backend
        self._kernels = KernelSteps(optimizer)
        self._in_graph = in_graph
        self._initial: Any = None  # 0-dim float64, from the first update on
        self._value: Any = None  # 0-dim float64, while an update runs
        self._options: list[tuple[dict, dict]] = []  # each group, and its options as it was made
        self.prepare()

    def prepare(self) -> None:
        """Chooses the step that takes a tensor. To be called again after the optimizer or its state was changed."""
        groups = self._optimizer.param_groups
        for group in groups:
            group.update(self._made_with(group))
        self._options = [(group, {name: group[name] for name in _OPTIONS if name in group}) for group in groups]
        self.option = option = fitting_option(self._optimizer)
        self.on_device = option is not None
        self.can_skip = option == "fused"
        if option is None:
            return
        self._optimizer._warned_capturable_if_run_uncaptured = True  # torch need not tell that they can be recorded
        for group in self._optimizer.param_groups:
            group[option] = True
            group["foreach"] = None if option == "fused" else group["foreach"]  # not both
            if option == "fused" and "capturable" in group:  # a CUDA graph asks for it, also where the step is fused
                group["capturable"] = self._in_graph and all(parameter.is_cuda for parameter in group["params"])
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if "step" in state:  # on the host, if another kind of step was taken before
                    step = torch.as_tensor(state["step"], dtype=torch.float32)
                    state["step"] = step.to(parameter.device)

    def start(self, rate: float) -> Tensor:
        """``rate`` from ``begin`` on; filled in, not copied: a copy to a GPU would wait. Always the same memory."""
        if self._initial is None:
            device = self._optimizer.param_groups[0]["params"][0].device
            self._initial = torch.empty((), dtype=torch.float64, device=device)
        return self._initial.fill_(rate)

    def begin(self) -> None:
        """The steps that follow have the rate of ``start``."""
        self.set(self._initial)

    def state_dict(self) -> dict:
        """The optimizer's, as if its step were the ordinary one: with the options and counters of that."""
        saved = self._optimizer.state_dict()
        saved["state"] = {
            i: {k: v.cpu() if k == "step" and isinstance(v, Tensor) else v for k, v in state.items()}
            for i, state in saved["state"].items()
        }
        for group, saved_group in zip(self._optimizer.param_groups, saved["param_groups"], strict=True):
            saved_group.update(self._made_with(group))
        return saved

    def _made_with(self, group: dict) -> dict:
        """The options that were the group's own: nothing for a new one.

        ``load_state_dict`` puts other dictionaries in the groups' places, with the same lists of parameters.
        """
        same = (options for known, options in self._options if known is group or known["params"] is group["params"])
        return next(same, {})

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether it is the rate of this one."""
        return self._optimizer is optimizer

    @property
    def optimizer_name(self) -> str:
        """For messages."""
        return type(self._optimizer).__name__

    @property
    def value(self) -> Tensor:
        """0-dim float64."""
        return self._value

    def set(self, rate: Tensor) -> None:
        """For the next steps, in all groups."""
        self._value = rate
        self._put_into_groups(rate if self.on_device else rate.item())

    def step(
        self, modules: Sequence[nn.Module], max_norm: float, *, skip: Tensor | None, skip_nonfinite: bool
    ) -> Tensor | None:
        """Clips the gradients of each module to ``max_norm``, and takes the optimizer's step.

        No parameter and no state changes where ``skip`` (boolean, 0-dim) is true, nor where the norm of a module's
        gradients is NaN or infinite, if ``skip_nonfinite``. Returns whether one was, 0-dim, or None if that does not
        matter.
        """
        if self.can_skip:
            lost = self._kernels.step(modules, max_norm, skip=skip, skip_nonfinite=skip_nonfinite, backend=self.backend)
            if lost is not None:
                return lost if skip_nonfinite else None
        norms = [_clip(gradients, max_norm) for module in modules if (gradients := _with_gradients(module))]
        lost = any_nonfinite(norms) if skip_nonfinite else None
        skip = lost if skip is None else (skip if lost is None else lost | skip)
        if self.can_skip:
            self._optimizer.grad_scale = None
            self._optimizer.found_inf = None if skip is None else skip.float()
        if self.on_device and self._value is not None and self._value.is_cuda:
            self._put_into_groups(self._value.float())  # which torch's steps on a GPU read
        if self.can_skip or skip is None or not skip.item():  # some have to be asked on the host
            self._optimizer.step()
        return lost

    def end_steps(self) -> None:
        """The update ends: the optimizer's steps are its own again, and what it is made of may change."""
        self._kernels.forget()
        if self.can_skip:
            self._optimizer.found_inf = None

    def finish(self, rate: float | None = None) -> float:
        """Plain numbers again. ``rate``: the present one, if the host has read it; else it waits for it here."""
        if rate is None:
            rate = (self._initial if self._value is None else self._value).item()
        self._value = None
        self._put_into_groups(rate)
        return rate

    def _put_into_groups(self, rate: float | Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def _with_gradients(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.grad is not None]


def _clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """The norm of the gradients, before they were clipped."""
    # foreach=False: torch 2.15's norm of many tensors at once copies from the host, which no CUDA graph takes
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=False)
    if not math.isinf(max_norm):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def fitting_option(optimizer: Optimizer) -> str | None:
    """What makes it take a tensor: the name of an option of its groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(set(map(id, parameters))) < len(parameters):
        # encoders that actor and critic share are stepped twice; a fused step would count both before the first
        return None
    if type(optimizer) is SGD and any(group["momentum"] for group in optimizer.param_groups):
        # a fused step that is skipped leaves the buffers of a first step unwritten, and the next one reads them
        return None
    devices = {p.device.type for p in parameters}
    if type(optimizer) in _FUSED and devices <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters):
        return "fused"
    return "capturable" if type(optimizer) is RMSprop and devices == {"cuda"} else None
