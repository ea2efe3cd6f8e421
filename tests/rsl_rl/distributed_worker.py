"""One of two processes of ``test_distributed.py``: trains with PPO and with FusedPPO and saves what they leave.

Called as ``distributed_worker.py RANK FOLDER``. rsl_rl's runner asks for CUDA devices, so its loop is written out here.
"""

from __future__ import annotations

import contextlib
import io
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import FUSED, PointEnv, make_config, rate_of, roll_out, state_of
from graph_on_cpu import use_graphs_on_cpu
from rsl_rl.algorithms import PPO

from pyfast_ppo.rsl_rl import FusedPPO
from pyfast_ppo.rsl_rl.policy import NORMALIZES_IN_UPDATE

WORLD_SIZE = 2
ITERATIONS = 8
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}


def train(
    algorithm: str, rank: int, nudge: float = 0.0, rate_of_first_rank: float | None = None, **args: object
) -> dict:
    torch.manual_seed(10 + rank)  # each process has networks, actions and an environment of its own
    env = PointEnv(num_envs=16, seed=rank)
    cfg = make_config(algorithm, args={"schedule": "adaptive", "rnd_cfg": dict(RND), **args})
    cfg["multi_gpu"] = {"global_rank": rank, "local_rank": rank, "world_size": WORLD_SIZE}
    algorithm_class = FusedPPO if algorithm == FUSED else PPO
    with contextlib.redirect_stdout(io.StringIO()):
        alg = algorithm_class.construct_algorithm(env.get_observations(), env, cfg, "cpu")
    before = state_of(alg)
    with torch.no_grad():
        for p in alg.actor.parameters():
            p.mul_(1.0 + nudge)
    alg.broadcast_parameters()
    rates, losses = [], []
    alg.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(rate_of(optimizer)))
    for iteration in range(ITERATIONS):
        if rank == 0 and iteration == ITERATIONS // 2 and rate_of_first_rank is not None:
            alg.learning_rate = rate_of_first_rank
        roll_out(alg, env)
        losses.append(alg.update())
    trained = {"before": before, "state": state_of(alg), "rates": rates, "losses": losses}
    if args.get("cuda_graph"):
        trained["records"] = [captured.num_records for captured in (alg._captured_rollout, alg._captured)]
        trained["steps"] = alg.storage.num_transitions_per_env
    return trained


def make(rank: int, num_envs: int, multi_gpu: dict | None, args: dict) -> FusedPPO:
    # before 5.5 normalizers follow the environment, which the half does not step
    model = {"obs_normalization": NORMALIZES_IN_UPDATE}
    cfg = make_config(FUSED, args=dict(args), actor=dict(model), critic=dict(model))
    cfg["multi_gpu"] = multi_gpu
    env = PointEnv(num_envs=num_envs, seed=rank)
    with contextlib.redirect_stdout(io.StringIO()):
        return FusedPPO.construct_algorithm(env.get_observations(), env, cfg, "cpu")


def halves_and_whole(rank: int, **args: object) -> dict:
    """One algorithm sees all environments, another this process's half of the same rollouts."""
    torch.manual_seed(3)  # the same in each process
    args = {"schedule": "adaptive", "num_mini_batches": 1, "num_learning_epochs": 4, **args}
    whole = make(0, 32, None, args)
    half = make(0, 16, {"global_rank": rank, "local_rank": rank, "world_size": WORLD_SIZE}, args)
    half.load(whole.save(), None, True)
    env, mine = PointEnv(num_envs=32, seed=0), slice(16 * rank, 16 * rank + 16)
    for _ in range(4):
        for alg in (whole, half):
            alg.train_mode()
        with torch.inference_mode():
            obs = env.get_observations()
            for _ in range(whole.storage.num_transitions_per_env):
                obs, rewards, dones, extras = env.step(whole.act(obs))
                whole.process_env_step(obs, rewards, dones, extras)
            ours, theirs = half.storage, whole.storage
            for name in ("observations", "actions", "values", "rewards", "dones", "actions_log_prob"):
                getattr(ours, name).copy_(getattr(theirs, name)[:, mine])
            ours.distribution_params = tuple(p[:, mine].clone() for p in theirs.distribution_params)
            ours.step = theirs.step
            whole.compute_returns(obs)
            half.compute_returns(obs[mine])
        whole.update()
        half.update()
    return {"whole": state_of(whole), "half": state_of(half), "rates": (whole.learning_rate, half.learning_rate)}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=120),
    )
    results = {
        "halves": halves_and_whole(rank, global_advantage_statistics=True),
        "halves, per mini-batch": halves_and_whole(
            rank, global_advantage_statistics=True, normalize_advantage_per_mini_batch=True
        ),
        "halves, statistics of their own": halves_and_whole(rank),
        "stock": train("PPO", rank),
        "nudged": train("PPO", rank, nudge=2**-23),
        "fused": train(FUSED, rank, keep_random_stream=True),
        "default": train(FUSED, rank),
        "another rate in the first": train(FUSED, rank, rate_of_first_rank=1e-4),
        "proportional": train(FUSED, rank, kl_rule="proportional"),
        "rsl_rl_4": train(FUSED, rank, kl_rule="rsl_rl_4"),
        "early_stop": train(FUSED, rank, early_stop_kl=3e-3),
        "penalty": train(FUSED, rank, kl_coef=0.5, kl_target=1e-3),
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_graphs_on_cpu(monkeypatch)
        for cuda_graph in (True, False):
            args = {"backend": "eager", "global_advantage_statistics": True, "rnd_cfg": None, "early_stop_kl": 3e-3}
            results[f"cuda_graph={cuda_graph}"] = train(FUSED, rank, cuda_graph=cuda_graph, **args)
    torch.save(results, folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
