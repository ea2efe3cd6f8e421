"""Environments that bring their own ``step`` and put final observations into their extras; no simulator runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import torch
from cartpole import report
from isaaclab.envs import DirectMARLEnv, DirectRLEnv, multi_agent_to_single_agent
from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper as Stock

from pyfast_ppo.isaaclab import RslRlVecEnvWrapper as Ours


class Drifting(DirectRLEnv):
    """Points that drift; one buffer for the observations, one dict for the extras, as many environments have it."""

    num_envs = 8
    device = "cpu"
    max_episode_length = 10
    render_mode = None
    scene = None

    def __init__(self) -> None:
        self._is_closed = True
        self.cfg = SimpleNamespace(is_finite_horizon=False, compute_final_obs=True, seed=1)
        self.single_action_space = gymnasium.spaces.Box(-1.0, np.array([0.5, 3.0], np.float32))
        self.single_observation_space = gymnasium.spaces.Dict(policy=gymnasium.spaces.Box(-1.0, 1.0, (3,)))
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.observation_space = gymnasium.vector.utils.batch_space(
            self.single_observation_space["policy"], self.num_envs
        )
        self.extras: dict[str, Any] = {"log": {}}
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.position = torch.zeros(self.num_envs, 3)
        self.time_outs = torch.zeros(self.num_envs, dtype=torch.bool)
        self.rewards = torch.zeros(self.num_envs)
        self.executed: list[torch.Tensor] = []

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.position.uniform_()
        self.obs_buf = {"policy": self.position, "critic": self.position.square()}
        return self.obs_buf, self.extras

    def step(self, action: torch.Tensor) -> tuple:
        self.executed.append(action.clone())
        action.mul_(0.1)  # an environment may scale in place
        self.position[:, :2] += action
        self.episode_length_buf += 1
        self.time_outs[:] = self.episode_length_buf >= self.max_episode_length
        terminated = self.position[:, 0] > 0.95
        self.rewards[:] = self.position.sum(-1)
        self.extras["log"]["reward"] = self.rewards.mean()
        done = terminated | self.time_outs
        if done.any():
            self.extras["final_obs"] = {"policy": self.position.clone(), "critic": self.position.square()}
            self.position[done] = torch.rand(int(done.sum()), 3)
            self.episode_length_buf[done] = 0
        self.obs_buf = {"policy": self.position, "critic": self.position.square()}
        return self.obs_buf, self.rewards, terminated, self.time_outs, self.extras

    def close(self) -> None: ...

    def _pre_physics_step(self, actions: torch.Tensor) -> None: ...

    def _apply_action(self) -> None: ...

    def _get_observations(self) -> dict: ...

    def _get_rewards(self) -> torch.Tensor: ...

    def _get_dones(self) -> tuple[torch.Tensor, torch.Tensor]: ...


class OfTerms(Drifting):
    """The policy's group is a dict, and so is the space that is declared for all environments: the policy's alone."""

    def __init__(self) -> None:
        super().__init__()
        terms = gymnasium.spaces.Dict(place=gymnasium.spaces.Box(-1.0, 1.0, (3,)))
        self.single_observation_space = gymnasium.spaces.Dict(policy=terms)
        self.observation_space = gymnasium.vector.utils.batch_space(terms, self.num_envs)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset()
        self.obs_buf = {"policy": {"place": self.position}}
        return self.obs_buf, self.extras


class Pair(DirectMARLEnv):
    """Two agents that drift; each one's extras are a dict that stays, as Isaac Lab has it."""

    scene = SimpleNamespace(num_envs=4)
    sim = SimpleNamespace(device="cpu", dt=1.0)
    render_mode = None

    def __init__(self) -> None:
        self._is_closed = True
        self.cfg = SimpleNamespace(is_finite_horizon=False, compute_final_obs=True, seed=1, state_space=0)
        self.cfg.sim, self.cfg.decimation, self.cfg.episode_length_s = self.sim, 1, 7.0
        self.possible_agents = ["cart", "pole"]
        box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
        self.observation_spaces = dict.fromkeys(self.possible_agents, box)
        self.action_spaces = dict.fromkeys(self.possible_agents, box)
        self.extras: dict[str, Any] = {agent: {} for agent in self.possible_agents}
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.position = {agent: torch.rand(self.num_envs, 2) for agent in self.possible_agents}

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        return self._copied(), self.extras

    def step(self, actions: dict[str, torch.Tensor]) -> tuple:
        self.episode_length_buf += 1
        done = self.episode_length_buf >= self.max_episode_length
        for agent, action in actions.items():
            self.position[agent] += 0.1 * action
            if done.any():
                self.extras[agent]["final_obs"] = self.position[agent].clone()
                self.position[agent][done] = -5.0
        self.episode_length_buf[done] = 0
        rewards = {agent: position.sum(-1) for agent, position in self.position.items()}
        ends = dict.fromkeys(actions, done)
        return self._copied(), rewards, {agent: torch.zeros_like(done) for agent in actions}, ends, self.extras

    def _copied(self) -> dict[str, torch.Tensor]:
        return {agent: position.clone() for agent, position in self.position.items()}

    def close(self) -> None: ...

    def _pre_physics_step(self, actions: dict) -> None: ...

    def _apply_action(self) -> None: ...

    def _get_observations(self) -> dict: ...

    def _get_states(self) -> torch.Tensor: ...

    def _get_rewards(self) -> dict: ...

    def _get_dones(self) -> tuple[dict, dict]: ...


