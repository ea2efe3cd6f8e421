"""Roll out Cartpole in Isaac Lab's wrapper and in ours, and report what differs.

The truth about a terminal frame comes from a third rollout: the same environment with an episode length that is never
reached. Up to an environment's first reset it is in the same state, and where that environment is reset, it goes on.
"""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from cartpole import actions_of, make_env, report
from torch.utils._python_dispatch import TorchDispatchMode

NUM_ENVS = 6
NUM_STEPS = 45
EPISODE_STEPS = 12
NEVER = 10**6


# --- tasks ------------------------------------------------------------------------------------------------------------


class Frames(NamedTuple):
    """Sums of frames, ``[E, 4]``."""

    tensor: torch.Tensor
    arrays: OrderedDict[str, np.ndarray]


class Raised(gymnasium.ObservationWrapper):
    """All observations, by 1000."""

    def observation(self, observation: dict) -> dict:
        return {
            name: self.observation(value) if isinstance(value, dict) else value + 1000.0
            for name, value in observation.items()
        }


def history_cartpole() -> type:
    """A direct task with a critic group, whose ``_get_observations`` advances all kinds of state."""
    from isaaclab.utils.buffers import CircularBuffer
    from isaaclab_tasks.core.cartpole.cartpole_direct_env import CartpoleEnv

    class HistoryCartpole(CartpoleEnv):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.in_place = torch.zeros(self.num_envs, 3, 4)
            self.circular = CircularBuffer(3, self.num_envs, "cpu")
            self.filtered = torch.zeros(self.num_envs, 4)
            self.kept = {"frames": [torch.zeros(self.num_envs, 4)]}
            self.named = Frames(
                torch.zeros(self.num_envs, 4), OrderedDict(sums=np.zeros((self.num_envs, 4), np.float32))
            )
            self.numpy_generator, self.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
            self.num_calls = 0

        def _get_observations(self) -> dict[str, torch.Tensor]:
            frame = super()._get_observations()["policy"]
            self.num_calls += 1
            self.in_place[:, 1:] = self.in_place[:, :-1].clone()
            self.in_place[:, 0] = frame
            self.circular.append(frame)
            self.filtered = 0.5 * self.filtered + frame
            self.kept["frames"][0] += frame
            self.named.tensor.add_(frame)
            self.named.arrays["sums"] += frame.numpy()
            self.extras["num_calls"] = self.num_calls
            calls = torch.full((self.num_envs, 1), float(self.num_calls))
            critic = [
                self.in_place.flatten(1),
                self.circular.buffer.flatten(1),
                self.filtered,
                *self.kept["frames"],
                self.named.tensor,
                torch.from_numpy(self.named.arrays["sums"].copy()),
                torch.rand(self.num_envs, 1, generator=self.generator),
                torch.from_numpy(self.numpy_generator.random((self.num_envs, 1), np.float32)),
                torch.from_numpy(np.random.random((self.num_envs, 1)).astype(np.float32)),
                calls,
            ]
            return {"policy": frame, "critic": torch.cat(critic, -1)}

    return HistoryCartpole


def both_at_once() -> type:
    """A direct task in which every second environment terminates in the step of its time-out."""
    from isaaclab_tasks.core.cartpole.cartpole_direct_env import CartpoleEnv

    class BothAtOnce(CartpoleEnv):
        def _get_dones(self) -> tuple[torch.Tensor, torch.Tensor]:
            _, time_out = super()._get_dones()
            return time_out & (torch.arange(self.num_envs) % 2 == 0), time_out

    return BothAtOnce


def stateful_term() -> type:
    from isaaclab.managers import ManagerTermBase

    class CountedCalls(ManagerTermBase):
        """Number of its calls since the reset, ``[E, 1]``."""

        def __init__(self, cfg: Any, env: Any) -> None:
            super().__init__(cfg, env)
            self.calls = torch.zeros(env.num_envs, 1)

        def reset(self, env_ids: Any = None) -> None:
            self.calls[slice(None) if env_ids is None else env_ids] = 0.0

        def __call__(self, env: Any) -> torch.Tensor:
            self.calls += 1.0
            return self.calls

    return CountedCalls


def never_ends(cfg: Any) -> None:
    cfg.episode_length_s = NEVER * cfg.sim.dt * cfg.decimation


def ends_soon(cfg: Any) -> None:
    cfg.episode_length_s = EPISODE_STEPS * cfg.sim.dt * cfg.decimation
    cfg.max_cart_pos = 1e6  # direct: no terminations


