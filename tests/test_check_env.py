"""check_env on a sound environment, and on environments with one fault each."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rsl_rl.algorithms import PPO
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from tensordict import TensorDict

import pyfast_ppo
from pyfast_ppo._check_env import attributes
from pyfast_ppo.check_env import Finding, check_env
from pyfast_ppo.cli.train_config import Settings, train_config
from pyfast_ppo.gymnasium import GymnasiumVecEnv

E, A, LIMIT = 8, 2, 10


class Simulator:
    """A point that actions push about, in E copies. It terminates beyond 2 and is cut off after LIMIT steps."""

    limit = LIMIT

    def __init__(self, action_space: spaces.Space | None = None) -> None:
        self.single_action_space = action_space or spaces.Box(-np.inf, np.inf, (A,))
        self.cfg = SimpleNamespace(is_finite_horizon=False)
        self.episode_length_buf = torch.zeros(E, dtype=torch.long)
        self.last_action = torch.zeros(E, A)
        self.is_time_limited = torch.ones(E, dtype=torch.bool)
        self.reset()

    @property
    def unwrapped(self) -> Simulator:
        return self

    def reset(self) -> None:
        self.place = torch.randn(E, A) * 0.3
        self.episode_length_buf = torch.zeros(E, dtype=torch.long)

    def obs(self) -> dict[str, torch.Tensor]:
        privileged = torch.cat([self.place, self.place.square(), self.place.sin()], dim=-1)
        return {"policy": self.place.clone(), "privileged": privileged}

    def push(self, actions: torch.Tensor) -> torch.Tensor:
        return 0.5 * actions

    def step(self, actions: torch.Tensor):
        """Returns observations, those before the reset, rewards, terminated, truncated."""
        self.place = self.place + self.push(actions) + 0.01 * torch.randn(E, A)
        self.episode_length_buf = self.episode_length_buf + 1
        rewards = -self.place.square().sum(-1)
        terminated = self.place.abs().amax(-1) > 2.0
        truncated = self.episode_length_buf >= self.limit
        done = terminated | truncated
        before_reset = self.obs()
        self.place = torch.where(done[:, None], torch.randn(E, A) * 0.3, self.place)
        self.episode_length_buf = torch.where(done, 0, self.episode_length_buf)
        self.reset_terminated = terminated
        return self.obs(), before_reset, rewards, terminated, truncated


class Wrapper(VecEnv):
    """A sound wrapper. A test overrides the one thing that is to be wrong."""

    num_envs, num_actions, max_episode_length, device = E, A, LIMIT, "cpu"
    clip_actions: float | None = None

    def __init__(self, simulator: Simulator | None = None) -> None:
        self.simulator = simulator or Simulator()

    @property
    def env(self) -> Simulator:
        return self.simulator

    @property
    def cfg(self):
        return self.simulator.cfg

    @property
    def unwrapped(self) -> Simulator:
        return self.simulator

    @property
    def episode_length_buf(self) -> torch.Tensor:
        return self.simulator.episode_length_buf

    @episode_length_buf.setter
    def episode_length_buf(self, value: torch.Tensor) -> None:
        self.simulator.episode_length_buf = value

    def reset(self):
        self.simulator.reset()
        return self.get_observations(), {}

    def get_observations(self) -> TensorDict:
        return self.pack(self.simulator.obs())

    def pack(self, obs: dict[str, torch.Tensor]) -> TensorDict:
        return TensorDict(obs, batch_size=[E])

    def clip(self, actions: torch.Tensor) -> torch.Tensor:
        return actions if self.clip_actions is None else actions.clamp(-self.clip_actions, self.clip_actions)

    def step(self, actions: torch.Tensor):
        obs, before_reset, rewards, terminated, truncated = self.simulator.step(self.clip(actions))
        extras = {"time_outs": truncated & ~terminated, "terminated": terminated, "final_obs": self.pack(before_reset)}
        return self.pack(obs), *self.finish(rewards, (terminated | truncated).long(), extras)

    def finish(self, rewards: torch.Tensor, dones: torch.Tensor, extras: dict):
        return rewards, dones, extras


def config(**algorithm) -> dict:
    """A runner's config for the fake."""
    cfg = train_config(Settings(algorithm="stock"), ["policy"])
    cfg["actor"] = cfg["actor"] | {"obs_normalization": False}  # rsl_rl 5.4 moves the normalizer while it acts
    cfg["obs_groups"]["critic"] = ["policy", "privileged"]
    cfg["num_steps_per_env"] = 16
    cfg["algorithm"] |= algorithm
    return cfg


def names(env: VecEnv, train_cfg=None, **kwargs) -> list[str]:
    return [finding.name for finding in check_env(env, train_cfg, **kwargs)]


