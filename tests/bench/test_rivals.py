"""Other libraries: theirs is ours where the formula is the same; what is missing or odd is left out with a reason."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import pyfast_ppo
from pyfast_ppo.bench import gae, rivals
from pyfast_ppo.bench.rivals.loss_and_leaves import LossAndLeaves
from pyfast_ppo.bench.stock import make_mini_batch, stock_loss
from pyfast_ppo.versions import installed


@pytest.fixture
def batch():
    return make_mini_batch(512, 3, True, 0)


@pytest.fixture
def library(request):
    if installed(rivals.PACKAGES[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    return importlib.import_module(f"pyfast_ppo.bench.rivals.{request.param}")


every = pytest.mark.parametrize("library", rivals.MODULES, indirect=True)


@every
def test_loss_and_gradients_are_ours(library, batch, eager_compiler):
    rivals.check_loss(library, batch)
    assert library.NOTE.endswith(".")


@every
def test_clipped_value_loss_differs_only_where_it_is_said(library, batch, eager_compiler):
    loss, _ = library.make_loss(batch, clip_value=True).gradients()
    same = torch.isclose(loss.detach(), stock_loss(*batch).loss.detach(), rtol=1e-4)
    assert bool(same) == library.CLIPS_VALUES_ALIKE


def test_installed_libraries_are_called_by_their_names(batch, eager_compiler):
    calls, notes, skipped = rivals.losses([batch, batch])
    assert set(notes) == set(calls)
    assert len(calls) + len(skipped) == len(rivals.MODULES)
    assert all("not installed" in reason for reason in skipped.values())
    rollouts = [gae.make_rollout(gae.Case(5, 7), seed, "cpu") for seed in range(2)]
    gae_calls, _, gae_skipped = rivals.gaes(rollouts)
    assert set(gae_calls) == set(calls) - {"Stable-Baselines3"}
    for call in (*calls.values(), *gae_calls.values()):
        assert call(0) is not None and call(3) is not None
    assert len(gae_skipped) == 3 - len(gae_calls)


def test_missing_library_is_named_with_the_mend(batch, monkeypatch):
    monkeypatch.setattr(rivals, "installed", lambda package: None)
    calls, _, skipped = rivals.losses([batch])
    assert calls == {}
    assert skipped["stable_baselines3"] == "not installed; pip install stable-baselines3"
    assert set(skipped) == set(rivals.MODULES)


def stand_in(monkeypatch, factor: float) -> None:
    """A library whose loss is ours, times ``factor``."""

    def make_loss(batch, clip_value):
        return LossAndLeaves(lambda: factor * stock_loss(*batch).loss, batch.leaves, std_is_logarithm=False)

    monkeypatch.setattr(rivals, "MODULES", ("fake",))
    monkeypatch.setattr(rivals, "PACKAGES", {"fake": "fake"})
    monkeypatch.setattr(rivals, "installed", lambda package: "1.0")
    monkeypatch.setitem(
        sys.modules,
        "pyfast_ppo.bench.rivals.fake",
        SimpleNamespace(NAME="Fake", CLIPS_VALUES_ALIKE=True, make_loss=make_loss),
    )


def test_library_that_computes_something_else_is_not_timed(batch, monkeypatch):
    stand_in(monkeypatch, 1.01)
    calls, _, skipped = rivals.losses([batch])
    assert calls == {}
    assert skipped["fake"].startswith("AssertionError")


def test_clip_is_compared_as_the_library_says(batch, monkeypatch):
    """The stand-in always clips: with clipping off it must be found out."""
    stand_in(monkeypatch, 1.0)
    assert "fake" in rivals.losses([batch]).skipped
    ours = pyfast_ppo.ppo_loss_and_grad

    def always_clipped(*args, use_clipped_value_loss, **kwargs):
        return ours(*args, **kwargs)

    monkeypatch.setattr(pyfast_ppo, "ppo_loss_and_grad", always_clipped)
    assert list(rivals.losses([batch]).calls) == ["Fake"]
