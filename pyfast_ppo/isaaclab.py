"""Isaac Lab's ``RslRlVecEnvWrapper`` with exact time-outs, final observations, action bounds and observation spaces.

Importing this starts no simulator. ``E`` environments, ``A`` action dimensions.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import importlib.util
import random
import shutil
import sys
import tempfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import ObservationWrapper
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pyfast_ppo.vec_env import (
    Bounds,
    ClipActions,
    action_bounds,
    check_obs_groups,
    clip,
    clipped_action_space,
    declared_action_space,
    is_state,
    near_matches,
    put_action_space,
    single_observation_space,
)

try:
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper as StockWrapper
except ImportError as error:
    raise ImportError(
        f"pyfast_ppo.isaaclab needs isaaclab_rl, which cannot be imported here ({error}); install Isaac Lab and run"
        " this with its Python. Isaac Lab 2 can be imported only after AppLauncher has started Isaac Sim."
    ) from error

# Where Isaac Lab has its histories, delays, noise with a bias, filters, and stacks of frames
_STATEFUL_MODULES = tuple(f"isaaclab.utils.{name}" for name in ("buffers", "noise", "modifiers", "images"))
_DICTS, _LISTS = (dict, OrderedDict, defaultdict), (list, deque)


class RslRlVecEnvWrapper(StockWrapper):
    """Wrap an environment of Isaac Lab for rsl_rl. It stands wherever Isaac Lab's own wrapper stands.

    Observations, rewards and dones are those of Isaac Lab's wrapper, number by number. What differs:

    - ``clip_actions`` may be asymmetric and different for each joint. It never goes beyond the declared action space,
      and the action space is the intersection of both. Only the executed action is clipped: the algorithm keeps the
      one whose log-probability it knows. ``action_bounds`` is what an exported policy must clip to.
    - The wrapper's observation space has all groups that the environment returns; direct environments declare the
      policy's only.
    - ``extras["time_outs"]`` leaves out environments that terminated in the same step; ``extras["terminated"]`` says
      which they are. Both bool ``[E]``.
    - ``extras["final_obs"]``: all observation groups ``[E, ...]`` as they were before the reset, with their history,
      delay and noise; where no episode ended they are the returned ones. The key is there only after steps in which an
      environment was reset. What a diverged simulation leaves is handed out as it is, NaN included.
    - ``extras`` is a new dict in each step, and none of its flags is written to again.

    The final observations cost one more computation of the observations in steps with a reset. It leaves no trace in
    what Isaac Lab's managers keep, in the attributes of the environment and of Gymnasium wrappers around it (tensors,
    arrays, generators, containers of them, Isaac Lab's buffers), or in the random numbers of torch, NumPy and Python.
    State that a direct environment's ``_get_observations`` keeps elsewhere, such as a network that it trains, is out of
    reach, and so are tensors and arrays of more than 2**20 elements without a dimension of size E, which are taken for
    data: an environment that writes to them while it observes needs ``final_obs=False``. An environment that brings its
    own ``step`` has final observations only if it puts them into its extras, as with ``cfg.compute_final_obs = True``.
    """

    action_bounds: Bounds | None
    """Lowest and highest action that is executed, float32 ``[A]`` each; None without a clip."""

    single_observation_space: Any
    """Space of one environment's observations: a Dict with the returned groups."""

    def __init__(
        self,
        env: Any,
        clip_actions: ClipActions = None,
        *,
        obs_groups: Mapping[str, Iterable[str]] | None = None,
        final_obs: bool = True,
    ) -> None:
        """Wrap the environment and reset it.

        Args:
            env: A ``ManagerBasedRLEnv`` or ``DirectRLEnv``, or Gymnasium wrappers around one.
            clip_actions: ``None``: no clip. A number c: to [-c, c]. A pair (low, high): each a number or one per joint.
            obs_groups: The groups that the runner config asks for, ``{"actor": ["policy"], ...}``, to be checked
                against the groups that the environment returns.
            final_obs: Whether ``extras["final_obs"]`` is computed.

        Raises:
            ValueError: The environment is not one of Isaac Lab's; ``clip_actions`` does not fit; a group is missing.
            TypeError: The action space is not a float Box, or an argument has the wrong type.
        """
        super().__init__(env, clip_actions)
        self._final_obs = _FinalObservations(self.env) if final_obs else None
        with _undisturbed(self.env, _RandomStream(self.unwrapped)):  # Isaac Lab 2 computes observations here
            obs = self.get_observations()
        if obs_groups is not None:
            check_obs_groups(obs_groups, obs)
        # the environment keeps its own, by which it may go when it observes
        self.single_observation_space = single_observation_space(obs, self.unwrapped.single_observation_space)

    @functools.cached_property
    def observation_space(self) -> Any:
        """Space of all environments' observations: a Dict with the returned groups, each ``[E, ...]``."""
        from gymnasium.vector.utils import batch_space

        return batch_space(self.single_observation_space, self.num_envs)  # of images: large

    def reset(self) -> tuple[TensorDict, dict]:
        """Reset all environments."""
        _forget_final_obs(getattr(self.unwrapped, "extras", None))
        obs, extras = self.env.reset()
        return self._own_observations(obs), _copied(extras)

    def get_observations(self) -> TensorDict:
        """Return the present observations, groups ``[E, ...]``."""
        obs = super().get_observations().clone().to_dict()  # as the environment has them, inside of all wrappers
        return TensorDict(_transformed(self.env, obs), batch_size=[self.num_envs])

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        """Step all environments.

        Args:
            actions: ``[E, A]``, unclipped; never written to.

        Returns:
            - observations, groups ``[E, ...]``; of the new episode where an episode has ended
            - rewards ``[E]``
            - dones, int64 ``[E]``: 1 where the episode has ended, for any reason
            - extras; see the class
        """
        actions = actions.to(self.device)
        executed = actions.clone() if self.action_bounds is None else clip(actions, self.action_bounds)
        _forget_final_obs(getattr(self.unwrapped, "extras", None))
        if self._final_obs is None:
            result, final = self.env.step(executed), None
        else:
            result, final = self._final_obs.step(executed)

        raw_obs, rewards, terminated, truncated, raw_extras = result
        obs = self._own_observations(raw_obs)
        done = terminated | truncated
        extras = _copied(raw_extras)
        published = extras.pop("final_obs", None)
        if self._final_obs is not None:
            if final is None and published is not None:
                final = _transformed(self.env, published)
            if final is not None:
                final = TensorDict(final, batch_size=[self.num_envs])
                extras["final_obs"] = final.where(done, obs)
        extras["terminated"] = terminated.clone()
        if not self.unwrapped.cfg.is_finite_horizon:
            extras["time_outs"] = truncated & ~terminated
        return obs, rewards.clone(), done.to(torch.long), extras

    def _modify_action_space(self) -> None:
        """Declare the intersection of clip and space; called by the constructor of Isaac Lab's wrapper."""
        from gymnasium.vector.utils import batch_space

        declared = declared_action_space(self.unwrapped)
        self.action_bounds = action_bounds(declared, self.clip_actions, self.device)
        cut = declared if self.action_bounds is None else clipped_action_space(declared, self.action_bounds)
        put_action_space(self.unwrapped, declared, cut, batch_space)

    def _own_observations(self, obs: Mapping[str, Any]) -> TensorDict:
        """As a TensorDict that later steps do not write to."""
        owned = TensorDict(obs, batch_size=[self.num_envs])
        # managers return new tensors; a direct environment may return the buffer that it fills in each step
        return owned if _is_manager_based(self.unwrapped) else owned.clone()


