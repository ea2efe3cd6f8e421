"""A runner of rsl_rl on an environment whose steps cost next to nothing, in the sizes of Isaac Lab's tasks."""

from __future__ import annotations

import contextlib
import io

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.bench.sizes import Size


class SyntheticEnv(VecEnv):
    """Random observations and rewards, the same for every contender; episodes end at random."""

    max_episode_length = 1000
    cfg: dict = {}  # noqa: RUF012, rsl_rl asks for it

    def __init__(self, size: Size, device: str) -> None:
        """Draws what the steps hand out."""
        self.num_envs, self.num_actions, self.device = size.num_envs, size.num_actions, device
        self.episode_length_buf = torch.zeros(size.num_envs, dtype=torch.long, device=device)
        g = torch.Generator().manual_seed(0)
        self._obs = torch.randn(4, size.num_envs, size.num_obs, generator=g).to(device)
        self._rewards = torch.randn(4, size.num_envs, generator=g).to(device)
        self._dones = (torch.rand(4, size.num_envs, generator=g) < 0.01).to(device)
        self._step = 0

    @property
    def unwrapped(self) -> SyntheticEnv:
        """Itself."""
        return self

    def get_observations(self) -> TensorDict:
        """One group, [E, num_obs]."""
        return TensorDict({"policy": self._obs[self._step % 4]}, batch_size=[self.num_envs], device=self.device)

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        """The rewards depend on the actions a little."""
        self._step += 1
        i = self._step % 4
        rewards = self._rewards[i] - 0.01 * actions.square().sum(-1)
        return self.get_observations(), rewards, self._dones[i].long(), {"time_outs": self._dones[i]}


def make_runner(
    size: Size, device: str, algorithm: str, compile_mode: str | None = None, **arguments: object
) -> OnPolicyRunner:
    """Isaac Lab's usual configuration, with the same networks for all. ``arguments``: more of the algorithm's."""
    model = {"class_name": "MLPModel", "hidden_dims": list(size.hidden_dims), "activation": "elu"}
    config = {
        "num_steps_per_env": size.num_steps,
        "save_interval": 10_000,
        "check_for_nan": False,
        "torch_compile_mode": compile_mode,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**model, "distribution_cfg": {"class_name": "GaussianDistribution"}},
        "critic": dict(model),
        "algorithm": {
            "class_name": algorithm,
            "num_learning_epochs": 5,
            "num_mini_batches": 4,
            "schedule": "adaptive",
            "desired_kl": 0.01,
            "rnd_cfg": None,
            "symmetry_cfg": None,
            **arguments,
        },
    }
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # rsl_rl prints its models
        return OnPolicyRunner(SyntheticEnv(size, device), config, None, device)