def only(env: VecEnv, train_cfg=None, **kwargs) -> Finding:
    """The one finding."""
    findings = check_env(env, train_cfg, **kwargs)
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


# --- sound environments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["InvertedPendulum-v5", "Hopper-v5", "Pendulum-v1"])
@pytest.mark.parametrize("algorithm", [None, "stock", "fused"])
def test_nothing_is_found_in_gymnasium(task, algorithm, capsys):
    cfg = algorithm and train_config(Settings(algorithm=algorithm), ["policy"])
    if algorithm == "stock":
        cfg["actor"]["obs_normalization"] = False  # rsl_rl 5.4 moves the normalizer while it acts
    env = GymnasiumVecEnv(task, 3, seed=0)
    assert check_env(env, cfg) == []
    assert capsys.readouterr().out == ""
    env.close()


@pytest.mark.parametrize("steps", [1, 2, 7, 32, 100])
def test_nothing_is_found_in_a_sound_environment(steps, capsys):
    assert names(Wrapper(), steps=steps) == []
    assert names(Wrapper(), config(), steps=steps) == []
    assert capsys.readouterr() == ("", "")


def test_nothing_is_found_with_a_reasonable_clip():
    env = Wrapper()
    env.clip_actions = 100.0
    assert names(env, config()) == []


def test_nothing_is_found_where_the_environment_clips_for_itself():
    class Clips(Simulator):
        def push(self, actions):
            return super().push(actions.clamp(-1.0, 1.0))

    assert names(Wrapper(Clips(spaces.Box(-1.0, 1.0, (A,))))) == []


def test_nothing_is_found_where_the_clip_is_the_action_space():
    env = Wrapper(Simulator(spaces.Box(-1.0, 1.0, (A,))))
    env.clip_actions = 1.0
    assert names(env) == []


def test_nothing_is_found_where_large_actions_are_refused():
    class Refuses(Wrapper):
        def step(self, actions):
            assert actions.abs().max() < 10.0, "too large"
            return super().step(actions)

    assert names(Refuses(Simulator(spaces.Box(-6.0, 6.0, (A,))))) == []


def test_a_finite_horizon_has_no_time_outs():
    class Finite(Wrapper):
        def finish(self, rewards, dones, extras):
            del extras["time_outs"]
            return rewards, dones, extras

    env = Finite()
    env.cfg.is_finite_horizon = True
    assert names(env) == []


@pytest.mark.parametrize("model", ["RNNModel", "MLPModel"])
@pytest.mark.parametrize("distribution", ["GaussianDistribution", "HeteroscedasticGaussianDistribution"])
def test_nothing_is_found_with_other_policies(model, distribution):
    cfg = config()
    cfg["actor"]["class_name"] = model
    cfg["actor"]["distribution_cfg"]["class_name"] = distribution
    assert names(Wrapper(), cfg) == []


def test_spaces_that_match_are_fine():
    env = Wrapper()
    env.observation_space = spaces.Dict(policy=spaces.Box(-1, 1, (E, A)), privileged=spaces.Box(-1, 1, (E, 3 * A)))
    env.single_observation_space = None
    assert names(env) == []


def test_groups_of_any_shape():
    class Shapes(Simulator):
        def obs(self):
            sizes = {"number": (E,), "image": (E, 3, 4, 4), "empty": (E, 0)}
            return super().obs() | {name: torch.randn(size) for name, size in sizes.items()}

    assert names(Wrapper(Shapes())) == []


def test_groups_inside_of_groups():
    class Nested(Wrapper):
        def pack(self, obs):
            terms = TensorDict({"place": obs["policy"], "height": obs["policy"][:, :1]}, batch_size=[E])
            return super().pack(obs | {"terms": terms})

    env = Nested()
    box = spaces.Box(-1, 1, (A,))
    terms = spaces.Dict(place=box, height=spaces.Box(-1, 1, (1,)))
    env.single_observation_space = spaces.Dict(policy=box, privileged=spaces.Box(-1, 1, (3 * A,)), terms=terms)
    assert names(env, config()) == []
    env.single_observation_space = spaces.Dict(policy=box, privileged=spaces.Box(-1, 1, (3 * A,)), terms=box)
    assert only(env).name == "observation-space"


def test_a_constant_group_says_nothing_about_final_observations():
    class WithCommand(Simulator):
        def obs(self):
            return super().obs() | {"command": torch.ones(E, 1)}

    assert names(Wrapper(WithCommand())) == []


# --- what the check leaves behind -------------------------------------------------------------------------------------


