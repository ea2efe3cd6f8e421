"""What FusedPPO asks of a GPU, counted. Run by tests/imitated_gpu, where there is none."""

from __future__ import annotations

from collections.abc import Callable

import imitation
import pytest
import torch

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
NUM_MINI_BATCHES = 20
CONFIG = {
    "actor": {"hidden_dims": [128, 128, 128]},
    "critic": {"hidden_dims": [128, 128, 128]},
    "obs_groups": {"critic": ["policy"]},
}


def counted(new_run: Callable, algorithm: str, **options: object) -> dict[str, dict[str, int]]:
    """Of the last iteration of some, by method and kind."""
    args = {"schedule": "adaptive", "num_learning_epochs": 5, "num_mini_batches": 4, **options}
    run = new_run(algorithm, device="cuda", args=args, **CONFIG).learn(5)
    alg, env = run.alg, run.env
    alg.train_mode()
    found: dict[str, dict[str, int]] = {}
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(alg.storage.num_transitions_per_env):
            acted: list = []
            found["act"] = imitation.counts(lambda obs=obs, acted=acted: acted.append(alg.act(obs)))
            obs, *given = env.step(acted[0])
            found["process_env_step"] = imitation.counts(lambda obs=obs, given=given: alg.process_env_step(obs, *given))
        found["compute_returns"] = imitation.counts(lambda obs=obs: alg.compute_returns(obs))
    found["update"] = imitation.counts(alg.update)
    for name, counts in found.items():
        print(algorithm, options, name, dict(counts))
    return found


def launches(counts: dict[str, int]) -> int:
    return sum(counts.get(kind, 0) for kind in ("kernel", "copy", "fill", "graph"))


def test_without_a_graph(new_run: Callable) -> None:
    stock, fused = (counted(new_run, algorithm) for algorithm in ("PPO", FUSED))
    assert stock["update"]["wait"] > 5 * NUM_MINI_BATCHES
    assert fused["update"]["wait"] == 1
    assert "wait" not in fused["act"] | fused["process_env_step"] | fused["compute_returns"]
    assert launches(stock["update"]) > 200 * NUM_MINI_BATCHES
    assert launches(fused["update"]) < 55 * NUM_MINI_BATCHES
    assert launches(fused["act"]) < 28 < launches(stock["act"])
    assert launches(fused["process_env_step"]) < 9 < launches(stock["process_env_step"])


def test_with_graphs(new_run: Callable) -> None:
    fused = counted(new_run, FUSED, cuda_graph=True)
    assert fused["update"]["wait"] == fused["update"]["graph"] == 1
    assert launches(fused["update"]) < 30
    assert launches(fused["act"]) < 6
    assert launches(fused["compute_returns"]) < 4
    assert "malloc" not in fused["update"] | fused["act"] | fused["compute_returns"]


def test_what_waits_cannot_be_recorded() -> None:
    """The imitation refuses as a GPU does."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
