"""Any continuous-action Gymnasium environment as an rsl_rl ``VecEnv``.

``E`` environments, ``A`` action dimensions (the action's shape, flattened).
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from rsl_rl.env import VecEnv
from tensordict import TensorDict

from pyfast_ppo.vec_env import Bounds, action_bounds

try:
    import gymnasium
    from gymnasium import VectorizeMode
    from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
except ImportError as error:
    raise ImportError(
        "pyfast_ppo.gymnasium needs gymnasium 1.1 or newer; install it with: pip install 'pyfast-ppo[gym]'"
    ) from error

NO_TIME_LIMIT = torch.iinfo(torch.int64).max
"""``max_episode_length`` of an environment without a time limit: an integer, because rsl_rl does arithmetic with it."""

_SAME_STEP_HINT = (
    'gymnasium.make_vec(..., vectorization_mode="sync", '
    'vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP})'
)


class NonFiniteActionError(ValueError):
    """An action is NaN, or infinite without a bound: the policy has diverged, or has seen such an observation."""


class GymnasiumVecEnv(VecEnv):
    """Step a Gymnasium environment as rsl_rl expects, and keep time-outs, terminations and final observations apart.

    Observations are a :class:`TensorDict` with batch size ``[E]`` and float32 groups. A ``Box`` observation is the
    group ``"policy"``; a ``Dict`` of boxes has one group for each key. A box is flattened to ``[E, d]``, except an
    image that is already channel-first (three dimensions, the first smaller than both others): it stays
    ``[E, C, H, W]``, as rsl_rl's CNN models want it. Values are not rescaled.

    Actions are clipped to the bounds of the action space on their way into the environment. The algorithm keeps the
    unclipped action, whose log-probability it knows. ``action_bounds`` is what an exported policy must clip to:
    ``pyfast_ppo.rsl_rl.export`` does.

    Environments reset within the step that ends their episode (autoreset mode ``SAME_STEP``), so no step is lost, and
    the observation before the reset is handed out as ``extras["final_obs"]``. It is copied before the reset, except in
    a ``VectorEnv`` of your own and in an ``AsyncVectorEnv`` that you pass in: there, no environment may write into an
    observation that it has returned. Gymnasium's vector wrappers of observations refuse that mode; give
    ``wrappers=[...]``, which wrap each environment, with an id.

    ``episode_length_buf`` counts the steps of the running episodes, ``[E]``. Gymnasium's time limit lives inside the
    environment and cannot be moved from outside: writing to the buffer (rsl_rl's ``init_at_random_ep_len``) changes
    the count, not the moment of the time-out. ``max_episode_length`` is the limit that the task is registered or made
    with (``max_episode_steps``). A ``TimeLimit`` among ``wrappers`` is found, too, but not in the processes of an
    ``AsyncVectorEnv``; its time-outs are time-outs all the same.

    Attributes:
        action_bounds: (low, high), float32 ``[A]`` each: the range of the executed action; None if none is bounded.
    """

    num_envs: int
    num_actions: int
    action_bounds: Bounds | None
    max_episode_length: int
    episode_length_buf: torch.Tensor
    device: torch.device
    cfg: dict[str, Any]

    def __init__(
        self,
        env: str | Callable[..., gymnasium.Env] | VectorEnv,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        **make_kwargs: Any,
    ) -> None:
        """Make the environments and reset them once.

        Where this raises, environments that were made here are closed; a ``VectorEnv`` of the caller's is not.

        Args:
            env: An id (``"InvertedPendulum-v5"``), a callable that makes one environment, or a ``VectorEnv`` whose
                autoreset mode is ``SAME_STEP``. The environments of a ``SyncVectorEnv`` are wrapped in place.
            num_envs: Number of environments, E. A ``VectorEnv`` knows its own; leave 1 then.
            device: Where the returned tensors live.
            seed: Seed of the first reset; environment ``i`` gets ``seed + i``. None: not reproducible.
            **make_kwargs: For ``gymnasium.make_vec`` (id) or the callable.

        Raises:
            ValueError: The action or observation space, the autoreset mode or ``num_envs`` does not fit.
            TypeError: ``env`` is none of the three, or ``make_kwargs`` came with a ``VectorEnv``.
        """
        self.env = _make_vector_env(env, num_envs, make_kwargs)
        with contextlib.ExitStack() as on_error:
            if self.env is not env:
                on_error.callback(self.env.close)
            self._check_autoreset_mode()
            self._action_space = _checked_action_space(self.env.single_action_space)
            self._group_shapes = _group_shapes(self.env.single_observation_space)
            self.num_envs = self.env.num_envs
            self.num_actions = int(np.prod(self._action_space.shape))
            time_limit = _time_limit(self.env)
            self.max_episode_length = NO_TIME_LIMIT if time_limit is None else time_limit
            self.device = torch.device(device)
            self.action_bounds = _action_bounds(self._action_space, self.device)
            self.cfg = {
                "env": env if isinstance(env, str) else str(self.env),
                "num_envs": self.num_envs,
                "seed": seed,
                "max_episode_steps": time_limit,
                "observation_space": str(self.env.single_observation_space),
                "action_space": str(self.env.single_action_space),
                "make_kwargs": {key: str(value) for key, value in make_kwargs.items()},
            }
            self.reset(seed=seed)
            on_error.pop_all()

    @property
    def unwrapped(self) -> GymnasiumVecEnv:
        """The environment rsl_rl's extensions look at: this one."""
        return self

    @property
    def step_dt(self) -> float:
        """Factor by which rsl_rl's RND scales its reward: 1, for Gymnasium's rewards are per step, not per second."""
        return 1.0

    def reset(self, seed: int | None = None) -> tuple[TensorDict, dict]:
        """Reset all environments; returns the observations (groups ``[E, ...]``) and empty extras."""
        obs, _ = self.env.reset(seed=None if seed is None else operator.index(seed))  # NumPy's integers, too
        self._obs = self._to_tensordict(obs)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)  # [E]
        return self.get_observations(), {}

    def get_observations(self) -> TensorDict:
        """Return a copy of the present observations, groups ``[E, ...]``."""
        return self._obs.clone()

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        """Step all environments. Every returned tensor is new and never written to again.

        Args:
            actions: ``[E, A]``, unclipped.

        Returns:
            - observations, groups ``[E, ...]``; of the new episode where an episode has ended
            - rewards, float32 ``[E]``
            - dones, int64 ``[E]``: 1 where the episode has ended, for any reason
            - extras: ``"time_outs"`` bool ``[E]``, cut off by the time limit and not terminated by the same step;
              ``"terminated"`` bool ``[E]``; ``"final_obs"``, the observations before the reset: they differ from the
              returned ones only in rows that are done. NaN and infinite numbers are handed out as they are.

        Raises:
            ValueError: Wrong shape of the actions.
            NonFiniteActionError: An action is NaN, or infinite where its bound is infinite.
            RuntimeError: An episode ended without its final observation.
        """
        obs, rewards, terminated, truncated, infos = self.env.step(self._to_env_actions(actions))
        done = terminated | truncated  # [E]

        self._obs = self._to_tensordict(obs)
        dones = self._to_tensor(done, torch.long)
        self.episode_length_buf = torch.where(dones == 1, 0, self.episode_length_buf + 1)
        extras = {
            "time_outs": self._to_tensor(truncated & ~terminated, torch.bool),
            "terminated": self._to_tensor(terminated, torch.bool),
            "final_obs": self._final_observations(done, infos),
        }
        rewards = np.reshape(rewards, self.num_envs)  # [E, 1] of an AsyncVectorEnv whose rewards are arrays
        return self.get_observations(), self._to_tensor(rewards, torch.float32), dones, extras

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def _to_env_actions(self, actions: torch.Tensor) -> np.ndarray:
        """Check, clip and reshape: ``[E, A]`` to ``[E, *action shape]``."""
        if actions.shape != (self.num_envs, self.num_actions):
            raise ValueError(
                f"actions must have the shape {(self.num_envs, self.num_actions)} (environments, action dimensions),"
                f" but have {tuple(actions.shape)}."
            )
        space = self._action_space
        raw = actions.detach().to(device="cpu", dtype=torch.float64).numpy()
        clipped = np.clip(raw.reshape(self.num_envs, *space.shape), space.low, space.high).astype(space.dtype)
        if not np.isfinite(clipped).all():
            rows = np.flatnonzero(~np.isfinite(clipped.reshape(self.num_envs, -1)).all(axis=1))
            raise NonFiniteActionError(
                f"actions are NaN or infinite in {len(rows)} of {self.num_envs} environments (the first is number"
                f" {rows[0]}): {self._cause_of_non_finite_actions()}"
            )
        return clipped

    def _cause_of_non_finite_actions(self) -> str:
        for name, values in self._obs.items():
            rows = (~torch.isfinite(values.flatten(1)).all(dim=1)).nonzero()
            if len(rows):
                return (
                    f"the observation {name!r} of environment {int(rows[0])}, which the policy has seen, is NaN or"
                    " infinite; let the environment end such an episode as terminated, or clip the observation."
                )
        return "the policy has diverged; lower the learning rate or desired_kl, or normalise the observations."

    def _to_tensor(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        # torch.tensor copies; from_numpy would alias a buffer that some vector environments write to again
        return torch.tensor(array, dtype=dtype, device=self.device)

    def _to_tensordict(self, obs: np.ndarray | dict[str, np.ndarray]) -> TensorDict:
        arrays = obs if isinstance(obs, dict) else {"policy": obs}
        groups = {
            name: self._to_tensor(arrays[name], torch.float32).reshape(self.num_envs, *shape)
            for name, shape in self._group_shapes.items()
        }
        return TensorDict(groups, batch_size=[self.num_envs], device=self.device)

    def _final_observations(self, done: np.ndarray, infos: dict) -> TensorDict:
        """The present observations, with the rows that are done replaced by those before the reset."""
        final = self._obs.clone()
        rows = np.flatnonzero(done)
        if len(rows) == 0:
            return final
        if not isinstance(infos, Mapping):
            raise RuntimeError(
                f"{self.env} returns infos that are a {type(infos).__name__}, without final_obs as autoreset mode"
                " SAME_STEP has it; leave out the wrapper that turns infos into lists (DictInfoToList)."
            )
        if "final_obs" not in infos:
            raise RuntimeError(
                f"{self.env} ended an episode without info['final_obs'], which autoreset mode SAME_STEP promises."
            )
        before_reset = infos["final_obs"]
        rows_on_device = torch.from_numpy(rows).to(self.device)
        for name, shape in self._group_shapes.items():
            if isinstance(before_reset, Mapping):  # a VectorEnv that keeps each group as one array
                values = np.asarray(before_reset[name])[rows]
            else:
                observations = (before_reset[row] for row in rows)
                values = np.stack([obs[name] if isinstance(obs, dict) else obs for obs in observations])
            final[name][rows_on_device] = self._to_tensor(values, torch.float32).reshape(len(rows), *shape)
        return final

    def _check_autoreset_mode(self) -> None:
        mode = self.env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the VectorEnv has autoreset mode {getattr(mode, 'name', mode)}, which loses the final observation or"
                f" spends a step on the reset; SAME_STEP is needed: {_SAME_STEP_HINT}. Vector wrappers that refuse it"
                " have a counterpart in gymnasium.wrappers for make_vec(..., wrappers=[...])."
            )