def test_environment_random_state_and_config_are_left_as_they_were():
    env, cfg = Wrapper(), config()
    cfg_before = copy.deepcopy(cfg)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    step = env.env.step
    check_env(env, cfg)
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(), random.random()) == expected[1:]
    assert cfg == cfg_before
    assert env.episode_length_buf.tolist() == [0] * E
    assert env.env.step == step and "step" not in vars(env.env)
    obs, *_ = env.step(torch.zeros(E, A))
    assert not any(values.is_inference() or values.requires_grad for values in obs.values())


def test_actions_of_the_check_are_the_same_every_time():
    seen = []

    class Remembers(Wrapper):
        def step(self, actions):
            seen.append(actions.clone())
            return super().step(actions)

    env = Remembers()
    for seed in (1, 2):
        torch.manual_seed(seed)
        check_env(env, steps=4)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_environment_without_reset_is_looked_at():
    class NoReset(Wrapper):
        reset = property()

    assert not hasattr(NoReset(), "reset")
    assert names(NoReset(), config()) == []


def test_finding_is_one_line():
    finding = Finding("name", "a reason\n  of two lines.", "mend it.", is_note=True)
    assert str(finding) == "note: name: a reason of two lines. Mend: mend it."


def test_findings_are_printed(capsys):
    env = Wrapper()
    env.clip_actions = 0.1
    findings = check_env(env)
    assert capsys.readouterr().out == "".join(f"{finding}\n" for finding in findings) != ""


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [None, "InvertedPendulum-v5", Simulator()])
def test_env_must_be_a_vec_env(env):
    with pytest.raises(TypeError, match=r"env must be an rsl_rl VecEnv, but is .*GymnasiumVecEnv"):
        check_env(env)


@pytest.mark.parametrize("train_cfg", [3, "PPO", Settings])
def test_train_cfg_must_be_a_config(train_cfg):
    with pytest.raises(TypeError, match="train_cfg must be a"):
        check_env(Wrapper(), train_cfg)


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        check_env(Wrapper(), steps=0)


def test_options_of_other_networks_are_taken_out_of_a_dataclass():
    """mjlab's has them all."""
    absent = {"cnn_cfg": None, "rnn_type": None, "rnn_hidden_dim": 64}
    cfg = config()

    @dataclass
    class Config:
        num_steps_per_env: int = 16
        obs_groups: dict = field(default_factory=lambda: cfg["obs_groups"])
        actor: dict = field(default_factory=lambda: cfg["actor"] | absent)
        critic: dict = field(default_factory=lambda: cfg["critic"] | absent | {"distribution_cfg": None})
        algorithm: dict = field(default_factory=lambda: cfg["algorithm"])

    assert names(Wrapper(), Config()) == []

    class WithToDict:
        def to_dict(self):
            return dataclasses.asdict(Config())

    as_mjlab_passes_it = dataclasses.asdict(Config())
    assert names(Wrapper(), as_mjlab_passes_it) == names(Wrapper(), WithToDict()) == []
    assert as_mjlab_passes_it == dataclasses.asdict(Config())


def test_config_objects_are_read():
    class WithToDict:
        def to_dict(self):
            return {**config(), "obs_groups": {"actor": ["nowhere"]}}

    @dataclass
    class AsDataclass:
        obs_groups: dict = field(default_factory=lambda: {"actor": ["nowhere"]})

    for cfg in (WithToDict(), AsDataclass()):
        assert only(Wrapper(), cfg).name == "obs-groups"


def test_package_has_the_function_whatever_was_imported_first():
    importlib.import_module("pyfast_ppo.check_env")
    assert pyfast_ppo.check_env is check_env


# --- attributes -------------------------------------------------------------------------------------------------------


def test_missing_attribute():
    class Missing(Wrapper):
        cfg = property()

    assert "cfg" in only(Missing()).reason


@pytest.mark.parametrize("device", ["no_such_device", "cuda:99"])
def test_unknown_device(device):
    env = Wrapper()
    env.device = device
    assert only(env).name == "device-mix"


@pytest.mark.parametrize("length", [None, float("inf"), 0, "long"])
def test_max_episode_length(length):
    env = Wrapper()
    env.max_episode_length = length
    assert only(env).name == "max-episode-length"


def test_max_episode_length_may_differ():
    env = Wrapper()
    env.max_episode_length = torch.full((E,), LIMIT)
    assert names(env, config()) == []


def test_episode_length_buf_that_cannot_be_set():
    class ReadOnly(Wrapper):
        episode_length_buf = property(lambda self: self.env.episode_length_buf)

    assert "cannot be set" in only(ReadOnly()).reason


def test_episode_length_buf_that_forgets():
    class Forgets(Wrapper):
        episode_length_buf = property(lambda self: self.env.episode_length_buf, lambda self, value: None)

    assert "does not keep" in only(Forgets()).reason


