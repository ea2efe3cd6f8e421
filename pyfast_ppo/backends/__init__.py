"""Which code runs an operation: one table of what there is, what it can run on, and why it cannot.

A backend is a module with the same functions as every other (see ``cpu.py``), tensors in and tensors out; it knows
nothing of autograd. ``eager`` runs everywhere, so there is always one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

PREFERENCE = ("cuda", "triton", "cpu", "eager")
"""Fastest first: the order in which ``backend=None`` looks for one."""

_MODULES = {"cpu": "pyfast_ppo.backends.cpu", "eager": "pyfast_ppo.backends.eager"}
_NOT_YET = {
    "cuda": "this version has no CUDA kernels yet",
    "triton": "this version has no Triton kernels yet",
}
_DEVICE_TYPES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "eager": None}  # None: any


@dataclass(frozen=True)
class BackendStatus:
    """What ``pyfast-ppo doctor`` says of a backend."""

    name: str
    available: bool
    reason: str | None  # why it is not available
    detail: str  # what it uses: instruction set, threads


def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def unavailable_reason(name: str) -> str | None:
    """Why the backend cannot be used on this machine, or None if it can."""
    return _NOT_YET[name] if name in _NOT_YET else _module(name).unavailable_reason()


def status() -> list[BackendStatus]:
    """One entry per backend, in the order of preference."""
    rows = []
    for name in PREFERENCE:
        reason = unavailable_reason(name)
        rows.append(BackendStatus(name, reason is None, reason, "" if reason else _module(name).detail()))
    return rows


_selected: dict[tuple[str | None, str], ModuleType] = {}


def select(name: str | None, device: torch.device) -> ModuleType:
    """The backend of that name, or the best one for tensors on ``device`` if the name is None.

    Raises:
        ValueError: There is no such backend, or it does not run on this device.
        RuntimeError: The backend is not available on this machine; the message says why.
    """
    key = (name, device.type)
    if key not in _selected:
        _selected[key] = _find(name, device.type)
    return _selected[key]


def _find(name: str | None, device_type: str) -> ModuleType:
    if name is None:
        for candidate in PREFERENCE:
            if _runs_on(candidate, device_type) and unavailable_reason(candidate) is None:
                return _module(candidate)
        raise AssertionError("the eager backend is always available")
    if name not in PREFERENCE:
        raise ValueError(f"backend must be one of {', '.join(map(repr, PREFERENCE))} or None, got {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}; pass backend=None for the best one there is")
    if not _runs_on(name, device_type):
        raise ValueError(
            f"backend {name!r} runs on {_DEVICE_TYPES[name][0]} tensors, the arguments are on {device_type}; "
            "move them or pass backend=None"
        )
    return _module(name)


def _runs_on(name: str, device_type: str) -> bool:
    device_types = _DEVICE_TYPES[name]
    return device_types is None or device_type in device_types