def with_history(cfg: Any) -> None:
    """Manager-based: histories, a delay, modifiers with state, a term with state, a second group in separate terms."""
    import copy

    from isaaclab.managers import ObservationTermCfg
    from isaaclab.utils.modifiers import DigitalFilterCfg, IntegratorCfg

    policy = cfg.observations.policy
    policy.history_length = 3
    policy.joint_vel_rel.delay_max_lag = 2
    policy.joint_vel_rel.delay_min_lag = 1
    policy.joint_vel_rel.delay_hold_prob = 1.0  # drawn at the reset only
    policy.joint_pos_rel.modifiers = [IntegratorCfg(dt=0.1), DigitalFilterCfg(A=[-0.5], B=[0.5])]
    policy.calls = ObservationTermCfg(func=stateful_term())
    cfg.observations.critic = copy.deepcopy(policy)
    cfg.observations.critic.history_length = None
    cfg.terminations.cart_out_of_bounds = None


def with_noise(cfg: Any) -> None:
    from isaaclab.utils.noise import GaussianNoiseCfg, NoiseModelWithAdditiveBiasCfg

    if hasattr(cfg, "observation_noise_model"):
        noise = GaussianNoiseCfg(std=0.1)
        cfg.observation_noise_model = NoiseModelWithAdditiveBiasCfg(noise_cfg=noise, bias_noise_cfg=noise)
        return
    cfg.observations.policy.enable_corruption = True
    cfg.observations.policy.joint_vel_rel.noise = GaussianNoiseCfg(std=0.1)
    cfg.observations.policy.joint_vel_rel.delay_hold_prob = 0.5  # draws in each step
    cfg.observations.policy.joint_pos_rel.noise = NoiseModelWithAdditiveBiasCfg(
        noise_cfg=GaussianNoiseCfg(std=0.1), bias_noise_cfg=GaussianNoiseCfg(std=0.1)
    )


def ends_both_ways(cfg: Any) -> None:
    """Manager-based: every second environment terminates in the step of its time-out."""
    from isaaclab.managers import TerminationTermCfg

    def even_at_the_limit(env: Any) -> torch.Tensor:
        return (env.episode_length_buf >= env.max_episode_length) & (torch.arange(env.num_envs) % 2 == 0)

    cfg.terminations.cart_out_of_bounds = TerminationTermCfg(func=even_at_the_limit)


# --- waits ------------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        has_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if has_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


# --- rollouts ---------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """What a wrapper returned, and the spaces, before it was closed."""

    obs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    rewards: list[torch.Tensor] = field(default_factory=list)
    dones: list[torch.Tensor] = field(default_factory=list)
    extras: list[dict] = field(default_factory=list)
    observation_space: Any = None
    single_observation_space: Any = None
    action_space: Any = None
    executed: list[torch.Tensor] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)


def roll(
    wrap: Callable, workflow: str, *changes: Callable, env_class: Callable | None = None, count_waits: bool = False
) -> Rollout:
    def configure(cfg: Any) -> None:
        for change in changes:
            change(cfg)

    env = wrap(make_env(workflow, NUM_ENVS, configure=configure, env_class=env_class))
    base = env.unwrapped
    rollout = Rollout()
    rollout.observation_space, rollout.action_space = env.observation_space, base.action_space
    rollout.single_observation_space = getattr(env, "single_observation_space", None)  # Isaac Lab's has none
    rollout.first = env.get_observations().to_dict()
    torch.manual_seed(7)
    np.random.seed(7)
    env.episode_length_buf = torch.arange(NUM_ENVS) * 2  # so that the resets come in different steps
    with torch.inference_mode():
        for step in range(NUM_STEPS):
            actions = actions_of(step, NUM_ENVS)
            before = actions.clone()
            with Waits() if count_waits else nullcontext() as waits:
                obs, rewards, dones, extras = env.step(actions)
            rollout.waits += waits.counts if count_waits else Counter()
            assert torch.equal(actions, before), "the step wrote into the actions"
            rollout.obs.append(obs.flatten_keys(".").clone().to_dict())
            rollout.rewards.append(rewards.clone())
            rollout.dones.append(dones.clone())
            rollout.extras.append(extras)
            if workflow == "direct":
                rollout.executed.append(base.actions / base.action_scale)
    env.close()
    return rollout


def difference(a: Rollout, b: Rollout) -> float:
    """Largest difference in observations, rewards and dones."""
    pairs = [(x[name], y[name]) for x, y in zip(a.obs, b.obs, strict=True) for name in {*x, *y}]
    pairs += [*zip(a.rewards, b.rewards, strict=True), *zip(a.dones, b.dones, strict=True)]
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def final_error(ours: Rollout, endless: Rollout) -> dict[str, float]:
    """Largest difference of the final observations from the truth, at each environment's first reset; by group."""
    errors: dict[str, float] = {}
    for row in range(NUM_ENVS):
        step = next(i for i, done in enumerate(ours.dones) if done[row])
        final = ours.extras[step]["final_obs"].flatten_keys(".")
        assert set(final.keys()) == set(endless.obs[step]), (set(final.keys()), set(endless.obs[step]))
        for name, truth in endless.obs[step].items():
            error = (final[name][row] - truth[row]).abs().max().item()
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


