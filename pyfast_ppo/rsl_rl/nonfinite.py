"""What is not finite: where it came from, and keeping it out of what a run has learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from rsl_rl.modules import EmpiricalNormalization
from rsl_rl.storage import RolloutStorage
from torch import Tensor


class NonFiniteError(RuntimeError):
    """An update met NaN or infinite numbers. Actor, critic and RND are as their last finite steps left them."""


def first_nonfinite(
    storage: RolloutStorage,
    models: Iterable[nn.Module],
    *,
    intrinsic_groups: Sequence[str] = (),
    normalized: bool = True,
    num_ranks: int = 1,
) -> str:
    """What was not finite first: in a parameter, or at the earliest step of the rollout. Waits for the device.

    Args:
        storage: The rollout.
        models: Whose parameters are looked at.
        intrinsic_groups: Observation groups that the reward of the step before depends on, as RND's does.
        normalized: Whether advantages are normalised over the rollout: then one bad number is in all of them.
        num_ranks: Number of processes whose gradients are averaged.
    """
    for model in models:
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the parameter {name} of the {type(model).__name__} was not finite before the update already"
    mean, std = storage.distribution_params[0], storage.distribution_params[-1]
    in_order = {f"the observation group {name!r}": _bad(obs) for name, obs in storage.observations.items()}
    followed = torch.zeros_like(_bad(storage.rewards))  # by an observation that the reward was made of
    for name in intrinsic_groups:
        followed[:-1] |= _bad(storage.observations[name])[1:]
    in_order |= {
        "the value": _bad(storage.values),
        "the policy's mean": _bad(mean),
        "the policy's std (which must be positive, too)": _bad(torch.where(std > 0.0, std, torch.nan)),
        "the action": _bad(storage.actions),
        "the reward": _bad(storage.rewards) & ~followed,
    }
    if place := _earliest(in_order):
        with_rnd = place[0] == "the reward" and len(intrinsic_groups) > 0
        return _first(*place) + (" (RND's part, from the observation that followed, included)" if with_rnd else "")
    bad = _bad(storage.returns)
    # NaN spreads to the steps before, as far as the episode goes: the last one is where it began
    began = bad.clone()
    began[:-1] &= ~bad[1:] | (storage.dones[:-1].squeeze(-1) > 0)
    if place := _earliest({"the return": began}):
        at_end = place[1] == len(bad) - 1
        return _first(*place) + (", and so, it seems, the value of the observation after it" if at_end else "")
    bad = _bad(storage.advantages)
    if not normalized and (place := _earliest({"the advantage": bad})):
        return _first(*place)
    if num_ranks > 1:
        return (
            "what this process collected was finite, but the gradients, which are averaged over "
            f"{num_ranks} processes, were not: look at the other processes' errors; if none names a place in its "
            "rollout, the loss or the gradients overflowed"
        )
    if bad.any():
        return "the returns were finite, but the mean or the std of the advantages over the rollout was not"
    return "everything in the rollout was finite, but the gradients were not: the loss or the gradients overflowed"


def _first(name: str, step: int, env: int) -> str:
    return f"{name} was not finite first, at step {step} of the rollout in environment {env}"


def _bad(values: Tensor) -> Tensor:
    """[T, E, ...] -> [T, E]: where something is not finite."""
    return ~torch.isfinite(values).flatten(2).all(-1)


def _earliest(places: dict[str, Tensor]) -> tuple[str, int, int] | None:
    """(name, step, environment) of the earliest entry that is true, [T, E]; of several the first in order."""
    found = []
    for order, (name, bad) in enumerate(places.items()):
        if bad.any():
            step, env = divmod(int(bad.flatten().int().argmax()), bad.shape[1])
            found.append((step, order, name, env))
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
