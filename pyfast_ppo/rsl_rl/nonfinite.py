"""What is not finite: where it came from, and keeping it out of what a run has learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from rsl_rl.modules import EmpiricalNormalization
from rsl_rl.storage import RolloutStorage
from torch import Tensor


class NonFiniteError(RuntimeError):
    """An update met NaN or infinite numbers. Actor and critic are as the last finite step left them."""


def first_nonfinite(storage: RolloutStorage, models: Iterable[nn.Module]) -> str:
    """What was not finite first: in a parameter, or at the earliest step of the rollout. Waits for the device."""
    for model in models:
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the parameter {name} of the {type(model).__name__} was not finite before the update already"
    in_order = {f"the observation group {name!r}": obs for name, obs in storage.observations.items()}
    mean, std = storage.distribution_params[0], storage.distribution_params[-1]
    in_order |= {
        "the value": storage.values,
        "the policy's mean": mean,
        "the policy's std (which must be positive, too)": torch.where(std > 0.0, std, torch.nan),
        "the action": storage.actions,
        "the reward": storage.rewards,
    }
    derived = {"the return": storage.returns, "the advantage": storage.advantages}  # from later steps, too
    earliest = _earliest(in_order) or _earliest(derived)
    if earliest is None:
        return "everything in the rollout was finite, but the gradients were not: the loss or the gradients overflowed"
    name, step, env = earliest
    return f"{name} was not finite first, at step {step} of the rollout in environment {env}"


def _earliest(tensors: dict[str, Tensor]) -> tuple[str, int, int] | None:
    """(name, step, environment) of the earliest entry that is not finite; of several at one step the first in order."""
    found = []
    for place, (name, values) in enumerate(tensors.items()):
        bad = ~torch.isfinite(values).flatten(2).all(-1)  # [T, E]
        if bad.any():
            step, env = divmod(int(bad.flatten().int().argmax()), bad.shape[1])
            found.append((step, place, name, env))
    if not found:
        return None
    step, _, name, env = min(found)
    return name, step, env


@contextmanager
def statistics_in_place(models: Iterable[nn.Module], finite_only: bool) -> Iterator[None]:
    """What normalizers learn inside is written into the memory that they had: a CUDA graph reads it there.

    ``finite_only``: statistics that would become NaN or infinite stay what they were.
    """
    normalizers = [m for model in models for m in model.modules() if isinstance(m, EmpiricalNormalization)]
    memory = [dict(normalizer.named_buffers()) for normalizer in normalizers]
    before = [{name: buffer.clone() for name, buffer in buffers.items()} for buffers in memory]
    yield
    for normalizer, places, old in zip(normalizers, memory, before, strict=True):
        new = dict(normalizer.named_buffers())
        if finite_only:
            fine = torch.stack([torch.isfinite(buffer).all() for buffer in new.values()]).all()
            new = {name: torch.where(fine, buffer, old[name]) for name, buffer in new.items()}
        for name, buffer in new.items():
            # made in inference mode, memory cannot be written to outside of it: then the buffer moves, once
            place = buffer.clone() if places[name].is_inference() else places[name].copy_(buffer)
            setattr(normalizer, name, place)


def any_nonfinite(norms: list[Tensor]) -> Tensor:
    """Whether one of these norms of gradients is NaN or infinite. 0-dim, boolean, on their device."""
    return ~torch.isfinite(torch.stack(norms)).all()