def install_wrapper() -> None:
    """Make Isaac Lab's own commands use this wrapper: ``--external_callback pyfast_ppo.isaaclab.install_wrapper``.

    ``train`` and ``play`` of Isaac Lab 3 call it before they build the environment.
    """
    import isaaclab_rl.rsl_rl

    isaaclab_rl.rsl_rl.RslRlVecEnvWrapper = RslRlVecEnvWrapper
    for name, module in list(sys.modules.items()):  # that have imported it already
        if name.startswith("isaaclab_rl.entrypoints.") and vars(module).get("RslRlVecEnvWrapper") is StockWrapper:
            vars(module)["RslRlVecEnvWrapper"] = RslRlVecEnvWrapper


class _FinalObservations:
    """Computes the observations just before environments are reset inside a step.

    ``_reset_idx`` is called with the environments to be reset, on the host, and only if there are any. So nothing here
    waits for the device.
    """

    def __init__(self, wrapped: Any) -> None:
        """``wrapped``: the environment, with the Gymnasium wrappers around it."""
        from isaaclab.envs import DirectRLEnv, ManagerBasedRLEnv

        env = wrapped.unwrapped
        self.wrapped, self.env = wrapped, env
        self.stream = _RandomStream(env)
        # the experimental environments on Warp call their _reset_idx with a mask, and inside of a CUDA graph
        self.has_reset_idx = isinstance(env, DirectRLEnv | ManagerBasedRLEnv)
        if isinstance(env, DirectRLEnv) and _overrides(env, DirectRLEnv, "_reset_envs_from_buffer"):
            # may reset without _reset_idx, unless it has to capture final observations, too
            env.cfg.compute_final_obs = True

    def step(self, actions: Tensor) -> tuple[tuple, dict | None]:
        """Step; returns the results, and the observations of the terminal frame if there was a reset."""
        if not self.has_reset_idx:
            return self.wrapped.step(actions), None
        final: dict | None = None
        reset_idx = self.env._reset_idx

        def capture_then_reset(*args: Any, **kwargs: Any) -> Any:
            nonlocal final
            now = self._observe()
            final = now if final is None else _with_rows(final, now, *args, **kwargs)
            return reset_idx(*args, **kwargs)

        with _attribute(self.env, "_reset_idx", capture_then_reset):
            result = self.wrapped.step(actions)
        return result, final

    def _observe(self) -> dict:
        """The present observations, as the step would return them."""
        env = self.env
        with _undisturbed(self.wrapped, self.stream):
            if _is_manager_based(env):
                # Isaac Lab's own final observations lack the last frame of histories and delays
                obs = env.observation_manager.compute(update_history=True)
            else:
                published = getattr(env, "extras", {}).get("final_obs")
                obs = _observe_directly(env) if published is None else published
            # a copy: the reset may write into a buffer that they share
            return _map_tensors(Tensor.clone, _transformed(self.wrapped, obs))