def converted_agents() -> bool:
    """Two agents as one: final observations in the steps with a reset, and only there."""
    env = Ours(multi_agent_to_single_agent(Pair()), clip_actions=0.5)
    env.episode_length_buf = torch.arange(4)
    found = []
    for _ in range(20):
        obs, _, dones, extras = env.step(torch.ones(4, 4))
        if "final_obs" in extras:
            final = extras["final_obs"]["policy"]
            found.append(bool((obs["policy"][dones == 1] == -5.0).all() and (final[dones == 1] > -5.0).all()))
        found.append(("final_obs" in extras) == bool(dones.any()))
    return all(found) and len(found) > 20


def roll(env: Any, steps: int = 60) -> list[tuple]:
    """Copies of all that a step returned, made at once, and what it returned."""
    torch.manual_seed(3)
    env.reset()
    env.episode_length_buf = torch.arange(8) % 3
    with torch.inference_mode():
        results = []
        for step in range(steps):
            actions = 2.0 * torch.sin(torch.arange(16.0).view(8, 2) + step)
            before = actions.clone()
            result = env.step(actions)
            frozen = (
                {name: group.clone() for name, group in result[0].items()},
                *(tensor.clone() for tensor in result[1:3]),
                {key: value.clone() for key, value in result[3].items() if not isinstance(value, dict)},
                result[3]["log"]["reward"].clone(),
            )
            results.append((frozen, result, torch.equal(actions, before)))
    return results


def main() -> None:
    def raised(**arguments: Any) -> str:
        try:
            Ours(Drifting(), **arguments)
        except (ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    result: dict[str, Any] = {}
    stock, ours = roll(Stock(Drifting())), roll(wrapped := Ours(Drifting()))
    result["same"] = all(
        torch.equal(a[0]["policy"], b[0]["policy"]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for (a, *_), (b, *_) in zip(stock, ours, strict=True)
    )
    result["actions_untouched"] = all(untouched for *_, untouched in ours)
    result["nothing_written_to_later"] = all(
        all(torch.equal(frozen[0][name], obs[name]) for name in obs.keys())  # noqa: SIM118
        and torch.equal(frozen[1], rewards)
        and torch.equal(frozen[2], dones)
        and all((frozen[3][key] == extras[key]).all() for key in frozen[3])
        and torch.equal(frozen[4], extras["log"]["reward"])
        for frozen, (obs, rewards, dones, extras), _ in ours
    )
    has_final = ["final_obs" in extras for _, (*_, extras), _ in ours]
    resets = [bool(dones.any()) for _, (_, _, dones, _), _ in ours]
    result["never_stale"] = has_final == resets and any(resets) and not all(resets)
    result["final_differs_where_done"] = all(
        torch.equal((extras["final_obs"]["policy"] != obs["policy"]).any(-1), dones.bool())
        for _, (obs, _, dones, extras), _ in ours
        if "final_obs" in extras
    )
    result["time_outs"] = all(
        torch.equal(extras["time_outs"] ^ extras["terminated"], dones.bool()) for _, (_, _, dones, extras), _ in ours
    )
    result["both_kinds_of_ends"] = all(
        any(extras[kind].any() for _, (*_, extras), _ in ours) for kind in ("time_outs", "terminated")
    )

    space = wrapped.observation_space
    result["observation_space"] = {name: s.shape for name, s in space.items()} == {"policy": (8, 3), "critic": (8, 3)}
    result["declared_bounds_kept"] = float(wrapped.single_observation_space["policy"].high.max()) == 1.0
    result["declared_space_left_alone"] = list(wrapped.unwrapped.single_observation_space) == ["policy"]
    result["dict_of_the_policy"] = list(Ours(OfTerms()).observation_space) == ["policy"]
    result["contains"] = space["critic"].contains(wrapped.get_observations()["critic"].numpy())

    base = Drifting()
    clipped = Ours(base, clip_actions=(-0.75, [1.0, 1.0]))
    result["bounds"] = [bound.tolist() for bound in clipped.action_bounds] == [[-0.75, -0.75], [0.5, 1.0]]
    result["action_space"] = clipped.action_space == gymnasium.vector.utils.batch_space(
        gymnasium.spaces.Box(-0.75, np.array([0.5, 1.0], np.float32)), 8
    )
    roll(clipped)
    executed = torch.cat(base.executed)
    result["executed"] = [executed.amin(0).tolist(), executed.amax(0).tolist()] == [[-0.75, -0.75], [0.5, 1.0]]
    again = Ours(base, clip_actions=2.0)
    result["clip_of_a_second_wrapper"] = [bound.tolist() for bound in again.action_bounds] == [[-1.0, -1.0], [0.5, 2.0]]
    result["no_clip_again"] = Ours(base).action_space == Drifting().action_space
    without = roll(Ours(Drifting(), final_obs=False))
    result["final_obs_off"] = not any("final_obs" in extras for _, (*_, extras), _ in without)

    result["missing_group"] = "obs_groups['critic'] names 'map'" in raised(obs_groups={"critic": ["policy", "map"]})
    result["present_groups"] = raised(obs_groups={"actor": ["policy"], "critic": ["critic"]}) == ""
    result["wrong_clip"] = raised(clip_actions=(1.0, -1.0)).startswith(
        "ValueError: clip_actions has a low above its high"
    )
    multi = Drifting()
    multi.single_action_space = gymnasium.spaces.MultiDiscrete([2] * 4)
    try:
        Ours(multi, clip_actions=1.0)
    except TypeError as error:
        result["discrete"] = "declare a Box" in str(error) and multi.single_action_space.shape == (4,)

    result["converted_agents"] = converted_agents()
    report(result)


if __name__ == "__main__":
    main()
