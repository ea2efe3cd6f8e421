"""mjlab's environments as rsl_rl ``VecEnv``: mjlab's own wrapper, corrected, and tasks made from mjlab's registry.

``E`` environments, ``A`` action dimensions. Written for mjlab 1.6. Importing it imports mjlab and starts no simulation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.vec_env import (
    Bounds,
    ClipActions,
    action_bounds,
    check_obs_groups,
    clip,
    declared_action_space,
    is_state,
    near_matches,
    put_action_space,
    without_absent_options,
)

try:
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.managers.manager_base import ManagerTermBase
    from mjlab.managers.observation_manager import ObservationManager
    from mjlab.rl import RslRlVecEnvWrapper as StockWrapper
    from mjlab.utils.buffers import CircularBuffer, DelayBuffer
    from mjlab.utils.noise import NoiseModel
    from mjlab.utils.spaces import Box, Space, batch_space
    from mjlab.utils.spaces import Dict as DictSpace
except ImportError as error:
    raise ImportError(
        f"pyfast_ppo.mjlab needs mjlab 1.6 ({error}); install it with: pip install 'mjlab>=1.6,<1.7'"
    ) from error

_Observations = Mapping[str, "Tensor | _Observations"]


class RslRlVecEnvWrapper(StockWrapper):
    """mjlab's ``RslRlVecEnvWrapper`` with exact ends of episodes and a clip that changes the executed action alone.

    It takes the place of mjlab's own, and the environment goes on as it does there: same random numbers, same
    trajectories, same log.

    **Final observations.** When an episode ends, the environment resets within the step, and the observation that
    ended the episode is never computed. Here it is, in the step, at the moment before the reset: kinematics and
    sensors are brought up to date, the commands of the rows that end move on by one step, and noise, delay and history
    are applied as to any other observation. Then all that is put back: buffers, commands and the random numbers of
    torch's default generators. A step with a reset costs one more ``sim.forward()``, one more ``sim.sense()`` and one
    more evaluation of commands and observations; other steps cost nothing. ``final_obs=False`` does without.

    What is put back are the attributes of command terms, of class-based observation terms and of noise models: plain
    ones, tensors, mjlab's buffers, and these in dicts and lists. A term that changes other objects while it is
    evaluated (its own random generator, a file, a tensor of more than 2**20 elements without a dimension of size E,
    which is taken for data) sees one evaluation more. A curriculum term has already acted when the final observation is
    computed.

    Observations are a :class:`TensorDict` with batch size ``[E]``, as in mjlab.

    Attributes:
        action_bounds: (low, high), float32 ``[A]`` each: the range of the executed action; None without a clip.
    """

    action_bounds: Bounds | None

    def __init__(
        self,
        env: ManagerBasedRlEnv,
        clip_actions: ClipActions = None,
        obs_groups: Mapping[str, Iterable[str]] | None = None,
        *,
        final_obs: bool = True,
    ) -> None:
        """Wrap the environment and reset it once, as mjlab's wrapper does.

        Args:
            env: mjlab's environment, also inside a ``VideoRecorder``.
            clip_actions: Range of the executed action. None: no clip. A number c: [-c, c]. A pair (low, high), each a
                number or one per joint. A tighter action space of the environment stays in force. The action that the
                algorithm stores is left as it is.
            obs_groups: ``obs_groups`` of the runner config, to be checked against the groups that there are.
            final_obs: Publish ``extras["final_obs"]``.

        Raises:
            TypeError: The action space is not a float Box, or an argument has the wrong type.
            ValueError: ``clip_actions`` or ``obs_groups`` does not fit, or ``env`` does not reset by itself.
            RuntimeError: This version of mjlab resets in a way that final observations cannot be computed in.
        """
        if not env.unwrapped.cfg.auto_reset:
            raise ValueError(
                "env has cfg.auto_reset=False, but rsl_rl's runners never reset a row themselves; set it to True:"
                ' final observations come as extras["final_obs"].'
            )
        self._publishes_final_obs = final_obs
        resets: list[Tensor] = []
        with _before_reset(env.unwrapped, resets.append):
            super().__init__(env, clip_actions)
        if final_obs and not resets:
            raise RuntimeError(
                "this version of mjlab does not reset through env.sim.reset(), so that final observations cannot be"
                " computed; use mjlab 1.6, or final_obs=False."
            )
        obs = self.get_observations()
        if obs_groups is not None:
            check_obs_groups(obs_groups, obs)
        self._observation_space = _matching_space(obs, self.env.observation_space)

    @property
    def observation_space(self) -> DictSpace:
        """The groups as they are returned, each ``[E, ...]``."""
        return self._observation_space

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict[str, Any]]:
        """Step all environments; those that end start anew.

        Args:
            actions: ``[E, A]``, unclipped. They are not written to.

        Returns:
            - observations, groups ``[E, ...]``; of the new episode where one has ended
            - rewards, float32 ``[E]``
            - dones, int64 ``[E]``: 1 where the episode has ended, for any reason
            - extras, a new dict each time, with new tensors: ``"terminated"`` bool ``[E]``, ended by the task;
              ``"time_outs"`` bool ``[E]``, cut off and not terminated in the same step; ``"log"``, mjlab's; and, in
              steps with a reset only, ``"final_obs"``: the observations before the reset in the rows that are done,
              the returned ones elsewhere. What a diverged simulation leaves is handed out as it is, NaN included:
              FusedPPO does not bootstrap from it.

        A task with ``cfg.is_finite_horizon`` has no ``"time_outs"``, as in mjlab: nothing follows the end of its time.
        """
        executed = actions if self.action_bounds is None else clip(actions, self.action_bounds)
        frames: list[tuple[Tensor, TensorDict]] = []

        def keep_final_frame(rows: Tensor) -> None:
            frames.append((rows, self._final_frame(rows)))

        if self._publishes_final_obs:
            with _before_reset(self.unwrapped, keep_final_frame):
                groups, rewards, terminated, truncated, env_extras = self.env.step(executed)
        else:
            groups, rewards, terminated, truncated, env_extras = self.env.step(executed)

        obs = TensorDict(groups, batch_size=[self.num_envs])
        extras = dict(env_extras)
        extras["terminated"] = terminated.clone()  # mjlab writes to its own again
        if not self.cfg.is_finite_horizon:
            extras["time_outs"] = truncated & ~terminated
        if frames:
            final = obs.clone()
            for rows, frame in frames:
                final[rows] = frame[rows]
            extras["final_obs"] = final
        return obs, rewards.clone(), (terminated | truncated).to(torch.long), extras

    def _modify_action_space(self) -> None:
        """Cut the declared action space to the clip; mjlab's wrapper calls this and would overwrite the space."""
        cut = declared = declared_action_space(self.unwrapped)
        self.action_bounds = action_bounds(declared, self.clip_actions, self.device)
        if self.action_bounds is not None:
            low = _tighter(max, self.action_bounds[0], declared.low)
            high = _tighter(min, self.action_bounds[1], declared.high)
            cut = Box(shape=declared.shape, dtype=declared.dtype, low=low, high=high)
        put_action_space(self.unwrapped, declared, cut, batch_space)

    def _final_frame(self, rows: Tensor) -> TensorDict:
        """What the environment would return if it did not reset ``rows``: true in these rows, groups ``[E, ...]``."""
        env = self.unwrapped
        observations = env.observation_manager
        commands = [env.command_manager.get_term(name) for name in env.command_manager.active_terms]
        observations._obs_buffer = None  # what the last step returned, not to be written to; the reset forgets it, too
        terms = [observations, *_observation_terms(observations), *commands]
        with _put_back(terms, self.num_envs), _random_numbers_kept(self.device):
            for group in observations.active_terms:
                # rows that end because they are not finite would be an error under one of mjlab's policies
                observations.cfg[group].nan_policy = "disabled"
            for sensor in env.scene.sensors.values():
                sensor._invalidate_cache()  # as the reset does before the observations of this step
            env.sim.forward()
            env.command_manager.compute(dt=env.step_dt, env_ids=rows)
            env.sim.sense()
            return TensorDict(observations.compute(update_history=True), batch_size=[self.num_envs])