class _RandomStream:
    """Numbers of their own for torch's default generators, so that those of the simulation are left alone.

    Those of NumPy and Python, which few environments draw from, are drawn a second time.
    """

    def __init__(self, env: Any) -> None:
        device = torch.device(env.device)
        seed = getattr(env.cfg, "seed", None) or 0
        self._streams = [(torch.default_generator, torch.Generator().manual_seed(seed))]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            own = torch.Generator(torch.device("cuda", index)).manual_seed(seed)
            self._streams.append((torch.cuda.default_generators[index], own))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the default generators draw from here. The states are on the host, on a GPU, too."""
        before = [default.get_state() for default, _ in self._streams]
        of_numpy, of_python = np.random.get_state(), random.getstate()
        for default, own in self._streams:
            default.set_state(own.get_state())
        try:
            yield
        finally:
            for (default, own), state in zip(self._streams, before, strict=True):
                own.set_state(default.get_state())
                default.set_state(state)
            np.random.set_state(of_numpy)
            random.setstate(of_python)


@contextmanager
def _undisturbed(wrapped: Any, stream: _RandomStream) -> Iterator[None]:
    """Inside, observations can be computed; afterwards the environment and its Gymnasium wrappers are as before.

    Objects with state get copies of their tensors for the time being. The tensors themselves are not touched, so that
    whoever else holds one of them sees no change.
    """
    env = wrapped.unwrapped
    owners = [*_wrappers_of(wrapped), *_owners_of_state(env)]
    before = [(owner, dict(vars(owner))) for owner in owners]
    copy_state = _StateCopier(env.num_envs, owners)
    try:
        for owner, attributes in before:
            vars(owner).update({name: copy_state(value) for name, value in attributes.items()})
        with stream.active():
            yield
    finally:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)


def _owners_of_state(env: Any) -> list[Any]:
    """The environment, and what its observation manager advances whenever it computes observations."""
    manager = getattr(env, "observation_manager", None)
    owners = [env]
    for kind in ("_group_obs_term_history_buffer", "_group_obs_term_delay_buffer"):  # delays: since Isaac Lab 3
        owners += [buffer for buffers in getattr(manager, kind, {}).values() for buffer in buffers.values()]
    owners += getattr(manager, "_group_obs_class_instances", [])  # modifiers, noise models
    class_terms = getattr(manager, "_group_obs_class_term_cfgs", {})
    return owners + [term.func for terms in class_terms.values() for term in terms]


class _StateCopier:
    """Copies tensors, arrays, generators of random numbers, containers of all these, and Isaac Lab's buffers.

    It leaves anything else as it is, also large tensors and arrays without a dimension of size E (see ``is_state``).
    What is the same object in two places is so in the copies.
    """

    def __init__(self, num_envs: int, owners: list[Any]) -> None:
        self.num_envs = num_envs
        self._copies: dict[int, Any] = {id(owner): owner for owner in owners}  # their attributes change, not they

    def __call__(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        kind: Any = type(value)
        if isinstance(value, Tensor):
            twin: Any = value.clone() if is_state(value, self.num_envs) else value
        elif kind is np.ndarray:
            twin = value.copy() if is_state(value, self.num_envs) else value
        elif isinstance(value, TensorDictBase):
            twin = value.clone()
        elif kind is torch.Generator:
            twin = torch.Generator(value.device)
            twin.set_state(value.get_state())
        elif kind in (np.random.Generator, np.random.RandomState):
            twin = copy.deepcopy(value)
        elif kind is tuple:
            twin = tuple(map(self, value))
        elif isinstance(value, tuple) and hasattr(kind, "_make"):  # a named one
            twin = kind._make(map(self, value))
        elif kind in _DICTS or kind in _LISTS or _keeps_state(kind):
            twin = copy.copy(value)
        else:
            return value
        self._copies[id(value)] = twin
        # filled once it is known, for it may contain itself
        if kind in _DICTS:
            twin.update({key: self(item) for key, item in value.items()})
        elif kind in _LISTS:
            twin.clear()
            twin.extend(map(self, value))
        elif _keeps_state(kind):
            vars(twin).update({name: self(item) for name, item in vars(value).items()})
        return twin


@functools.cache
def _keeps_state(cls: type) -> bool:
    """Whether it is one of Isaac Lab's classes that keep state in their attributes, or derived from one."""
    # not their configs, which refer back to them
    return not dataclasses.is_dataclass(cls) and any(
        base.__module__.startswith(_STATEFUL_MODULES) for base in cls.__mro__
    )


