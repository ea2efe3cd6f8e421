"""A pole on a cart that has to be swung up and balanced, many at once, in a few torch operations a step."""

from __future__ import annotations

import math

import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict
from torch import Tensor

_GRAVITY = 9.8  # m/s²
_CART, _POLE = 1.0, 0.1  # kg
_HALF_LENGTH = 0.5  # m, of the pole
_FORCE = 10.0  # N, at an action of 1
_TRACK = 2.5  # m to each side
_DT = 0.04  # s


class CartPoleSwingUp(VecEnv):
    """``E`` cart-poles with the equations of motion of Barto, Sutton and Anderson (1983), hanging down at first.

    Actions ``[E, 1]`` are forces in units of 10 N, clipped to ±1 where they are executed. Observations are the group
    ``"policy"`` ``[E, 5]``: position, velocity, sine and cosine of the angle, angular velocity. The reward is 1 a step
    upright in the middle of the track, and 0.1 hanging down or at its ends, so that it pays to stay on the track.
    Leaving the track terminates an episode; 250 steps (10 s) are its time limit.

    ``extras`` has what ``pyfast_ppo``'s wrappers hand out: ``"time_outs"``, ``"terminated"`` and ``"final_obs"``.
    """

    num_actions = 1
    max_episode_length = 250
    device = "cpu"

    def __init__(self, num_envs: int) -> None:
        """All environments begin anew; random numbers come from torch's default generator."""
        self.num_envs = num_envs
        self.cfg = {}
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        self._state = (
            self._hanging()
        )  # [E, 4]: position m, velocity m/s, angle from upright rad, angular velocity rad/s

    @property
    def unwrapped(self) -> CartPoleSwingUp:
        """This one."""
        return self

    def get_observations(self) -> TensorDict:
        """Return the present observations."""
        return self._observe(self._state)

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        """Step all environments by 0.04 s; those that are done begin anew."""
        x, v, angle, spin = self._state.unbind(1)
        sin, cos = angle.sin(), angle.cos()
        force = _FORCE * actions[:, 0].clamp(-1.0, 1.0)
        push = (force + _POLE * _HALF_LENGTH * spin.square() * sin) / (_CART + _POLE)
        turn = (_GRAVITY * sin - cos * push) / (_HALF_LENGTH * (4 / 3 - _POLE / (_CART + _POLE) * cos.square()))
        v = v + _DT * (push - _POLE * _HALF_LENGTH / (_CART + _POLE) * turn * cos)
        spin = spin + _DT * turn
        x, angle = x + _DT * v, angle + _DT * spin
        state = torch.stack([x, v, angle, spin], 1)

        self.episode_length_buf += 1
        terminated = x.abs() > _TRACK
        time_outs = (self.episode_length_buf >= self.max_episode_length) & ~terminated
        dones = terminated | time_outs
        rewards = 0.1 + 0.45 * (1.0 + angle.cos()) * (1.0 - (x / _TRACK).square()).clamp(min=0.0)
        self.episode_length_buf.masked_fill_(dones, 0)
        self._state = torch.where(dones[:, None], self._hanging(), state)
        extras = {"time_outs": time_outs, "terminated": terminated, "final_obs": self._observe(state)}
        return self.get_observations(), rewards, dones.long(), extras

    def _hanging(self) -> Tensor:
        state = 0.1 * torch.randn(self.num_envs, 4)
        state[:, 2] += math.pi
        return state

    def _observe(self, state: Tensor) -> TensorDict:
        x, v, angle, spin = state.unbind(1)
        obs = torch.stack([x, v, angle.sin(), angle.cos(), 0.2 * spin], 1)
        return TensorDict({"policy": obs}, batch_size=[self.num_envs])
