"""Sizes of Isaac Lab's tasks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Of a task, and of the MLPs that actor and critic are."""

    num_envs: int
    num_steps: int
    num_obs: int
    num_actions: int
    hidden_dims: tuple[int, ...]


SIZES = {
    "cartpole": Size(4096, 16, 4, 1, (32, 32)),
    "anymal_flat": Size(4096, 24, 48, 12, (128, 128, 128)),
    "anymal_rough": Size(4096, 24, 235, 12, (512, 256, 128)),
    "g1_rough": Size(4096, 24, 310, 37, (512, 256, 128)),
}
