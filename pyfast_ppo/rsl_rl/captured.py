"""Work that is done again and again: when it becomes a CUDA graph, and when it does not."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer

from pyfast_ppo.cuda_graph import Graph

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_MANY_CHANGES = 20  # of a key; a user who anneals a number for a while need not hear of it


class Waits:
    """Notices where what runs within waits for the device, as far as torch tells; nothing else changes."""

    def __init__(self) -> None:
        self.where: str | None = None  # the first one, "file:line"
        self._around = contextlib.ExitStack()

    def __enter__(self) -> Waits:
        self._caught: Any = self._around.enter_context(warnings.catch_warnings(record=True))  # a list
        warnings.simplefilter("always")
        if torch.cuda.get_sync_debug_mode() == 0:
            torch.cuda.set_sync_debug_mode("warn")
            self._around.callback(torch.cuda.set_sync_debug_mode, "default")
        return self

    def __exit__(self, *_: object) -> None:
        self._around.close()
        for w in self._caught:
            if "called a synchronizing CUDA operation" in str(w.message):
                self.where = self.where or f"{w.filename}:{w.lineno}"
            elif "Synchronization debug mode" not in str(w.message):  # that it does not notice everything
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)


class Captured(Generic[Result]):
    """Runs the same work again and again, by a graph as soon as it can.

    All that the work reads lies in the same memory each time, as far as the caller can tell: ``key`` tells what a graph
    freezes (addresses, shapes, numbers on the host). While the key changes from call to call the work runs as it is,
    and so it does the first time, in which kernels are loaded and memory is allocated; with the key of the call before
    it is recorded, and replayed from then on, unless it waited for the device. If it does so again, or cannot be
    recorded, it runs as it is for good, and the log says why.

    Several pieces of work, one after the other, have a slot each, and the key in common.
    """

    def __init__(self, subject: str, device: str) -> None:
        """``subject``: what the log calls the work."""
        self._subject = subject
        self._device = torch.device(device)
        self._graphs: dict[Hashable, tuple[Graph, Result]] = {}
        self._waited: dict[Hashable, bool] = {}  # for slots that have run with the present key: whether they waited
        self._key: Hashable = None
        self._num_changes = 0  # of the key, one after the other, with nothing recorded in between
        self.reason: str | None = None  # why it is not recorded
        self.num_records = 0

    def __getstate__(self) -> dict:
        """Copies record anew: theirs is other memory."""
        return {**self.__dict__, "_graphs": {}, "_waited": {}, "_key": None}

    def run(self, work: Callable[[], Result], key: Callable[[], Hashable], slot: Hashable = None) -> Result:
        """The result of the work, done now: with a graph, the same objects as in the call before."""
        if self.reason is not None:
            return work()
        if (present := key()) != self._key:
            self._follow(present)
        self._key = present  # the object, too: one is compared with itself in no time
        if slot not in self._graphs and self._waited.get(slot, True):
            return self._run_as_it_is(work, slot)
        if slot not in self._graphs and not self._record(work, slot):
            return work()
        graph, result = self._graphs[slot]
        graph.replay()
        return result

    def _follow(self, key: Hashable) -> None:
        """Another key than in the call before."""
        self._num_changes = 0 if self._graphs else self._num_changes + 1
        if self._num_changes == _MANY_CHANGES:
            before, now = _first_difference(self._key, key)
            logger.warning(
                "%s has not been recorded yet: what a CUDA graph would freeze changes each time, lately from %r to %r.",
                *(self._subject, before, now),
            )
        self._forget()

    def give_up(self, reason: str) -> None:
        """The work runs as it is from now on."""
        self._forget()
        self.reason = reason
        logger.warning("%s runs without a CUDA graph: %s.", self._subject, reason)

    def _forget(self) -> None:
        self._graphs.clear()
        self._waited.clear()

    def _run_as_it_is(self, work: Callable[[], Result], slot: Hashable) -> Result:
        with Waits() as waits:
            result = work()
        if waits.where is not None and slot in self._waited:  # once may be by what is made once
            self.give_up(f"it waits for the device, first at {waits.where}")
        else:
            self._waited[slot] = waits.where is not None
        return result

    def _record(self, work: Callable[[], Result], slot: Hashable) -> bool:
        graph = Graph(self._device, next((graph for graph, _ in self._graphs.values()), None))
        try:
            result = graph.record(work)
        except RuntimeError as error:  # CUDA's errors are RuntimeErrors, too
            self.give_up(f"it cannot be recorded ({_first_cause(error)})")
            return False
        self._graphs[slot] = graph, result
        self.num_records += 1
        return True


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Between two keys: a name with its value, or a value alone."""
    are_named = isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], str)
    if (are_named and not isinstance(a[1], tuple)) or not isinstance(a, tuple) or not isinstance(b, tuple):
        return a, b
    return next((_first_difference(x, y) for x, y in zip(a, b, strict=False) if x != y), (len(a), len(b)))


def _first_cause(error: BaseException) -> str:
    """What was raised first; that the recording could not be ended is what followed from it."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def addresses(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> tuple:
    """Where these tensors and the modules' parameters and buffers lie, how, and which take gradients.

    Other tensors of a module are its own affair: many keep what they saw last, in memory that is another each time.
    """
    in_modules = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in (*in_modules, *tensors))


def options(optimizer: Optimizer, *, rate: bool) -> tuple:
    """What its groups of parameters are stepped with, which those are, and its hooks. ``rate``: at which learning rate,
    too."""
    left_out = ("params",) if rate else ("params", "lr")
    groups = tuple(
        tuple((k, v.data_ptr() if isinstance(v, Tensor) else frozen(v)) for k, v in group.items() if k not in left_out)
        for group in optimizer.param_groups
    )
    parameters = tuple(p.data_ptr() for group in optimizer.param_groups for p in group["params"])
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)  # type: ignore[attr-defined]
    return groups, parameters, frozen(hooks)


def settings(modules: Iterable[nn.Module]) -> tuple:
    """What decides on the host how they run: their types, training mode, numbers as the std's range or a dropout's
    share, hooks, and functions that were put in the place of others."""
    parts = [part for module in modules for part in module.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    on_all = {name: value for name, value in vars(torch_module).items() if name.endswith("_hooks")}
    return (
        *((type(part), frozen(vars(part))) for part in parts),
        *(frozen((p._backward_hooks, p._post_accumulate_grad_hooks)) for p in parameters),
        frozen(on_all),
    )


def frozen(value: Any) -> Any:
    """Numbers, words and functions as they are, also within lists and dictionaries; of anything else the type.

    Functions themselves, because an id may be used again.
    """
    if isinstance(value, (int, float, str, np.generic)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return tuple((name, frozen(part)) for name, part in value.items())
    return value if callable(value) and not isinstance(value, nn.Module) else type(value)