def _wrappers_of(wrapped: Any) -> list[Any]:
    """The Gymnasium wrappers around an environment, the outermost first."""
    wrappers = []
    while wrapped is not wrapped.unwrapped:
        wrappers.append(wrapped)
        wrapped = wrapped.env
    return wrappers


def _transformed(wrapped: Any, obs: Any) -> Any:
    """What observation wrappers of Gymnasium make of the environment's observations."""
    for wrapper in reversed(_wrappers_of(wrapped)):
        if isinstance(wrapper, ObservationWrapper):
            obs = wrapper.observation(obs)
    return obs


def _observe_directly(env: Any) -> dict:
    """Observations of a ``DirectRLEnv``, with its noise."""
    if hasattr(env, "_compute_observations"):
        return env._compute_observations()
    obs = env._get_observations()  # Isaac Lab 2
    if env.cfg.observation_noise_model:
        obs["policy"] = env._observation_noise_model(obs["policy"])
    return obs


def _overrides(env: Any, base: type, method: str) -> bool:
    return getattr(type(env), method, None) is not getattr(base, method, None)


def _is_manager_based(env: Any) -> bool:
    return hasattr(env, "observation_manager")


def _with_rows(obs: dict, later: dict, env_ids: Any) -> dict:
    """``obs`` with the rows ``env_ids`` from ``later``: a user interface may reset the others in the same step."""
    rows = env_ids.long() if isinstance(env_ids, Tensor) else slice(None) if env_ids is None else env_ids
    merged = TensorDict(obs, batch_size=[]).clone()
    for key, value in TensorDict(later, batch_size=[]).items(include_nested=True, leaves_only=True):
        merged[key][rows] = value[rows]
    return merged.to_dict()


