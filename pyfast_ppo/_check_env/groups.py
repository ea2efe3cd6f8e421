"""Observations as groups of tensors, and how they are compared."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Groups = dict[str, Tensor]
"""Observation groups ``[E, ...]``; a group of single terms is one entry for each, "group/term"."""


def groups_of(obs: Any, prefix: str = "") -> Groups:
    """All tensors in a TensorDict or dict; none in anything else."""
    groups: Groups = {}
    for name, values in obs.items() if hasattr(obs, "items") else ():
        path = f"{prefix}/{name}" if prefix else str(name)
        groups |= {path: values} if isinstance(values, Tensor) else groups_of(values, path)
    return groups


def copied(obs: Any) -> Groups:
    return {name: values.clone() for name, values in groups_of(obs).items()}


def changed(now: Groups, before: Groups) -> list[str]:
    """The groups that are not what they were."""
    return [name for name, values in now.items() if not same(values, before[name]).all()]


def same(a: Tensor, b: Tensor) -> Tensor:
    """Element by element, and NaN is the same as NaN."""
    return (a == b) | ((a != a) & (b != b))


def same_rows(a: Tensor, b: Tensor) -> Tensor:
    """bool ``[E]``."""
    return ~rows_with(~same(a, b))


def rows_with(elements: Tensor) -> Tensor:
    """bool ``[E]``: a true element in ``[E, ...]``, which may be ``[E]`` or empty."""
    return elements.unsqueeze(-1).flatten(1).any(dim=1)


def count(rows: Tensor) -> str:
    return f"{int(rows.sum())} of {len(rows)} environments"
