"""An optimizer that reads its learning rate on the device, so that nobody has to wait for the number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

_FUSED = (Adam, AdamW, SGD)


class DeviceRate:
    """The learning rate of an optimizer while an update runs: a 0-dim tensor that rules change without a host sync.

    Adam, AdamW and SGD take a tensor in their fused step (torch's own, the same formulas to rounding), RMSprop in its
    capturable one, which is for GPUs. For others the number is read after each change. Outside of an update the
    optimizer holds plain numbers, as loggers, schedulers and checkpoints expect.
    """

    def __init__(self, optimizer: Optimizer, in_graph: bool = False) -> None:
        """``in_graph``: its steps may be recorded as a CUDA graph."""
        self._optimizer: Any = optimizer  # torch's stubs lack what fused steps read
        self._in_graph = in_graph
        self._initial: Any = None  # 0-dim float64, from the first update on
        self._value: Any = None  # 0-dim float64, while an update runs
        self._skip: Tensor | None = None
        self._options = [dict(group) for group in optimizer.param_groups]  # as they were made
        self.prepare()

    def prepare(self) -> None:
        """Chooses the step that takes a tensor. To be called again after the optimizer's state was loaded."""
        option = _option(self._optimizer)
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

    def start(self, rate: float) -> None:
        """``rate`` from ``begin`` on; filled in, not copied: a copy to a GPU would wait. Always the same memory."""
        if self._initial is None:
            device = self._optimizer.param_groups[0]["params"][0].device
            self._initial = torch.empty((), dtype=torch.float64, device=device)
        self._initial.fill_(rate)

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
        for group, options in zip(saved["param_groups"], self._options, strict=True):
            group.update({name: options[name] for name in ("fused", "capturable", "foreach") if name in options})
        return saved

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
        as_tensor = rate.float() if rate.is_cuda else rate  # the GPU's fused step reads a float32
        in_groups = as_tensor if self.on_device else rate.item()
        for group in self._optimizer.param_groups:
            group["lr"] = in_groups

    def skip_if(self, condition: Tensor | None) -> None:
        """The next steps change nothing where ``condition``, 0-dim, is true. None: they are taken."""
        self._skip = condition
        if self.can_skip:
            self._optimizer.grad_scale = None
            self._optimizer.found_inf = None if condition is None else condition.float()

    def step(self) -> None:
        """The optimizer's, unless it is to be skipped."""
        if self.can_skip or self._skip is None or not self._skip.item():  # some have to be asked on the host
            self._optimizer.step()

    def finish(self, rate: float | None = None) -> float:
        """Plain numbers again. ``rate``: the present one, if the host has read it; else it waits for it here."""
        if rate is None:
            rate = (self._initial if self._value is None else self._value).item()
        self._value = None
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate


def _option(optimizer: Optimizer) -> str | None:
    """What makes it take a tensor: the name of an option of its groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(set(map(id, parameters))) < len(parameters):
        # encoders that actor and critic share are stepped twice; a fused step would count both before the first
        return None
    devices = {p.device.type for p in parameters}
    if type(optimizer) in _FUSED and devices <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters):
        return "fused"
    return "capturable" if type(optimizer) is RMSprop and devices == {"cuda"} else None
