"""On a GPU: an update waits for the device once, when its metrics are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: operators are counted in test_fused_ppo.py")
EXTRAS = [{}, {"kl_rule": "proportional"}, {"early_stop_kl": 0.02}, {"kl_coef": 0.1, "kl_target": 0.01}]


@pytest.fixture
def default_sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@pytest.mark.parametrize("extra", EXTRAS, ids=["rsl_rl", "proportional", "early_stop", "penalty"])
def test_nothing_waits_before_the_metrics_are_read(
    extra: dict, new_run: Callable, default_sync_mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(FUSED, device="cuda", args={"schedule": "adaptive", **extra}).rollout()
    run.alg.update()  # compiles and allocates
    run.rollout()
    read = run.alg._loss_dict
    reads = []

    def may_wait(*args: object) -> dict:
        reads.append(1)
        torch.cuda.set_sync_debug_mode("default")
        return read(*args)

    monkeypatch.setattr(run.alg, "_loss_dict", may_wait)
    torch.cuda.set_sync_debug_mode("error")
    losses = run.alg.update()
    assert reads == [1]
    assert losses["learning_rate_min"] <= losses["learning_rate_max"]


@ON_GPU
def test_the_test_can_fail(new_run: Callable, default_sync_mode: None) -> None:
    """PPO reads its losses in each mini-batch."""
    run = new_run("PPO", device="cuda", args={"schedule": "adaptive"}).rollout()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        run.alg.update()