def make(task: str, num_envs: int, device: str, seed: int) -> tuple[RslRlVecEnvWrapper, dict[str, Any]]:
    """Make a task of mjlab's registry, wrapped, and the runner config that mjlab registers with it.

    Args:
        task: Its name in mjlab's registry: ``"Mjlab-Cartpole-Balance"``.
        num_envs: Number of environments, E.
        device: Where the simulation runs: ``"cuda:0"``, ``"cpu"``.
        seed: Seed of environment and runner.

    Returns:
        - the environment, with the task's clip of actions
        - the config, a new dict, for rsl_rl's ``OnPolicyRunner`` as well as for mjlab's runners

    Raises:
        ValueError: There is no such task, or it needs a motion file.
    """
    import mjlab.tasks  # noqa: F401  registers mjlab's own tasks; those of other packages are there already
    from mjlab.tasks.registry import list_tasks, load_env_cfg, load_rl_cfg

    if task not in list_tasks():
        near = near_matches(task, list_tasks())
        raise ValueError(f"mjlab has no task {task!r}{near or '; there are: ' + ', '.join(list_tasks())}.")
    env_cfg, runner_cfg = load_env_cfg(task), load_rl_cfg(task)
    for name, command in env_cfg.commands.items():
        file = getattr(command, "motion_file", None)
        if file is not None and not Path(file).is_file():
            raise ValueError(
                f"the task {task!r} needs a motion file for its command {name!r}; train it with mjlab's train script,"
                " which takes --registry-name or --env.commands.motion.motion-file, and the algorithm's class name."
            )
    env_cfg.scene.num_envs = num_envs
    env_cfg.seed = seed
    runner_cfg.seed = seed
    env = RslRlVecEnvWrapper(ManagerBasedRlEnv(env_cfg, device=device), runner_cfg.clip_actions, runner_cfg.obs_groups)
    return env, without_absent_options(asdict(runner_cfg))