def test_episode_length_buf_that_is_written_to_in_place():
    """As in Isaac Lab's multi_agent_to_single_agent."""

    class InPlace(Wrapper):
        @property
        def episode_length_buf(self):
            return self.env.episode_length_buf

        @episode_length_buf.setter
        def episode_length_buf(self, value):
            self.env.episode_length_buf[:] = value

    env = InPlace()
    env.episode_length_buf = torch.arange(E)
    assert attributes.episode_length_buf(env) is None
    assert env.episode_length_buf.tolist() == list(range(E))
    assert names(InPlace(), config()) == []


@pytest.mark.parametrize("counts", [torch.zeros(E), torch.zeros(E, 1, dtype=torch.long), [0] * E])
def test_episode_length_buf_of_another_kind(counts):
    class OtherKind(Wrapper):
        episode_length_buf = None

    env = OtherKind()
    env.episode_length_buf = counts
    assert only(env).name == "episode-length-buf"


@pytest.mark.parametrize("space", [spaces.Discrete(A), spaces.MultiDiscrete([3, 4])])
def test_discrete_actions(space):
    assert only(Wrapper(Simulator(space))).name == "discrete-actions"


@pytest.mark.parametrize("spec", [{3}, [{3}, {4}]])
def test_discrete_actions_that_a_clip_has_turned_into_a_box(spec):
    simulator = Simulator(spaces.Box(-1.0, 1.0, (A,)))  # what Isaac Lab's wrapper leaves
    simulator.cfg.action_space = spec
    assert only(Wrapper(simulator)).name == "discrete-actions"


@pytest.mark.parametrize("space", [spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-1.0, 1.0, (E, 3))])
def test_num_actions(space):
    assert only(Wrapper(Simulator(space))).name == "num-actions"


def test_num_actions_of_isaac_lab():
    simulator = Simulator()
    simulator.cfg.action_space = 3
    assert only(Wrapper(simulator)).name == "num-actions"


# --- actions ----------------------------------------------------------------------------------------------------------


def test_actions_beyond_the_space():
    finding = only(Wrapper(Simulator(spaces.Box(-1.0, 1.0, (A,)))))
    assert finding.name == "actions-beyond-space" and "[-1, 1]" in finding.reason


def test_actions_below_the_space():
    low, high = np.full(A, -1.0), np.full(A, np.inf)
    assert only(Wrapper(Simulator(spaces.Box(low, high, dtype=np.float64)))).name == "actions-beyond-space"


def test_actions_beyond_the_space_without_an_environment_inside():
    class Alone(Wrapper):
        """All in one class, with the space of all environments together."""

        action_space = spaces.Box(-1.0, 1.0, (E, A))
        env = None
        unwrapped = property(lambda self: self)

    assert only(Alone()).name == "actions-beyond-space"

    class AloneAndClips(Alone):
        def clip(self, actions):
            return actions.clamp(-1.0, 1.0)

    assert names(AloneAndClips()) == []


def test_clip_widens_the_space():
    env = Wrapper(Simulator(spaces.Box(-1.0, 1.0, (A,))))
    env.clip_actions = 100.0
    finding = only(env)
    assert finding.name == "clip-widens-space" and "[-1, 1]" in finding.reason and "100" in finding.reason


def test_clip_that_was_written_over_the_space():
    simulator = Simulator(spaces.Box(-100.0, 100.0, (A,)))
    simulator.cfg.action_space = spaces.Box(-1.0, 1.0, (A,))
    env = Wrapper(simulator)
    env.clip_actions = 100.0
    assert only(env).name == "clip-widens-space"


def test_clip_cuts_actions():
    env = Wrapper()
    env.clip_actions = 1.0
    assert "32%" in only(env).reason
    cfg = config()
    cfg["actor"]["distribution_cfg"]["init_std"] = 0.2
    assert names(env, cfg) == []


@pytest.mark.parametrize("made", [tuple, list, np.array, torch.tensor])
def test_clips_of_every_form_are_read(made):
    """As the wrappers take them."""
    env = Wrapper()
    for clip, expected in (([-10.0, 10.0], []), ([-1.0, 1.0], ["clip-cuts-actions"])):
        env.clip_actions = made(clip)
        env.clip = lambda actions, clip=clip: actions.clamp(*clip)
        assert names(env) == expected
    env.clip_actions = made([[-0.5, -9.0], [0.5, 9.0]])
    env.clip = lambda actions: actions.clamp(torch.tensor([-0.5, -9.0]), torch.tensor([0.5, 9.0]))
    finding = only(env)
    assert finding.name == "clip-cuts-actions" and "-9.0" in finding.reason and "\n" not in finding.reason


