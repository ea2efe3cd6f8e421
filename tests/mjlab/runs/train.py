"""Train a task: mjlab's wrapper with rsl_rl's PPO, or ours with FusedPPO; mjlab's runner in either case."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import CARTPOLE, RslRlVecEnvWrapper, StockWrapper, make_env, report
from mjlab.envs import ManagerBasedRlEnvCfg
from mjlab.rl import MjlabOnPolicyRunner
from mjlab.tasks.registry import load_rl_cfg, load_runner_cls

from pyfast_ppo.mjlab import make

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"


def learn(runner: MjlabOnPolicyRunner, iterations: int) -> list[float]:
    """Learn; returns the mean reward per second of each iteration."""
    env, rewards = runner.env, []
    step, per_iteration = env.step, runner.cfg["num_steps_per_env"]

    def recorded_step(actions: torch.Tensor) -> tuple:
        result = step(actions)
        rewards.append(result[1].mean().item() / env.unwrapped.step_dt)
        return result

    env.step = recorded_step
    with contextlib.redirect_stdout(io.StringIO()):
        runner.learn(iterations, init_at_random_ep_len=True)
    return torch.tensor(rewards).view(iterations, per_iteration).mean(1).tolist()


def cartpole(kind: str, iterations: int) -> dict[str, Any]:
    """Balancing in episodes of 2.5 seconds, so that many end; small batches and many steps of the optimizer."""

    def short(cfg: ManagerBasedRlEnvCfg) -> None:
        cfg.episode_length_s = 2.5
        cfg.seed = 1

    wrapper, algorithm = {"stock": (StockWrapper, "PPO"), "ours": (RslRlVecEnvWrapper, FUSED)}[kind]
    agent = load_rl_cfg(CARTPOLE)
    agent.algorithm.class_name = algorithm
    agent.algorithm.num_mini_batches = 8
    agent.num_steps_per_env = 16
    agent.logger = "tensorboard"
    env = wrapper(make_env(num_envs=256, edit=short), clip_actions=agent.clip_actions)
    with contextlib.redirect_stdout(io.StringIO()):
        runner = MjlabOnPolicyRunner(env, asdict(agent), None, "cpu")
    return {"rewards": learn(runner, iterations), "algorithm": type(runner.alg).__name__}


def registered(task: str, iterations: int) -> dict[str, Any]:
    """Any task, as ``make`` has it, with the runner that mjlab registers for it, which also saves a checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        env, config = make(task, 16, "cpu", 1)
        config["algorithm"]["class_name"] = FUSED
        config["logger"] = "tensorboard"
        runner = load_runner_cls(task)(env, config, folder, "cpu")
        rewards = learn(runner, iterations)
        files = sorted(path.name for path in Path(folder).iterdir() if path.suffix in (".pt", ".onnx"))
    finite = all(bool(parameter.isfinite().all()) for parameter in runner.alg.actor.parameters())
    return {
        "rewards": rewards,
        "algorithm": type(runner.alg).__name__,
        "finite": finite and all(map(math.isfinite, rewards)),
        "files": [name for name in files if name.endswith(".pt")],
        "exported": any(name.endswith(".onnx") for name in files),
    }


def main() -> None:
    """``train.py stock|ours|TASK ITERATIONS``."""
    what, iterations = sys.argv[1], int(sys.argv[2])
    start = time.perf_counter()
    result = cartpole(what, iterations) if what in ("stock", "ours") else registered(what, iterations)
    report(result | {"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    main()
