"""On a GPU: an update waits for the device once, when its metrics are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pyfast_ppo.rsl_rl.metrics import Run

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
    read = Run.read
    reads = []

    def may_wait(update: Run, counts: dict) -> dict:
        reads.append(1)
        torch.cuda.set_sync_debug_mode("default")
        return read(update, counts)

    monkeypatch.setattr(Run, "read", may_wait)
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


@ON_GPU
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_rollout_never_waits(cuda_graph: bool, new_run: Callable, default_sync_mode: None) -> None:
    """Acting, recording and returns, of an algorithm that has warmed up; the environment is left out."""
    run = new_run(FUSED, device="cuda", args={"cuda_graph": cuda_graph}).learn(4)
    alg, env = run.alg, run.env
    obs = env.get_observations()
    with torch.inference_mode():
        for _ in range(alg.storage.num_transitions_per_env):
            torch.cuda.set_sync_debug_mode("error")
            actions = alg.act(obs)
            torch.cuda.set_sync_debug_mode("default")
            obs, rewards, dones, extras = env.step(actions)
            torch.cuda.set_sync_debug_mode("error")
            alg.process_env_step(obs, rewards, dones, extras)
        alg.compute_returns(obs)
    torch.cuda.set_sync_debug_mode("default")