def test_clip_that_differs_by_joint_cuts_actions():
    env = Wrapper()
    env.clip = lambda actions: actions.clamp(torch.tensor([-0.5, -9.0]), torch.tensor([0.5, 9.0]))
    env.clip_actions = ([-0.5, -9.0], [0.5, 9.0])
    assert only(env).name == "clip-cuts-actions"


class SeesLastAction(Simulator):
    def obs(self):
        return super().obs() | {"policy": torch.cat([self.place, 0.25 * self.last_action], dim=-1)}

    def step(self, actions):
        self.last_action = self.seen(actions)
        return super().step(actions)

    def push(self, actions):
        return 0.3 * actions.clamp(-1.0, 1.0)

    def seen(self, actions):
        return actions


def test_unbounded_last_action():
    finding = only(Wrapper(SeesLastAction()))
    assert finding.name == "unbounded-last-action" and "'policy'" in finding.reason


def test_bounded_last_action():
    env = Wrapper(SeesLastAction())
    env.clip_actions = 100.0
    assert names(env) == []
    simulator = SeesLastAction()
    simulator.seen = lambda actions: actions.clamp(-10.0, 10.0)
    assert names(Wrapper(simulator)) == []


def test_unbounded_last_action_where_large_actions_terminate():
    class Fragile(SeesLastAction):
        def push(self, actions):
            return super().push(actions) + 10.0 * (actions > 100.0)

    assert only(Wrapper(Fragile())).name == "unbounded-last-action"


def test_actions_overwritten():
    class ClipsInPlace(Wrapper):
        def clip(self, actions):
            return actions.clamp_(-1.0, 1.0)

    assert only(ClipsInPlace(), config()).name == "actions-overwritten"


# --- observations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (E, A)),
        spaces.Dict(policy=spaces.Box(-1, 1, (A,))),
        spaces.Dict(policy=spaces.Box(-1, 1, (A,)), privileged=spaces.Box(-1, 1, (A,))),
    ],
)
def test_observation_space(space):
    env = Wrapper()
    env.observation_space = space
    assert only(env).name == "observation-space"


