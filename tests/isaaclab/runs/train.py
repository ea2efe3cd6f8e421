"""Train the direct Cartpole with an unmodified runner and the task's own agent config, stock or ours."""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version

import torch
from cartpole import make_env, report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", default="PPO")
    parser.add_argument("--wrapper", choices=("stock", "ours"), required=True)
    parser.add_argument("--num-envs", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    args = parser.parse_args()

    from isaaclab.utils import to_dict
    from isaaclab_rl.rsl_rl import handle_deprecated_rsl_rl_cfg
    from isaaclab_tasks.core.cartpole.agents.rsl_rl_ppo_cfg import CartpoleDirectPPORunnerCfg
    from rsl_rl.runners import OnPolicyRunner

    if args.wrapper == "ours":
        from pyfast_ppo.isaaclab import RslRlVecEnvWrapper
    else:
        from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper

    agent = handle_deprecated_rsl_rl_cfg(CartpoleDirectPPORunnerCfg(), version("rsl-rl-lib"))
    agent.device = "cpu"
    agent.algorithm.class_name = args.algorithm
    env = RslRlVecEnvWrapper(make_env("direct", args.num_envs), clip_actions=agent.clip_actions)
    torch.manual_seed(agent.seed)
    runner = OnPolicyRunner(env, to_dict(agent), log_dir=None, device="cpu")

    step_rewards: list[float] = []
    step = env.step

    def recorded_step(actions: torch.Tensor) -> tuple:
        result = step(actions)
        step_rewards.append(result[1].mean().item())
        return result

    env.step = recorded_step
    start = time.perf_counter()
    runner.learn(args.iterations, init_at_random_ep_len=True)
    seconds = time.perf_counter() - start
    per_iteration = torch.tensor(step_rewards).view(args.iterations, -1).mean(1) * env.max_episode_length
    report({"rewards": per_iteration.tolist(), "algorithm": type(runner.alg).__name__, "seconds": seconds})


if __name__ == "__main__":
    main()