def rows_that_go_on(ours: Rollout) -> float:
    """Largest difference of the final from the returned observations where no episode ended."""
    worst = 0.0
    for obs, dones, extras in zip(ours.obs, ours.dones, ours.extras, strict=True):
        if "final_obs" in extras:
            for name, value in extras["final_obs"].flatten_keys(".").items():
                worst = max(worst, (value - obs[name])[dones == 0].abs().sum().item())
    return worst


def distance_of_final(ours: Rollout) -> float:
    """Smallest difference, over resets, of the policy's final observation from the one after the reset."""
    return min(
        (extras["final_obs"]["policy"] - obs["policy"])[dones == 1].abs().amax(-1).min().item()
        for obs, dones, extras in zip(ours.obs, ours.dones, ours.extras, strict=True)
        if dones.any()
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", choices=("direct", "manager"))
    workflow = parser.parse_args().workflow

    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper as Stock

    from pyfast_ppo.isaaclab import RslRlVecEnvWrapper as Ours

    if workflow == "direct":
        state = {"env_class": history_cartpole}
        changes: tuple = ()
        both: tuple = ((), {"env_class": both_at_once})
    else:
        state, changes = {}, (with_history,)
        both = ((ends_both_ways,), {})

    result: dict[str, Any] = {}
    stock = roll(Stock, workflow, ends_soon, *changes, **state)
    ours = roll(Ours, workflow, ends_soon, *changes, **state)
    endless = roll(Stock, workflow, ends_soon, *changes, never_ends, **state)
    result["difference"] = difference(stock, ours)
    result["final_error"] = final_error(ours, endless)
    result["distance_of_final"] = distance_of_final(ours)
    result["has_final"] = ["final_obs" in extras for extras in ours.extras]
    result["resets"] = [bool(dones.any()) for dones in ours.dones]
    result["observation_space"] = {name: list(s.shape) for name, s in ours.observation_space.items() if s.shape}
    result["single_observation_space"] = sorted(ours.single_observation_space)
    result["returned"] = {name.split(".")[0]: list(value.shape) for name, value in ours.obs[0].items()}

    # one dict in each step, and no later step writes to it
    result["own_extras"] = len({id(extras) for extras in ours.extras}) == NUM_STEPS
    result["time_outs_kept"] = all(
        torch.equal(extras["time_outs"], dones.bool()) and not extras["terminated"].any()
        for extras, dones in zip(ours.extras, ours.dones, strict=True)
    )

    noisy = [roll(wrap, workflow, ends_soon, *changes, with_noise, count_waits=True, **state) for wrap in (Stock, Ours)]
    result["difference_with_noise"] = difference(*noisy)
    result["rows_that_go_on"] = rows_that_go_on(noisy[1])
    result["waits"] = [rollout.waits for rollout in noisy]

    both_ways = roll(lambda env: Ours(env, final_obs=False), workflow, ends_soon, *both[0], **both[1])
    even = torch.arange(NUM_ENVS) % 2 == 0
    result["time_outs_without_terminated"] = all(
        torch.equal(extras["time_outs"], dones.bool() & ~even)
        and torch.equal(extras["terminated"], dones.bool() & even)
        for extras, dones in zip(both_ways.extras, both_ways.dones, strict=True)
    )
    result["final_obs_off"] = not any("final_obs" in extras for extras in both_ways.extras)

    def finite(cfg: Any) -> None:
        cfg.is_finite_horizon = True
        cfg.compute_final_obs = True  # Isaac Lab leaves its key in the extras
        if workflow == "direct":
            import gymnasium

            cfg.action_space = gymnasium.spaces.Box(-0.1, 0.2, (1,))

    last = roll(lambda env: Ours(Raised(env), clip_actions=(-0.25, 0.15)), workflow, ends_soon, finite)
    result["finite_horizon"] = not any("time_outs" in extras for extras in last.extras)
    result["has_final_with_isaaclabs"] = ["final_obs" in e for e in last.extras] == [bool(d.any()) for d in last.dones]
    final = [extras["final_obs"]["policy"] for extras in last.extras if "final_obs" in extras]
    result["observation_wrapper"] = bool((torch.cat([*final, last.first["policy"]]) > 500.0).all())
    result["action_space"] = [float(last.action_space.low.min()), float(last.action_space.high.max())]
    if last.executed:
        executed = torch.stack(last.executed)
        result["executed"] = [executed.min().item(), executed.max().item()]
    report(result)


if __name__ == "__main__":
    main()
