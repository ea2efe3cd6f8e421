"""Other libraries' PPO losses and advantage estimators, on the same tensors, where they are installed.

Each file runs a library's own code as far as it can be called; what had to be copied out of a longer method is marked
there, with the method's name and the version. Where a library's formula differs from rsl_rl's, ``NOTE`` says how.
Before anything is timed, its loss and gradients must be ours where the formulas are the same: with the value's
clipping switched off in all of them, and with it, too, where the library clips as rsl_rl does.

A library's module has ``NAME``, ``PACKAGE`` (on PyPI), ``NOTE``, ``CLIPS_VALUES_ALIKE`` and ``make_loss(batch,
clip_value)``; if it has an advantage estimator that takes tensors, ``make_gae(rollout)``, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

import pyfast_ppo
from pyfast_ppo.bench.harness import first_line
from pyfast_ppo.bench.machine import version
from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves
from pyfast_ppo.bench.stock import COEFFICIENTS, MiniBatch, stock_gae

if TYPE_CHECKING:
    from pyfast_ppo.bench.gae import Rollout

MODULES = ("skrl", "rl_games", "torchrl", "stable_baselines3")
PACKAGES = {"skrl": "skrl", "rl_games": "rl-games", "torchrl": "torchrl", "stable_baselines3": "stable-baselines3"}

Calls = dict[str, Callable[[int], object]]


def losses(batches: Sequence[MiniBatch]) -> tuple[Calls, dict[str, str]]:
    """For each library a call that computes loss and gradients of one batch; and why one is left out."""

    def make(library: ModuleType) -> Callable[[int], object]:
        check_loss(library, batches[0])
        prepared = [library.make_loss(batch, clip_value=True) for batch in batches]
        return lambda i: prepared[i % len(prepared)].gradients()

    return _calls(MODULES, make)


def gaes(rollouts: Sequence[Rollout]) -> tuple[Calls, dict[str, str]]:
    """The same for normalised advantages and returns. Stable-Baselines3 is left out: it computes them in NumPy."""

    def make(library: ModuleType) -> Callable[[int], object]:
        prepared = [library.make_gae(rollout) for rollout in rollouts]
        for theirs, stock in zip(prepared[0](), stock_gae(*rollouts[0]), strict=True):
            torch.testing.assert_close(theirs.view_as(stock), stock, rtol=1e-4, atol=1e-4)
        return lambda i: prepared[i % len(prepared)]()

    return _calls(MODULES[:3], make)


def _calls(
    modules: Sequence[str], make: Callable[[ModuleType], Callable[[int], object]]
) -> tuple[Calls, dict[str, str]]:
    calls, skipped = {}, {}
    for name in modules:
        if version(PACKAGES[name]) is None:
            skipped[name] = f"not installed; pip install {PACKAGES[name]}"
            continue
        try:
            library = importlib.import_module(f"pyfast_ppo.bench.rivals.{name}")
            calls[library.NAME] = make(library)
        except Exception as error:  # another version of the library: the rest is measured all the same
            skipped[name] = first_line(error)
    return calls, skipped


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
