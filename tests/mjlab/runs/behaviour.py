"""What the wrapper does beside the trajectories; each function is one case and returns facts for the test."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import CARTPOLE, RslRlVecEnvWrapper, StockWrapper, make_env, random_actions, report
from mjlab.envs import ManagerBasedRlEnv, ManagerBasedRlEnvCfg
from mjlab.envs.mdp import nan_detection
from mjlab.managers.termination_manager import TerminationTermCfg
from mjlab.utils.spaces import Box, Space
from mjlab.utils.wrappers import VideoRecorder
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_ppo.mjlab import make

E = 6
LIMIT = 5  # steps


def short(cfg: ManagerBasedRlEnvCfg) -> None:
    """Episodes of ``LIMIT`` steps."""
    cfg.episode_length_s = LIMIT * cfg.decimation * cfg.sim.mujoco.timestep


def error_of(call: Callable[[], Any]) -> str:
    """The error that the call raises: type and message."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def clip() -> dict[str, Any]:
    """An asymmetric clip."""
    bare = make_env()
    env = RslRlVecEnvWrapper(bare, clip_actions=(-0.5, 0.25))
    actions = torch.linspace(-1, 1, E).view(E, 1)
    given = actions.clone()
    env.step(actions)
    return {
        "given_is_unchanged": torch.equal(actions, given),
        "executed": bare.action_manager.action.flatten().tolist(),
        "clipped": given.clamp(-0.5, 0.25).flatten().tolist(),
        "bounds": [bound.tolist() for bound in env.action_bounds],
        "single": [bare.single_action_space.low, bare.single_action_space.high],
        "batched": [env.action_space.low, env.action_space.high, list(env.action_space.shape)],
    }


def clip_and_declared_space() -> dict[str, Any]:
    """A clip meets a space of the environment that is tighter, or none; or there is no clip."""
    bare = make_env()
    untouched = bare.single_action_space
    without = RslRlVecEnvWrapper(bare)
    result = {"none": [without.action_bounds, bare.single_action_space is untouched]}
    bare.single_action_space = Box(shape=(1,), low=(-0.3,), high=(2.0,))
    env = RslRlVecEnvWrapper(bare, clip_actions=1.0)
    result["tighter"] = [bare.single_action_space.low, bare.single_action_space.high]
    env.step(torch.full((E, 1), -9.0))
    result["executed"] = bare.action_manager.action[0].item()
    again = RslRlVecEnvWrapper(bare, clip_actions=1.5)
    result["again"] = [again.action_bounds[0].item(), again.action_bounds[1].item(), bare.single_action_space.high]
    bare.single_action_space = Space(shape=(1,), dtype="int64")
    result["not_a_box"] = error_of(lambda: RslRlVecEnvWrapper(bare, clip_actions=1.0))
    result["one_per_joint"] = error_of(lambda: RslRlVecEnvWrapper(make_env(), clip_actions=([-1.0, -1.0], 1.0)))
    return result


def observation_space() -> dict[str, Any]:
    """The declared space, one that is wrong, and groups that are not there."""
    bare = make_env()
    declared = bare.observation_space
    env = RslRlVecEnvWrapper(bare, obs_groups={"actor": ["actor"], "critic": ("actor", "critic")})
    obs = env.get_observations()
    result = {"as_declared": env.observation_space == declared}
    del declared.spaces["critic"]
    declared.spaces["actor"].shape = (E, 99)
    space = RslRlVecEnvWrapper(bare).observation_space
    result["matches"] = {name: list(group.shape) for name, group in space.spaces.items()} == {
        name: list(group.shape) for name, group in obs.items()
    }
    result["missing_group"] = error_of(lambda: RslRlVecEnvWrapper(bare, obs_groups={"critic": ["privileged"]}))
    return result


def extras() -> dict[str, Any]:
    """Nothing that was returned changes later on."""
    bare = make_env(edit=short)
    env = RslRlVecEnvWrapper(bare)
    env.episode_length_buf = torch.arange(E) % LIMIT
    kept, copies = [], []
    for actions in random_actions(12, env):
        obs, rewards, dones, step_extras = env.step(actions)
        tensors = {"rewards": rewards, "dones": dones} | {k: v for k, v in step_extras.items() if k != "log"}
        tensors |= {f"obs/{name}": group for name, group in obs.items()}
        kept.append((step_extras, tensors))
        copies.append({name: value.clone() for name, value in tensors.items()})
    return {
        "changed": [
            f"{step}: {name}"
            for step, ((_, now), then) in enumerate(zip(kept, copies, strict=True))
            for name in then
            if not bool((now[name] == then[name]).all())
        ],
        "new_dicts": len({id(step_extras) for step_extras, _ in kept}),
        "dtypes": sorted({str(kept[0][1][name].dtype) for name in ("time_outs", "terminated")}),
        "env_extras": sorted(bare.extras),
        "sim_reset_is_own": bare.sim.reset.__func__ is type(bare.sim).reset,
    }