@pytest.mark.parametrize("is_dict", [False, True])
def test_flat_image(is_dict):
    class Camera(Simulator):
        def obs(self):
            return {"policy": super().obs()["policy"].repeat(1, 40 // A)}

    env = Wrapper(Camera())
    image = spaces.Box(0, 255, (4, 5, 2), np.uint8)
    env.env.single_observation_space = spaces.Dict(policy=image) if is_dict else image
    finding = only(env)
    assert finding.name == "flat-image" and "'policy' is an image of the shape (4, 5, 2)" in finding.reason


@pytest.mark.parametrize(
    "obs_groups",
    [{"actor": ["policy"], "critic": ["policy", "state"]}, {"actor": []}, {"actor": "policy"}, ["policy"]],
)
def test_obs_groups(obs_groups):
    finding = only(Wrapper(), {**config(), "obs_groups": obs_groups})
    assert finding.name == "obs-groups" and "policy, privileged" in finding.mend


def test_obs_groups_without_a_set():
    class Renamed(Simulator):
        def obs(self):
            return {"proprioception": super().obs()["policy"]}

    finding = only(Wrapper(Renamed()), {**config(), "obs_groups": {"critic": ["proprioception"]}})
    assert finding.name == "obs-groups" and "actor" in finding.reason


def test_observations_that_are_no_tensordict():
    class Plain(Wrapper):
        def pack(self, obs):
            return obs

    assert only(Plain()).name == "observations-format"


def test_observations_with_another_batch_size():
    class NoBatch(Wrapper):
        def pack(self, obs):
            return TensorDict(obs, batch_size=[])

    assert only(NoBatch()).name == "observations-format"


def test_observations_that_are_not_float32():
    class Double(Simulator):
        def obs(self):
            return super().obs() | {"image": torch.zeros(E, 3, dtype=torch.uint8)}

    assert "'image'" in only(Wrapper(Double())).reason
    assert names(Wrapper(Double()), config()) == []  # no network reads that group


def test_groups_that_change():
    class GrowsGroups(Wrapper):
        def get_observations(self):
            return self.pack({"policy": self.env.obs()["policy"]})

    assert only(GrowsGroups()).name == "observations-format"


def test_observations_overwritten():
    class Reuses(Wrapper):
        buffer = torch.zeros(E, A)

        def pack(self, obs):
            return super().pack(obs | {"policy": self.buffer.copy_(obs["policy"])})

        def step(self, actions):
            *result, extras = super().step(actions)
            return *result, {name: extras[name] for name in ("terminated",)}

    env = Reuses()
    env.cfg.is_finite_horizon = True
    assert only(env, config()).name == "observations-overwritten"


def test_reused_buffer_of_a_constant_is_fine():
    class Constant(Simulator):
        height_map = torch.ones(E, 3)

        def obs(self):
            return super().obs() | {"map": self.height_map}

    assert names(Wrapper(Constant())) == []


def test_buffers_of_rewards_and_dones_may_be_reused():
    class Reuses(Wrapper):
        rewards, dones, time_outs = torch.zeros(E), torch.zeros(E, dtype=torch.long), torch.zeros(E, dtype=torch.bool)

        def finish(self, rewards, dones, extras):
            extras["time_outs"] = self.time_outs.copy_(extras["time_outs"])
            return self.rewards.copy_(rewards), self.dones.copy_(dones), extras

    assert names(Reuses(), config()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_observations(bad):
    class Diverges(Simulator):
        def obs(self):
            obs = super().obs()
            obs["policy"][3, 1] = bad
            return obs

    finding = only(Wrapper(Diverges()), config())
    assert finding.name == "non-finite-observations" and "1 of 8 environments" in finding.reason


# --- rewards, dones, extras -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rewards(bad):
    class Diverges(Wrapper):
        def finish(self, rewards, dones, extras):
            return torch.where(torch.arange(E) == 2, bad, rewards), dones, extras

    finding = only(Diverges(), config())
    assert finding.name == "non-finite-rewards" and "1 of 8 environments" in finding.reason


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rewards-format", lambda r, d, x: (r[:, None], d, x)),
        ("rewards-format", lambda r, d, x: (r.long(), d, x)),
        ("rewards-format", lambda r, d, x: (r.numpy(), d, x)),
        ("dones-format", lambda r, d, x: (r, d[:, None], x)),
        ("dones-format", lambda r, d, x: (r, d.float(), x)),
        ("time-outs-format", lambda r, d, x: (r, d, x | {"time_outs": x["time_outs"][:, None]})),
        ("terminated-format", lambda r, d, x: (r, d, x | {"terminated": x["terminated"][0]})),
        ("device-mix", lambda r, d, x: (r.to("meta"), d, x)),
        ("device-mix", lambda r, d, x: (r, d, x | {"time_outs": x["time_outs"].to("meta")})),
        ("device-mix", lambda r, d, x: (r, d, x | {"final_obs": x["final_obs"].to("meta")})),
        ("step-result", lambda r, d, x: (r, d, d, x)),
        ("step-result", lambda r, d, x: (r, d, [])),
    ],
)
def test_form_of_what_step_returns(name, change):
    class OtherForm(Wrapper):
        def finish(self, rewards, dones, extras):
            return change(rewards, dones, extras)

    assert only(OtherForm(), config()).name == name


def test_dones_may_be_bool():
    class Bool(Wrapper):
        def finish(self, rewards, dones, extras):
            return rewards, dones.bool(), extras

    assert names(Bool(), config()) == []


class SlowFall(Simulator):
    """Terminates after some 80 steps."""

    limit = 1000

    def push(self, actions):
        return 0.003 * actions + 0.025


@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize("simulator", [Simulator, SlowFall])
def test_time_outs_at_terminations(is_published, simulator):
    class TruncatedAsItIs(Wrapper):
        """As the wrappers of Isaac Lab and mjlab, which do not publish what was terminated."""

        max_episode_length = simulator.limit

        def step(self, actions):
            obs, before_reset, rewards, terminated, truncated = self.env.step(actions)
            extras = {"time_outs": truncated, "final_obs": self.pack(before_reset)}
            extras |= {"terminated": terminated} if is_published else {}
            return self.pack(obs), rewards, (terminated | truncated).long(), extras

    assert only(TruncatedAsItIs(simulator()), config()).name == "time-outs-at-terminations"


@pytest.mark.parametrize("moves", [True, False])
def test_a_fall_is_not_waited_for_where_the_limit_cannot_meet_it(moves):
    class Counts(Wrapper):
        max_episode_length, steps = 1000, 0
        if not moves:
            episode_length_buf = torch.zeros(E, dtype=torch.long)  # the simulator counts for itself

        def step(self, actions):
            self.steps += 1
            return super().step(actions)

    class Rests(SlowFall):
        def push(self, actions):
            return 0.0 * actions

    env = Counts(Rests())
    assert names(env, steps=16) == []
    assert env.steps == 16 + 64 * moves


def test_time_outs_without_done():
    class Stale(Wrapper):
        kept = None

        def finish(self, rewards, dones, extras):
            if extras["time_outs"].all() and self.kept is None:
                self.kept = extras["time_outs"] & False | (torch.arange(E) == 0)
            if self.kept is not None and not dones[0]:
                extras["time_outs"] = self.kept
            return rewards, dones, extras

    assert only(Stale()).name == "time-outs-without-done"


@pytest.mark.parametrize("time_outs", ["absent", "false"])
@pytest.mark.parametrize("moves", [True, False])
def test_time_limit_that_is_not_marked(time_outs, moves):
    class Unmarked(Wrapper):
        if not moves:
            episode_length_buf = torch.zeros(E, dtype=torch.long)  # the simulator counts for itself

        def step(self, actions):
            obs, before_reset, rewards, terminated, truncated = self.env.step(actions)
            extras = {"terminated": terminated | truncated, "final_obs": self.pack(before_reset)}
            extras |= {"time_outs": torch.zeros(E, dtype=torch.bool)} if time_outs == "false" else {}
            return self.pack(obs), rewards, (terminated | truncated).long(), extras

    assert only(Unmarked(), config()).name == "time-out-not-marked"


class Terms:
    """As the termination managers of Isaac Lab and mjlab."""

    def __init__(self, **terms) -> None:
        self.active_terms = list(terms)
        self.get_term_cfg = terms.__getitem__


def time_out(env):
    return env.episode_length_buf >= LIMIT


def fell_over(env):
    return env.place.abs().amax(-1) > 2.0


@pytest.mark.parametrize(("term", "function"), [("limit_reached", time_out), ("time_out", lambda env: time_out(env))])
def test_termination_term_that_is_not_marked(term, function):
    env = Wrapper()
    fell = SimpleNamespace(func=fell_over, time_out=False)
    env.env.termination_manager = Terms(fell=fell, **{term: SimpleNamespace(func=function, time_out=True)})
    assert names(env) == []
    env.env.termination_manager = Terms(fell=fell, **{term: SimpleNamespace(func=function, time_out=False)})
    assert repr(term) in only(env).reason


def test_missing_final_observations_are_a_note():
    class NoFinalObs(Wrapper):
        def finish(self, rewards, dones, extras):
            del extras["final_obs"]
            return rewards, dones, extras

    finding = only(NoFinalObs(), config())
    assert finding.name == "no-final-obs" and finding.is_note and str(finding).startswith("note: ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_final_observations(bad):
    """At time-outs; what a termination leaves nobody looks at."""

    class Diverges(Wrapper):
        at = "time_outs"

        def finish(self, rewards, dones, extras):
            extras["final_obs"]["policy"][extras[self.at]] = bad
            return rewards, dones, extras

    finding = only(Diverges(), config())
    assert finding.name == "non-finite-final-obs" and "extras['final_obs']['policy']" in finding.reason
    Diverges.at = "terminated"
    assert names(Diverges(), config()) == []


class FinalObs(Wrapper):
    """A wrapper that hands out other final observations."""

    before = first = None

    def step(self, actions):
        self.before = self.pack(self.env.obs())
        obs, rewards, dones, extras = super().step(actions)
        if self.first is None:
            self.first = extras["final_obs"]
        self.ended = dones > 0
        extras["final_obs"] = self.final(obs, extras["final_obs"])
        return obs, rewards, dones, extras


@pytest.mark.parametrize(
    ("final", "reason"),
    [
        (lambda self, obs, right: obs, "first observation of the next episode"),
        (lambda self, obs, right: self.before, "before the last step"),
        (lambda self, obs, right: self.first, "of an earlier step"),
        (lambda self, obs, right: {"policy": right["policy"], "privileged": obs["privileged"]}, "['privileged']"),
        (lambda self, obs, right: {"policy": right["policy"]}, "'privileged' is missing"),
        (lambda self, obs, right: {**right.to_dict(), "policy": right["policy"][:1]}, "'policy' is (1, 2)"),
        (lambda self, obs, right: right["policy"], "missing"),
        (lambda self, obs, right: torch.cat([right[self.ended], right[~self.ended]]), "in the row of another"),
        (lambda self, obs, right: right.roll(1, dims=0), "in the row of another"),
    ],
)
def test_wrong_final_observations(final, reason):
    env = FinalObs()
    env.final = final.__get__(env)
    finding = only(env, config())
    assert finding.name == "wrong-final-obs" and reason in finding.reason and "In Gymnasium" in finding.mend


def test_final_observations_without_the_rows_that_go_on():
    """Where all end at once they fit; so the steps in which some terminate are looked at, too."""

    class OnlyEnded(FinalObs):
        def final(self, obs, right):
            return right[self.ended]

    finding = only(OnlyEnded(), config(), steps=8)
    assert finding.name == "wrong-final-obs" and "not (8, 2)" in finding.reason


def test_final_observations_of_ended_episodes_alone_are_fine():
    """Isaac Lab leaves the key in extras; what it holds matters only where an episode has ended."""

    class OnlyWhereDone(FinalObs):
        kept = None

        def final(self, obs, right):
            ended = self.env.episode_length_buf == 0
            self.kept = right.to_dict() if ended.any() or self.kept is None else self.kept
            return self.kept

    assert names(OnlyWhereDone(), config()) == []


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["step", "get_observations", "reset"])
def test_errors_of_the_environment_are_findings(method):
    class Raises(Wrapper):
        def get_observations(self):
            return self.pack(self.env.obs())

        def reset(self):
            self.env.reset()

    def fail(self, *args):
        raise IndexError("joint 7 is\nout of range")

    setattr(Raises, method, fail)
    finding = only(Raises(), config())
    assert finding.name == "environment-error"
    assert f"{method}() raised IndexError: joint 7 is out of range" in str(finding)


def test_interruption_is_no_finding():
    class Interrupted(Wrapper):
        def step(self, actions):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_env(Interrupted())


# --- the first mini-batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"algorithm": {}}, {"actor": None}, {"num_steps_per_env": "many"}])
def test_config_that_gives_no_algorithm(fault):
    assert only(Wrapper(), {**config(), **fault}).name == "train-config"


def test_unknown_argument_of_the_algorithm_is_named():
    finding = only(Wrapper(), config(learning_rat=1e-3))
    assert finding.name == "train-config" and "learning_rat" in finding.reason


class MovesNormalizer(PPO):
    """As rsl_rl 5.4."""

    def process_env_step(self, obs, rewards, dones, extras):
        self.actor.update_normalization(obs)
        super().process_env_step(obs, rewards, dones, extras)


class StoresClippedActions(PPO):
    def process_env_step(self, obs, rewards, dones, extras):
        self.transition.actions = self.transition.actions.clamp(-1.0, 1.0)
        super().process_env_step(obs, rewards, dones, extras)


class ActorWithDropout(MLPModel):
    def get_latent(self, obs, masks=None, hidden_state=None):
        return torch.nn.functional.dropout(super().get_latent(obs, masks, hidden_state), 0.1, self.training)


@pytest.mark.parametrize("in_update", [False, True])  # rsl_rl 5.4, 5.5
def test_first_kl_of_a_moved_normalizer(in_update, monkeypatch):
    file = importlib.import_module("pyfast_ppo._check_env.first_kl")
    monkeypatch.setattr(file, "NORMALIZES_IN_UPDATE", in_update)
    cfg = config(class_name=MovesNormalizer)
    cfg["actor"]["obs_normalization"] = True
    finding = only(Wrapper(), cfg)
    assert finding.name == "first-kl" and "obs_normalizer moved" in finding.reason
    assert finding.is_note == (not in_update)


def test_first_kl_of_dropout():
    cfg = config()
    cfg["actor"]["class_name"] = ActorWithDropout
    finding = only(Wrapper(), cfg)
    assert finding.name == "first-kl" and "dropout" in finding.reason


def test_first_kl_of_clipped_actions():
    finding = only(Wrapper(), config(class_name=StoresClippedActions))
    assert finding.name == "first-kl" and "not the one that has acted" in finding.reason


@pytest.mark.skipif(
    "use_mixed_precision" not in inspect.signature(PPO.__init__).parameters, reason="this rsl_rl has no mixed precision"
)
def test_first_kl_of_mixed_precision_is_a_note():
    finding = only(Wrapper(), config(use_mixed_precision=True))
    assert finding.name == "first-kl" and "mixed precision" in finding.reason and finding.is_note


def test_large_observations_round_coarsely():
    class InMillimetres(Simulator):
        def obs(self):
            return {name: 1e4 * values for name, values in super().obs().items()}

    cfg = config()
    cfg["actor"]["obs_normalization"] = False
    cfg["actor"]["activation"] = "elu"
    assert names(Wrapper(InMillimetres()), cfg) == []


# --- the page ---------------------------------------------------------------------------------------------------------


def test_each_finding_is_a_row_of_the_page():
    root = Path(__file__).parents[1]
    source = "".join(path.read_text() for path in (root / "pyfast_ppo" / "_check_env").glob("*.py"))
    names_in_source = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source))
    names_in_source |= {f"{name}-format" for name in ("rewards", "dones", "time-outs", "terminated")}
    rows = [line for line in (root / "docs" / "check_env.md").read_text().splitlines() if line.startswith("| `")]
    names_on_page = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])}
    assert names_on_page == names_in_source
