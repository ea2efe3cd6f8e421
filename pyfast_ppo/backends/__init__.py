"""Which code runs an operation: one table of what there is, what it can run on, and why it cannot.

A backend is a module with functions that take and give tensors and, but for ``eager``, know nothing of autograd.
``cuda``, ``triton`` and ``cpu`` have the same for the loss, the returns and the Gaussians; ``cuda`` alone reads rows of
a mini-batch in place (``GATHERS``), ``cuda`` and ``cpu`` have what an update needs around the loss: hidden layers, the
step of Adam, the rule of the learning rate (``FUSES_UPDATE``). ``eager`` has the loss and the returns
(``ops/gaussian.py`` takes the reference formulas, with their own derivatives, in its place) and runs everywhere, so
there is always one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyfast_ppo.backends import _extension

PREFERENCE = ("cuda", "triton", "cpu", "eager")
"""Fastest first: the order in which ``backend=None`` looks for one."""


@dataclass(frozen=True)
class BackendStatus:
    """What ``pyfast-ppo doctor`` says of a backend."""

    name: str
    available: bool
    reason: str | None  # why it is not available
    detail: str  # what it uses: instruction set, threads


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pyfast_ppo.backends.{name}")


def unavailable_reason(name: str) -> str | None:
    """Why the backend cannot be used on this machine, or None if it can."""
    return _module(name).unavailable_reason()


def status() -> list[BackendStatus]:
    """One entry per backend, in the order of preference."""
    rows = []
    for name in PREFERENCE:
        reason = unavailable_reason(name)
        rows.append(BackendStatus(name, reason is None, reason, "" if reason else _module(name).detail()))
    return rows


def plain_dtype(inputs: tuple[Tensor, ...]) -> torch.dtype | None:
    """The dtype of the arithmetic, if the loss's ten tensors are right and just as every backend takes them.

    None is no verdict: then they have to be looked at one by one.
    """
    return _DTYPE_OF_BITS[_extension.plain_bits(inputs)]


_DTYPE_OF_BITS = {0: None, 32: torch.float32, 64: torch.float64}

_selected: dict[tuple[str | None, str, torch.dtype], ModuleType] = {}


def select(name: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The backend of that name, or the best one for tensors on ``device`` if the name is None.

    ``dtype`` is what the operation computes in: float64 if any of its tensors is, else float32.

    Raises:
        ValueError: There is no such backend, or it does not run on this device.
        TypeError: It does not compute in this dtype.
        RuntimeError: The backend is not available on this machine; the message says why.
    """
    try:
        return _selected[name, device.type, dtype]
    except KeyError:
        run = _selected[name, device.type, dtype] = _find(name, device.type, dtype)
        return run
    except TypeError:  # a name that is no string, nor anything else that can be looked up
        check_name(name)
        raise


def check_name(name: str | None) -> None:
    """Raises a ValueError if there is no backend of that name."""
    if name is not None and name not in PREFERENCE:
        raise ValueError(f"backend must be one of {', '.join(map(repr, PREFERENCE))} or None, got {name!r}")


def _find(name: str | None, device_type: str, dtype: torch.dtype) -> ModuleType:
    if name is None:
        # only those that fit are asked whether they are available: to ask one for GPUs wakes the GPU
        fitting = ((c, m) for c in PREFERENCE if _fits(m := _module(c), device_type, dtype) and not m.FOR_TESTS_ONLY)
        return next(module for candidate, module in fitting if unavailable_reason(candidate) is None)
    check_name(name)
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}; pass backend=None for the best one there is")
    module = _module(name)
    if not _fits(module, device_type, torch.float32):
        raise ValueError(
            f"backend {name!r} runs on {module.DEVICE_TYPE} tensors, the arguments are on {device_type}; "
            "move them or pass backend=None"
        )
    if not _fits(module, device_type, dtype):
        raise TypeError(
            f"backend {name!r} computes in float32, an argument is {str(dtype).removeprefix('torch.')}; "
            "convert it with .float() or pass backend=None"
        )
    return module


def _fits(module: ModuleType, device_type: str, dtype: torch.dtype) -> bool:
    return module.DEVICE_TYPE in (None, device_type) and dtype in module.COMPUTES_IN