def switches() -> dict[str, Any]:
    """``final_obs=False``, finite horizon, ``auto_reset=False``, a mjlab that resets in another way, a recorder."""

    def finite(cfg: ManagerBasedRlEnvCfg) -> None:
        short(cfg)
        cfg.is_finite_horizon = True

    def manual(cfg: ManagerBasedRlEnvCfg) -> None:
        cfg.auto_reset = False

    def keys(env: StockWrapper) -> list[str]:
        env.episode_length_buf = torch.full((E,), LIMIT - 1)
        return sorted(env.step(torch.zeros(E, 1))[3])

    other = make_env()
    other._reset_idx = lambda env_ids: None
    with tempfile.TemporaryDirectory() as folder:
        recorded = RslRlVecEnvWrapper(VideoRecorder(make_env(edit=short), folder))
    return {
        "without": keys(RslRlVecEnvWrapper(make_env(edit=short), final_obs=False)),
        "finite_horizon": keys(RslRlVecEnvWrapper(make_env(edit=finite))),
        "finite_horizon_stock": keys(StockWrapper(make_env(edit=finite))),
        "in_recorder": keys(recorded),
        "manual": error_of(lambda: RslRlVecEnvWrapper(make_env(edit=manual))),
        "other_reset": error_of(lambda: RslRlVecEnvWrapper(other)),
    }


def diverged() -> dict[str, Any]:
    """A simulation that has become NaN in one row, under the strictest policy for NaNs."""

    def strict(cfg: ManagerBasedRlEnvCfg) -> None:
        cfg.terminations["nan"] = TerminationTermCfg(func=nan_detection)
        for group in cfg.observations.values():
            group.nan_policy = "error"

    bare = make_env(edit=strict)
    env = RslRlVecEnvWrapper(bare)
    env.step(torch.zeros(E, 1))
    bare.sim.data.qvel[2] = torch.nan
    obs, _, dones, step_extras = env.step(torch.zeros(E, 1))
    finite = step_extras["final_obs"]["actor"].isfinite().all(-1)
    return {
        "dones": dones.tolist(),
        "terminated": step_extras["terminated"].tolist(),
        "obs_finite": bool(obs["actor"].isfinite().all()),
        "final_finite": finite.tolist(),
        "policy": {group.nan_policy for group in bare.observation_manager.cfg.values()} == {"error"},
    }


def modes() -> dict[str, Any]:
    """Steps inside and outside of inference mode in turn, while the observations before are kept for a gradient."""
    env = RslRlVecEnvWrapper(make_env(edit=lambda cfg: (short(cfg), histories(cfg))))
    env.episode_length_buf = torch.arange(E) % LIMIT
    network = torch.nn.Linear(env.get_observations()["actor"].shape[1], 1)
    losses = []
    for step, actions in enumerate(random_actions(8, env)):
        with torch.inference_mode(step % 2 == 0):
            obs = env.step(actions)[0]
        if step % 2 == 1:
            losses.append(network(obs["actor"]).sum())
    torch.stack(losses).sum().backward()
    return {"gradient": bool(network.weight.grad.abs().sum() > 0)}


def histories(cfg: ManagerBasedRlEnvCfg) -> None:
    """A history in the actor's observations."""
    cfg.observations["actor"].history_length = 3


class _Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "is_nonzero"):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def host_waits() -> dict[str, Any]:
    """In a step without and in one with a reset."""

    def counts(wrapper: type) -> list[dict[str, int]]:
        env = wrapper(make_env(edit=short), clip_actions=1.0)
        env.step(torch.zeros(E, 1))
        env.episode_length_buf = torch.tensor([0, 0, LIMIT - 2, 0, LIMIT - 2, 0])
        result = []
        for _ in range(2):
            with _Waits() as waits:
                env.step(torch.zeros(E, 1))
            result.append({name: n for name, n in waits.count.items() if name != "_to_copy"})
        return result

    return {"stock": counts(StockWrapper), "ours": counts(RslRlVecEnvWrapper)}


def made() -> dict[str, Any]:
    """Environment and config from the registry, and names that are wrong."""
    env, config = make(CARTPOLE, 4, "cpu", 7)
    return {
        "type": [type(env).__module__, type(env).__name__],
        "num_envs": env.num_envs,
        "seeds": [env.cfg.seed, config["seed"]],
        "class_name": config["algorithm"]["class_name"],
        "critic": sorted(config["critic"]),
        "near": error_of(lambda: make("mjlab-cartpole-balanced", 4, "cpu", 7)),
        "far": error_of(lambda: make("?", 4, "cpu", 7)),
        "motion": error_of(lambda: make("Mjlab-Tracking-Flat-Unitree-G1", 4, "cpu", 7)),
    }


def failing_step() -> dict[str, Any]:
    """An error inside the step leaves no hook behind."""
    bare: ManagerBasedRlEnv = make_env()
    env = RslRlVecEnvWrapper(bare)
    return {
        "error": error_of(lambda: env.step(torch.zeros(E, 3))),
        "sim_reset_is_own": bare.sim.reset.__func__ is type(bare.sim).reset,
    }


CASES = (
    clip,
    clip_and_declared_space,
    observation_space,
    extras,
    switches,
    diverged,
    modes,
    host_waits,
    made,
    failing_step,
)

if __name__ == "__main__":
    report({case.__name__: case() for case in CASES})