class _ForVectorEnv(gymnasium.Wrapper):
    """Mends what vector environments take as it is.

    Some environments' ``reset`` writes into the array that ``step`` has returned as the episode's last observation;
    some rewards are arrays of one number.
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            obs = copy.deepcopy(obs)
        reward = reward.item() if isinstance(reward, np.ndarray) else reward
        return obs, reward, terminated, truncated, info


def _make_vector_env(env: str | Callable | VectorEnv, num_envs: int, make_kwargs: dict[str, Any]) -> VectorEnv:
    """Bring the three kinds of ``env`` to one."""
    if isinstance(env, VectorEnv):
        if make_kwargs:
            raise TypeError(f"a VectorEnv is already made; these arguments have no use: {', '.join(make_kwargs)}.")
        if num_envs not in (1, env.num_envs):
            raise ValueError(f"num_envs={num_envs}, but the VectorEnv has {env.num_envs} environments.")
        if isinstance(inner := env.unwrapped, SyncVectorEnv):
            inner.envs = [_ForVectorEnv(sub_env) for sub_env in inner.envs]
        return env
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, but is {num_envs}.")
    if isinstance(env, str):
        kwargs = {"vectorization_mode": "sync", **make_kwargs}
        if kwargs["vectorization_mode"] in ("vector_entry_point", VectorizeMode.VECTOR_ENTRY_POINT):
            raise ValueError(
                'vectorization_mode="vector_entry_point" makes the VectorEnv that the task brings along, which is told'
                f' neither an autoreset mode nor wrappers; use "sync" or "async", or pass gymnasium.make_vec({env!r},'
                " ...) itself, if its autoreset mode is SAME_STEP."
            )
        kwargs["vector_kwargs"] = {"autoreset_mode": AutoresetMode.SAME_STEP, **kwargs.get("vector_kwargs", {})}
        kwargs["wrappers"] = [*kwargs.get("wrappers", ()), _ForVectorEnv]
        return gymnasium.make_vec(env, num_envs=num_envs, **kwargs)
    if isinstance(env, gymnasium.Env) or not callable(env):
        raise TypeError(
            f"env must be an id, a callable that makes one environment, or a VectorEnv, but is {type(env).__name__}."
        )

    def make_one() -> gymnasium.Env:
        made = env(**make_kwargs)
        if not isinstance(made, gymnasium.Env):
            raise TypeError(f"the callable must return a gymnasium.Env, but returned {type(made).__name__}.")
        return _ForVectorEnv(made)

    return SyncVectorEnv([make_one] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def _checked_action_space(space: gymnasium.Space) -> gymnasium.spaces.Box:
    if not isinstance(space, gymnasium.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"the action space is {space}, but rsl_rl's PPO acts with real numbers: a Box with a float dtype is needed."
        )
    if 0 in space.shape:
        raise ValueError(f"the action space is {space}, which has no dimension to act in.")
    return space


def _action_bounds(space: gymnasium.spaces.Box, device: torch.device) -> Bounds | None:
    is_bounded = np.isfinite(space.low).any() or np.isfinite(space.high).any()
    return action_bounds(space, math.inf, device) if is_bounded else None


def _group_shapes(space: gymnasium.Space) -> dict[str, tuple[int, ...]]:
    """Shape of each observation group without the leading E."""
    spaces = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {"policy": space}
    shapes = {}
    for name, subspace in spaces.items():
        if not isinstance(name, str):
            raise ValueError(
                f"the observation {name!r} has a key of type {type(name).__name__}, but the groups of rsl_rl's"
                " observations are called by strings; rename it in a gymnasium.ObservationWrapper."
            )
        if not isinstance(subspace, gymnasium.spaces.Box):
            raise ValueError(
                f"the observation {name!r} has the space {subspace}, but only a Box or a flat Dict of boxes can be"
                " turned into tensors; wrap the environment in gymnasium.wrappers.FlattenObservation."
            )
        shapes[name] = _group_shape(subspace.shape)
    return shapes


def _group_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    is_channel_first_image = len(shape) == 3 and shape[0] < min(shape[1:])
    return shape if is_channel_first_image else (int(np.prod(shape)),)


def _time_limit(env: VectorEnv) -> int | None:
    """Steps after which an episode is cut off; None where that is unknown or never."""
    limit = _declared_time_limit(env)
    return None if limit is None or limit <= 0 else limit  # -1 switches it off


def _declared_time_limit(env: VectorEnv) -> int | None:
    if isinstance(env.unwrapped, SyncVectorEnv):
        # An environment that was never registered has a limit only in its wrapper
        sub_env, limits = env.unwrapped.envs[0], []
        while isinstance(sub_env, gymnasium.Wrapper):
            if isinstance(sub_env, gymnasium.wrappers.TimeLimit):
                limits.append(sub_env._max_episode_steps)
            sub_env = sub_env.env
        if limits:
            return min(limits)
    if env.spec is None:
        return None
    return env.spec.kwargs.get("max_episode_steps", env.spec.max_episode_steps)
