"""What ``make`` says of tasks that there are not, or not without Isaac Sim."""

from __future__ import annotations

from cartpole import report

from pyfast_ppo.isaaclab import make


def error_of(task: str) -> str:
    try:
        make(task, num_envs=2, device="cpu", seed=1)
    except ValueError as error:
        return str(error)
    return "none"


report({"near": error_of("Isaac-Cartpole-Direkt"), "assets": error_of("Isaac-Ant-Direct")})