def _forget_final_obs(extras: Any) -> None:
    """Remove final observations of earlier steps: Isaac Lab leaves them in its extras, also in those of each agent."""
    if isinstance(extras, dict):
        extras.pop("final_obs", None)
        for value in extras.values():
            _forget_final_obs(value)


def _copied(extras: dict) -> dict:
    """A copy down to the tensors."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in extras.items()}


def _map_tensors(function: Callable[[Tensor], Tensor], obs: Any) -> Any:
    if isinstance(obs, Tensor):
        return function(obs)
    return {key: _map_tensors(function, value) for key, value in obs.items()}


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the object's attribute hides that of its class."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# --- tasks ------------------------------------------------------------------------------------------------------------


def make(task: str, num_envs: int, device: str, seed: int) -> tuple[RslRlVecEnvWrapper, dict[str, Any]]:
    """Make one of the tasks that Isaac Lab 3 registers, wrapped, and the runner config that it registers with it.

    Where Isaac Sim is not there (no ``omni``), the task has to run on Newton, and its assets have to be local files.
    The cartpole is: Newton brings Isaac Lab's cartpole along, and its ground, which it never touches, is left out.

    Args:
        task: Its id: ``"Isaac-Cartpole-Direct"``.
        num_envs: Number of environments, E.
        device: Where the simulation runs: ``"cuda:0"``, ``"cpu"``.
        seed: Seed of environment and runner.

    Returns:
        - the environment, with the task's clip of actions
        - the config, a new dict, for rsl_rl's ``OnPolicyRunner``

    Raises:
        ValueError: There is no such task, it has no config for rsl_rl, or its assets cannot be had.
    """
    import gymnasium
    import isaaclab_tasks  # noqa: F401  registers the tasks
    from isaaclab.utils import to_dict
    from isaaclab_rl.rsl_rl import handle_deprecated_rsl_rl_cfg
    from isaaclab_tasks.utils import load_cfg_from_registry, resolve_presets

    if task not in gymnasium.registry:
        raise ValueError(f"Isaac Lab has no task {task!r}{near_matches(task, gymnasium.registry)}.")
    if "rsl_rl_cfg_entry_point" not in gymnasium.spec(task).kwargs:
        raise ValueError(f"the task {task!r} has no config for rsl_rl.")
    env_cfg = resolve_presets(load_cfg_from_registry(task, "env_cfg_entry_point"))
    runner_cfg = resolve_presets(load_cfg_from_registry(task, "rsl_rl_cfg_entry_point"))
    runner_cfg = handle_deprecated_rsl_rl_cfg(runner_cfg, version("rsl-rl-lib"))
    env_cfg.scene.num_envs = num_envs
    env_cfg.sim.device = runner_cfg.device = device
    env_cfg.seed = runner_cfg.seed = seed
    if importlib.util.find_spec("omni") is None:
        _use_local_cartpole(env_cfg.scene)
    try:
        env = gymnasium.make(task, cfg=env_cfg)
    except (ModuleNotFoundError, ValueError) as error:  # Isaac Lab makes a ValueError of an import that failed
        if "No module named" not in str(error):
            raise
        missing = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"the task {task!r} needs what is not installed here ({missing}); without Isaac Sim and its asset server"
            " there are Isaac-Cartpole and Isaac-Cartpole-Direct."
        ) from error
    return RslRlVecEnvWrapper(env, clip_actions=runner_cfg.clip_actions), to_dict(runner_cfg)


def _use_local_cartpole(scene: Any) -> None:
    """Newton's copy of Isaac Lab's cartpole in place of the one on NVIDIA's asset server, if it is one."""
    robot: Any = getattr(scene, "cartpole", None) or getattr(scene, "robot", None)
    if not str(getattr(getattr(robot, "spawn", None), "usd_path", "")).endswith("/Cartpole/cartpole.usd"):
        return
    import newton.examples

    source = Path(newton.examples.get_asset("cartpole_single_pendulum.usda"))
    # its default prim is misspelt
    fixed = source.read_text().replace('defaultPrim = "cartPole"', 'defaultPrim = "cartpole"')
    folder = tempfile.mkdtemp(prefix="pyfast_ppo_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "cartpole.usda")
    path.write_text(fixed)
    robot.spawn.usd_path = str(path)
    scene.ground = None