@contextmanager
def _before_reset(env: ManagerBasedRlEnv, hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``hook`` with the rows that a reset concerns, before their state is gone.

    mjlab has no such hook. The simulation's reset is the first to change a row, after the curriculum, which reads the
    kinematics as the last physics step left them: before it they must not be brought up to date.
    """
    original = env.sim.reset

    def reset(env_ids: Tensor | None = None) -> None:
        hook(torch.arange(env.num_envs, device=env.device) if env_ids is None else env_ids)
        original(env_ids)

    env.sim.reset = reset
    try:
        yield
    finally:
        env.sim.reset = original


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Draw random numbers inside as if it had not been done."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _put_back(objects: Iterable[object], num_envs: int) -> Iterator[None]:
    """Afterwards the objects hold what they held: attributes, and within them tensors, dicts, lists, buffers, terms.

    Large tensors without a dimension of size E are left as they are (see ``is_state``).
    """
    tensors: list[tuple[Tensor, Tensor]] = []
    dicts: list[tuple[dict, dict]] = []
    lists: list[tuple[list, list]] = []
    seen: set[int] = set()

    def remember(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if is_state(value, num_envs):
                tensors.append((value, value.clone()))
        elif isinstance(value, dict):
            dicts.append((value, dict(value)))
            for item in value.values():
                remember(item)
        elif isinstance(value, list):
            lists.append((value, list(value)))
            for item in value:
                remember(item)
        elif isinstance(value, ManagerTermBase | NoiseModel | CircularBuffer | DelayBuffer):
            remember(vars(value))

    for root in objects:
        remember(vars(root))
    try:
        yield
    finally:
        for container, entries in dicts:
            container.clear()
            container.update(entries)
        for sequence, items in lists:
            sequence[:] = items
        with torch.inference_mode():  # allows to write to a tensor that was made in it, wherever the step is made
            for tensor, content in tensors:
                tensor.copy_(content)


def _observation_terms(observations: ObservationManager) -> list[object]:
    """What has a state of its own in the observations, beside the manager: class-based terms and groups' configs."""
    names = [(group, name) for group, terms in observations.active_terms.items() for name in terms]
    terms = [observations.get_term_cfg(group, name).func for group, name in names]
    stateful = [term for term in terms if hasattr(term, "__dict__") and not inspect.isroutine(term)]
    return [*stateful, *(observations.cfg[group] for group in observations.active_terms)]


def _tighter(choose: Callable, bounds: Tensor, declared: float | tuple[float, ...]) -> float | tuple[float, ...]:
    """One side of mjlab's ``Box``: the bounds, but where rounding to float32 has moved them out of the declared one."""
    values = [
        choose(pair) for pair in zip(bounds.tolist(), np.broadcast_to(declared, len(bounds)).tolist(), strict=True)
    ]
    return values[0] if len(set(values)) == 1 else tuple(values)


def _matching_space(obs: _Observations, declared: Space | None) -> DictSpace:
    """The space of all environments that observations as returned lie in; declared ones stay where they match."""
    known = declared.spaces if isinstance(declared, DictSpace) else {}
    spaces: dict[str, Space] = {}
    for name, group in obs.items():
        if not isinstance(group, Tensor):
            spaces[name] = _matching_space(group, known.get(name))
            continue
        shape, dtype = tuple(group.shape), str(group.dtype).removeprefix("torch.")
        space = known.get(name)
        matches = space is not None and (space.shape, space.dtype) == (shape, dtype)
        spaces[name] = space if matches else Box(shape=shape, dtype=dtype)
    return DictSpace(shape=(next(iter(spaces.values())).shape[0],), spaces=spaces)
