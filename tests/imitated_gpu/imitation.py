"""PyTorch's operators for CUDA without a GPU, in a process that has loaded the imitated CUDA runtime.

The host's part of each is torch's own: it allocates, launches, waits, is recorded or refused. What the kernels would
have computed, the CPU's operator computes in the same memory: at once, or, while a graph is recorded, when that is
replayed.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ALLOCATE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_"}
_NO_KERNEL = {*_ALLOCATE, "is_pinned", "record_stream"}
# What the kernel finds decides about the result's shape, or about an error: the host waits for it.
_VALUES_DECIDE = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "normal",
    "repeat_interleave",
}
_BY_INDEX = {"index", "index_put_", "_index_put_impl_", "index_put"}  # with a mask, those, too
_KINDS = ("kernel", "copy", "fill", "graph", "wait", "malloc", "refused", "graph's kernel", "graph's copy")

_runtime = ctypes.CDLL("libcudart.so.13")
_runtime.imitation_count.restype = ctypes.c_long
_runtime.imitation_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_long]
_recorded: list[Callable[[], None]] = []
_failed: list[BaseException] = []
_random = torch.Generator()


def counts(work: Callable[[], object]) -> Counter[str]:
    """How often the runtime was asked for each of ``_KINDS`` by ``work``."""
    _runtime.imitation_forget()
    work()
    found = {kind: _runtime.imitation_count(kind.encode()) for kind in _KINDS}
    return Counter({kind: number for kind, number in found.items() if number})


def raise_what_failed() -> None:
    """What Python raised within a graph."""
    if _failed:
        error = _failed[0]
        _failed.clear()
        raise error


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def _run_recorded(number: int) -> None:
    try:
        with torch.no_grad():
            _recorded[number]()
    except BaseException as error:
        _failed.append(error)


_runtime.imitation_set_python(_run_recorded)


def _enqueue(kind: str, work: Callable[[], None] | None = None) -> None:
    number = -1
    if work is not None:
        _recorded.append(work)
        number = len(_recorded) - 1
    _runtime.imitation_enqueue(torch.cuda.current_stream().cuda_stream, kind.encode(), number)


def _compute(work: Callable[[], None]) -> None:
    if torch.cuda.is_current_stream_capturing():
        _enqueue("what Python computes", work)
    else:
        work()


def on_cpu(x: Any) -> Any:
    """The same memory as a tensor of the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if isinstance(x, torch.Generator):
        return None
    if not isinstance(x, Tensor) or not x.is_cuda:
        return x
    storage = x.untyped_storage()
    if x.numel() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    size = storage.nbytes() // x.element_size() * x.element_size()
    memory = torch.frombuffer((ctypes.c_char * size).from_address(storage.data_ptr()), dtype=torch.uint8)
    return memory.view(x.dtype).as_strided(x.size(), x.stride(), x.storage_offset())


def _on_gpu(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
    on_cpu(out).copy_(x)
    return out


def _values_decide(name: str, args: tuple) -> bool:
    if name in _BY_INDEX:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in _VALUES_DECIDE


class _OwnRandomNumbers:
    """The device's generator is another than the CPU's, and operators draw one after the other from it."""

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()
        torch.set_rng_state(_random.get_state())

    def __exit__(self, *_: object) -> None:
        _random.set_state(torch.get_rng_state())
        torch.set_rng_state(self._state)


def manual_seed(seed: int) -> None:
    _random.manual_seed(seed)


class ImitatedKernels(TorchDispatchMode):
    """See the module."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "pyfast_ppo":
            with self:
                return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_cuda for t in inputs) and _values_decide(name, args):
            torch.empty((), device="cuda").item()  # the wait, or its refusal
            with _OwnRandomNumbers():
                result = function(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
            return args[0] if function._schema.is_mutable else tree_map(_on_gpu, result)
        out = function(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in _NO_KERNEL or not any(t.is_cuda for t in [*inputs, *outputs]):
            return out
        old = {t.untyped_storage().data_ptr() for t in inputs if t.untyped_storage().nbytes()}
        is_new = [t.untyped_storage().data_ptr() not in old for t in outputs]
        if outputs and not any(is_new) and not function._schema.is_mutable:
            return out  # views
        args, kwargs = tree_map(on_cpu, (args, kwargs))
        # what is recorded must not keep tensors: memory is used again, and a gradient that nobody has is not copied
        targets = [on_cpu(t) if new else None for t, new in zip(outputs, is_new, strict=True)]
        gives_numbers = not outputs
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        numbers = []  # what is returned that is no tensor

        def compute() -> None:
            if is_random:
                with _OwnRandomNumbers():
                    result = function(*args, **kwargs)
            else:
                result = function(*args, **kwargs)
            results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            for target, value in zip(targets, results, strict=False):
                if target is not None:
                    target.copy_(value)
            if gives_numbers:
                numbers[:] = [result]

        _compute(compute)
        return numbers[0] if numbers else out


class EmulatedBackend:
    """In place of ``pyfast_ppo._C.cuda``: its kernels, compiled for the CPU (tests/csrc/emulation)."""

    def __init__(self, module: ModuleType) -> None:
        """``module``: what tests/csrc/emulated_module.cpp makes."""
        self._module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name.endswith(("partials", "moments", "counters", "blocks", "reason")):  # computed on the host
            return function
        return functools.partial(self._launch, function)

    def _launch(self, function: Callable, *args: Any) -> Any:
        args = _on_cpu_with_gradients(args)
        before = self._module.num_launches()
        self._module.run_kernels(False)
        result = function(*args)
        self._module.run_kernels(True)
        for _ in range(self._module.num_launches() - before):
            _enqueue("kernel")
        if result is not False:
            _compute(lambda: function(*args))
        return result


def _on_cpu_with_gradients(x: Any) -> Any:
    if isinstance(x, Tensor):
        out = on_cpu(x.detach())
        if x.is_leaf and x.grad is not None:
            out.grad = on_cpu(x.grad)
        return out
    if isinstance(x, (tuple, list)):
        items = [_on_cpu_with_gradients(item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x
