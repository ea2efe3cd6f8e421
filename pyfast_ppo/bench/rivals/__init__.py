"""Other libraries' PPO losses and advantage estimators, on the same tensors, where they are installed.

Each file runs a library's own code as far as it can be called; what had to be copied out of a longer method is marked
there, with the method's name and the version. Where a library's formula differs from rsl_rl's, ``NOTE`` says how.
Before anything is timed, its loss and gradients must be ours where the formulas are the same: with the value's
clipping switched off in all of them, and with it, too, where the library clips as rsl_rl does.

A library's module has ``NAME``, ``NOTE``, ``CLIPS_VALUES_ALIKE`` and ``make_loss(batch, clip_value)``; if it has an
advantage estimator that takes tensors, ``make_gae(rollout)``, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

import pyfast_ppo
from pyfast_ppo.bench.harness import first_line
from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves
from pyfast_ppo.bench.stock import COEFFICIENTS, MiniBatch, stock_gae
from pyfast_ppo.versions import installed

if TYPE_CHECKING:
    from pyfast_ppo.bench.gae import Rollout

MODULES = ("skrl", "rl_games", "torchrl", "stable_baselines3")
PACKAGES = {"skrl": "skrl", "rl_games": "rl-games", "torchrl": "torchrl", "stable_baselines3": "stable-baselines3"}


class Found(NamedTuple):
    """By a library's name: ``call(i)`` on input set i; in what its formula differs; and why a library is left out."""

    calls: dict[str, Callable[[int], object]]
    notes: dict[str, str]
    skipped: dict[str, str]


def losses(batches: Sequence[MiniBatch]) -> Found:
    """A call computes the loss and its gradients."""

    def make(library: ModuleType) -> Callable[[int], object]:
        check_loss(library, batches[0])
        prepared = [library.make_loss(batch, clip_value=True) for batch in batches]
        return lambda i: prepared[i % len(prepared)].gradients()

    return _found(MODULES, make)


def gaes(rollouts: Sequence[Rollout]) -> Found:
    """A call computes normalised advantages, and returns. Not of Stable-Baselines3, which does it in NumPy."""

    def make(library: ModuleType) -> Callable[[int], object]:
        prepared = [library.make_gae(rollout) for rollout in rollouts]
        for theirs, stock in zip(prepared[0](), stock_gae(*rollouts[0]), strict=True):
            torch.testing.assert_close(theirs.view_as(stock), stock, rtol=1e-4, atol=1e-4)
        return lambda i: prepared[i % len(prepared)]()

    return _found(MODULES[:3], make)


def _found(modules: Sequence[str], make: Callable[[ModuleType], Callable[[int], object]]) -> Found:
    found = Found({}, {}, {})
    for name in modules:
        if installed(PACKAGES[name]) is None:
            found.skipped[name] = f"not installed; pip install {PACKAGES[name]}"
            continue
        try:
            library = importlib.import_module(f"pyfast_ppo.bench.rivals.{name}")
            found.calls[library.NAME] = make(library)
            found.notes[library.NAME] = library.NOTE
        except Exception as error:  # another version of the library: the rest is measured all the same
            found.skipped[name] = first_line(error)
    return found


def check_loss(library: ModuleType, batch: MiniBatch) -> None:
    """Loss and gradients are ours, where the formula is.

    Raises:
        AssertionError: They are not.
    """
    for clip_value in (False, True) if library.CLIPS_VALUES_ALIKE else (False,):
        rival: LossAndLeaves = library.make_loss(batch, clip_value=clip_value)
        loss, grads = rival.gradients()
        out, ours = pyfast_ppo.ppo_loss_and_grad(*batch, **COEFFICIENTS, use_clipped_value_loss=clip_value)
        if rival.std_is_logarithm:
            ours = (ours[0], ours[1] * batch.std.detach(), ours[2])
        torch.testing.assert_close(loss.detach(), out.loss, rtol=1e-4, atol=1e-5)
        for name, theirs, grad in zip(("mean", "std", "values"), grads, ours, strict=True):
            error = (theirs.view_as(grad) - grad).norm() / grad.norm()
            assert error < 1e-4, f"its gradient of {name} differs from ours by {error:.1e}"
