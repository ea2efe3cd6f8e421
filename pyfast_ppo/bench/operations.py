"""The operations that a piece of work runs, one by one: what they are for, what they move, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyfast_ppo import backends
from pyfast_ppo.bench.counts import silent

MATRIX, ACTIVATION, MINI_BATCHES = "matrix products", "bias and activation", "mini-batches"
LOSS, OPTIMIZER, ACTING, RETURNS = "loss, KL, metrics", "gradients, optimizer", "sampling, storing", "returns"
LINES = (MATRIX, ACTIVATION, LOSS, OPTIMIZER, MINI_BATCHES, ACTING, RETURNS)
_LINE_OF_PART = {"act": ACTING, "process_env_step": ACTING, "compute_returns": RETURNS, "update": LOSS}
_LINE_OF_NAME = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear"), MATRIX),
    **dict.fromkeys(("elu", "elu_", "elu_backward", "tanh", "tanh_backward", "relu", "threshold_backward"), ACTIVATION),
    **dict.fromkeys(("add_bias_and_activate", "add_bias_and_activate_backward"), ACTIVATION),
    "adam_step": OPTIMIZER,
    **dict.fromkeys(("randperm", "index", "index_select", "gather"), MINI_BATCHES),
}
_KERNELS = (
    *("ppo_loss", "gae", "gaussian_kl", "gaussian_log_prob", "add_bias_and_activate", "add_bias_and_activate_backward"),
    *("adam_step", "adapt_rate"),
)
# beside parameter and moments, which it is given, it reads the gradient twice, and it writes what it is given
_TIMES_GIVEN = {"adam_step": 8 / 3}
_NO_WORK = (
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "set_", "resize_"),
    *("broadcast_tensors", "_record_function_enter_new", "_record_function_exit"),
)
_READS_ROWS_ONLY = ("index", "index_select", "gather")  # of their first argument, as many as they hand out
_ONLY_WRITES_FIRST = ("copy_", "fill_", "zero_", "normal_", "random_")  # which is also what they hand out
_SYNCS = ("_local_scalar_dense", "is_nonzero")
_RANGE = "pyfast_ppo operation "

T = TypeVar("T")


@dataclass
class Operation:
    """One that reads or writes memory; views and allocations are none."""

    name: str
    line: str  # one of LINES
    moved_bytes: int  # of the tensors that it reads and of those that it writes
    flops: int  # of a matrix product
    is_sync: bool
    seconds: float = 0.0


@dataclass
class Recorder:
    """Sees the operations of torch's dispatcher and the kernels of pyfast_ppo while work runs in ``recording``.

    On the CPU an operation's time is what passes in the dispatcher and below it. On a GPU it is that of the kernels
    and copies that were launched in it.
    """

    device: str
    hidden_dims: tuple[int, ...]  # a sum over rows [N, H] of such a width is the gradient of a bias
    operations: list[Operation] = field(default_factory=list)
    part: str | None = None  # of an iteration, for operations whose name does not say what they are for; None: not seen
    _stepping: bool = False

    @contextmanager
    def recording(self, optimizer: Any = None) -> Iterator[None]:
        """``optimizer``: of rsl_rl's PPO, whose steps are to be told from the rest. One that is watched is stepped by
        torch, and FusedPPO has its own steps.
        """
        backend: Any = backends.select(None, torch.device(self.device))
        with ExitStack() as stack:
            for name in _KERNELS:
                if hasattr(backend, name):
                    stack.enter_context(_replaced(backend, name, self._watched(name)))
            stack.enter_context(_replaced(nn.utils, "clip_grad_norm_", self._while_stepping))
            if optimizer is not None:
                stack.enter_context(_replaced(optimizer, "step", self._while_stepping))
            if self.device == "cuda":
                activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
                stack.enter_context(silent())
                found: Any = profile(activities=activities)
                stack.callback(lambda: self._take_times(found.profiler.kineto_results.events()))  # once it has ended
                stack.enter_context(found)
            stack.enter_context(_Mode(self))
            yield

    def run(self, name: str, work: Callable[[], T], given: object, is_operation: bool = True) -> T:
        """Runs and notes one operation."""
        if self.part is None:
            return work()
        line = self._line(name, self.part, given)
        note = Operation(name, line, 0, 0, name in _SYNCS and not self._stepping)
        with record_function(f"{_RANGE}{len(self.operations)}"):
            start = time.perf_counter()
            out = work()
            note.seconds = time.perf_counter() - start
        if is_operation:
            note.moved_bytes = _moved_bytes(name, given, out)
            self.operations.append(note)
        return out

    def _line(self, name: str, part: str, given: object) -> str:
        if self._stepping or name.startswith(("_fused_", "_foreach_")) or (part == "update" and name == "add_"):
            return OPTIMIZER  # autograd adds gradients up with add_
        line = _LINE_OF_NAME.get(name, _LINE_OF_PART[part])
        if part == "update" and name == "sum":
            shape = next(t.shape for t in tree_leaves(given) if isinstance(t, Tensor))
            return ACTIVATION if len(shape) == 2 and shape[1] in self.hidden_dims else line
        return _LINE_OF_PART[part] if line == MINI_BATCHES and part != "update" else line

    def _watched(self, name: str) -> Callable[[Callable], Callable]:
        def around(kernel: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                with _disable_current_modes():
                    return self.run(name, lambda: kernel(*args, **kwargs), (args, kwargs))

            return call

        return around

    def _while_stepping(self, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            self._stepping = True
            try:
                return function(*args, **kwargs)
            finally:
                self._stepping = False

        return call

    def _take_times(self, events: list) -> None:
        for operation, seconds in zip(self.operations, device_seconds(events, len(self.operations)), strict=True):
            operation.seconds = seconds


class _Mode(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        is_operation = not func.is_view and name not in _NO_WORK
        out = self._recorder.run(name, lambda: func(*args, **kwargs), (args, kwargs), is_operation)
        if is_operation and self._recorder.part is not None:
            note = self._recorder.operations[-1]
            if func._schema.returns == []:  # it writes into what it is given, and hands out nothing
                note.moved_bytes += _written_bytes(func, args, kwargs)
            note.flops = _flops(func, args, kwargs, out)
        return out


def device_seconds(events: list, num_operations: int) -> list[float]:
    """Of each operation, from the profiler's events: what a GPU did for the launches within its range on the host."""
    ranges = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns(), int(e.name().removeprefix(_RANGE)))
        for e in events
        if e.name().startswith(_RANGE) and e.device_type() == DeviceType.CPU
    )
    work: dict[int, int] = {}  # nanoseconds by correlation
    for e in events:
        # annotations, ours and torch's of an optimizer's step, are drawn on the device, too, numbered by themselves
        if e.device_type() != DeviceType.CPU and not e.is_user_annotation():
            work[e.correlation_id()] = work.get(e.correlation_id(), 0) + e.duration_ns()
    launches = sorted(
        (e.start_ns(), e.correlation_id())
        for e in events
        if e.name().startswith("cu") and e.device_type() == DeviceType.CPU and e.correlation_id() in work
    )
    seconds, at = [0.0] * num_operations, 0
    for start, correlation in launches:
        while at < len(ranges) and ranges[at][1] < start:
            at += 1
        if at < len(ranges) and ranges[at][0] <= start and ranges[at][2] < num_operations:
            seconds[ranges[at][2]] += 1e-9 * work[correlation]
    return seconds


def _flops(func: Any, args: tuple, kwargs: dict, out: object) -> int:
    """Of a matrix product; of others 0."""
    if func._overloadpacket is torch.ops.aten.linear:  # which is whole in inference mode
        x, weight = args[:2]
        return 2 * x.numel() * weight.shape[0]
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def _written_bytes(func: Any, args: tuple, kwargs: dict) -> int:
    parameters = func._schema.arguments
    given = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    return sum(_bytes(given.get(p.name)) for p in parameters if p.alias_info is not None and p.alias_info.is_write)


def _moved_bytes(name: str, given: object, out: object) -> int:
    if name in _READS_ROWS_ONLY:
        return 2 * _bytes(out)
    return round(_TIMES_GIVEN.get(name, 1) * _bytes(given)) + (0 if name in _ONLY_WRITES_FIRST else _bytes(out))


def _bytes(found: object) -> int:
    """Of the tensors in it; of one that is expanded, what there is."""
    tensors = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def _replaced(owner: Any, name: str, around: Callable[[Callable], Callable]) -> Iterator[None]:
    """``owner.name`` is ``around`` of what it was."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, around(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
