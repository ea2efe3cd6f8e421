"""``train --task``: a simulator's task. Here it is a stand-in; tests/isaaclab and tests/mjlab train real ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import gymnasium
import pytest
import torch

from pyfast_ppo.cli.train_config import Settings, train_config
from pyfast_ppo.gymnasium import GymnasiumVecEnv


class StandIn(GymnasiumVecEnv):
    """Counts its steps, as the simulators' environments do, and remembers."""

    common_step_counter = 0

    def __init__(self, *args, **kwargs) -> None:
        self.counters_at_resets = []
        self.ages = []
        super().__init__(*args, **kwargs)

    def reset(self, seed=None):
        self.counters_at_resets.append(self.common_step_counter)
        return super().reset(seed)

    def step(self, actions):
        self.ages.append(self.episode_length_buf.tolist())
        self.common_step_counter += 1
        return super().step(actions)


class Eyes(gymnasium.Env):
    """Sees a picture, and where ``flat`` says so two numbers besides."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, flat: bool) -> None:
        spaces = {"image": gymnasium.spaces.Box(-1.0, 1.0, (1, 6, 5))}
        spaces |= {"flat": gymnasium.spaces.Box(-1.0, 1.0, (2,))} if flat else {}
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def _obs(self):
        return {name: self.np_random.uniform(-1, 1, s.shape) for name, s in self.observation_space.items()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), float(action.sum()), False, False, {}


@dataclass
class Simulator:
    """What stands in for pyfast_ppo.mjlab."""

    asked: list[dict] = field(default_factory=list)
    envs: list[StandIn] = field(default_factory=list)
    env: str | Callable = "InvertedPendulum-v5"
    config: dict = field(default_factory=dict)  # over that of the task


@pytest.fixture
def mjlab(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    simulator = Simulator()

    def make(task: str, num_envs: int, device: str, seed: int) -> tuple[StandIn, dict]:
        if task != "Mjlab-Stand-In":
            raise ValueError(f"mjlab has no task {task!r}")
        simulator.asked.append({"num_envs": num_envs, "device": device, "seed": seed})
        config = train_config(Settings(algorithm="stock"), ["policy"])
        config |= {"max_iterations": 2, "num_steps_per_env": 8, "logger": "wandb", "clip_actions": None}
        simulator.envs.append(StandIn(simulator.env, num_envs, seed=seed))
        return simulator.envs[-1], config | simulator.config

    module = ModuleType("pyfast_ppo.mjlab")
    module.make = make
    monkeypatch.setitem(sys.modules, "pyfast_ppo.mjlab", module)
    return simulator


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("algorithm", "class_name"), [("fused", "pyfast_ppo.rsl_rl:FusedPPO"), ("stock", "PPO")]
)  # fmt: skip
def test_a_task_is_trained_as_its_config_says(run_command, mjlab, tmp_path, algorithm, class_name):
    flags = ("--task", "Mjlab-Stand-In", "--num-envs", 2, "--device", "cpu", "--algorithm", algorithm, "--seed", 7)
    outcome = run_command("train", *flags, "--log-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert mjlab.asked == [{"num_envs": 2, "device": "cpu", "seed": 7}]
    assert "2 environments, 2 iterations of 16 steps" in outcome.out
    config = config_of(tmp_path)
    assert config["train_config"]["algorithm"]["class_name"] == class_name
    assert config["train_config"]["logger"] == "tensorboard"
    assert config["settings"]["iterations"] == 2
    assert {"model_1.pt", "policy.pt", "learning_curve.png", "progress.csv"} <= {p.name for p in tmp_path.iterdir()}
    assert "the task names no threshold" in outcome.out


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_a_task_multiplies_as_the_simulators_scripts(run_command, mjlab, tmp_path, full_precision):
    flags = ("--num-envs", 2, "--iterations", 1, "--device", "cpu")
    assert run_command("train", *flags, "--log-dir", tmp_path / "gym").code == 0
    assert not torch.backends.cuda.matmul.allow_tf32
    assert run_command("train", "--task", "Mjlab-Stand-In", *flags, "--log-dir", tmp_path / "task").code == 0
    assert torch.backends.cuda.matmul.allow_tf32


def test_a_run_of_a_task_is_resumed(run_command, mjlab, tmp_path):
    run_command("train", "--task", "Mjlab-Stand-In", "--num-envs", 2, "--device", "cpu", "--log-dir", tmp_path)
    outcome = run_command("train", "--resume", tmp_path, "--iterations", 3)
    assert outcome.code == 0, outcome.err
    assert len(mjlab.asked) == 2
    assert torch.load(tmp_path / "model_2.pt", weights_only=True)["iter"] == 2
    other = run_command("train", "--resume", tmp_path, "--task", "Mjlab-Other", "--iterations", 4)
    assert other.code == 2 and "is a run of Mjlab-Stand-In, not of Mjlab-Other" in other.err


def test_a_resumed_curriculum_goes_on(run_command, mjlab, tmp_path):
    """Before the reset, whose episodes are to be those of the step that the run had reached."""
    flags = ("--task", "Mjlab-Stand-In", "--num-envs", 2, "--device", "cpu")
    run_command("train", *flags, "--log-dir", tmp_path)
    saved = torch.load(tmp_path / "model_1.pt", weights_only=True)
    assert saved["infos"]["env_state"] == {"common_step_counter": 16}  # as mjlab's own runner has it
    assert run_command("train", "--resume", tmp_path, "--iterations", 3).code == 0
    first, resumed = mjlab.envs
    assert first.counters_at_resets == [0] and resumed.counters_at_resets == [0, 16]
    assert resumed.common_step_counter == 24


@pytest.mark.parametrize("random", [True, False])
def test_first_episodes_begin_at_random_times(run_command, mjlab, tmp_path, random):
    """After a resume, too; Isaac Lab's config may say that they are not to."""
    mjlab.config = {} if random else {"init_at_random_ep_len": False}
    run_command("train", "--task", "Mjlab-Stand-In", "--num-envs", 4, "--device", "cpu", "--log-dir", tmp_path)
    run_command("train", "--resume", tmp_path, "--iterations", 3)
    assert [len(set(env.ages[0])) > 1 for env in mjlab.envs] == [random, random]


# rsl_rl's normalizer needs numbers beside the image
CNN = {"class_name": "CNNModel", "cnn_cfg": {"output_channels": [2], "kernel_size": 3}, "obs_normalization": False}
GRU = {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8, "rnn_num_layers": 1}
LSTM = GRU | {"rnn_type": "lstm", "rnn_num_layers": 2}


@pytest.mark.parametrize(
    ("network", "env", "groups", "inputs"),
    [
        (GRU, "InvertedPendulum-v5", ["policy"], [(1, 4)]),
        (LSTM, "InvertedPendulum-v5", ["policy"], [(1, 4)]),
        (CNN, lambda: Eyes(True), ["image", "flat"], [(3, 2), (3, 1, 6, 5)]),
        (CNN, lambda: Eyes(False), ["image"], [(3, 0), (3, 1, 6, 5)]),
    ],
    ids=["gru", "lstm", "cnn", "image-only"],
)
def test_policies_of_every_kind_are_exported(run_command, mjlab, tmp_path, network, env, groups, inputs):
    config = train_config(Settings(), groups)
    mjlab.env = env
    mjlab.config = {name: config[name] | network for name in ("actor", "critic")} | {"obs_groups": config["obs_groups"]}
    flags = ("--task", "Mjlab-Stand-In", "--num-envs", 4, "--iterations", 1, "--device", "cpu")
    outcome = run_command("train", *flags, "--log-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    flat, *images = map(torch.zeros, inputs)
    with torch.inference_mode():
        actions = torch.jit.load(tmp_path / "policy.pt")(flat, *([images] if images else []))
    assert actions.shape == (len(flat), mjlab.envs[0].num_actions)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--task", "Mjlab-Nothing"), ("--task Mjlab-Nothing cannot be made", "mjlab has no task")),
        (("--task", "Isaac-Cartpole-Direct"), ("--task Isaac-Cartpole-Direct cannot be made", "isaaclab")),
        (("--task", "Hopper-v5"), ("needs Isaac Lab or mjlab, and neither is installed", "--env takes Gymnasium's")),
    ],
)
def test_what_cannot_be_made_is_told_in_a_sentence(run_command, mjlab, tmp_path, flags, parts):
    outcome = run_command("train", *flags, "--log-dir", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err.startswith("pyfast-ppo: ") and outcome.err.count("\n") == 1, outcome.err
    for part in parts:
        assert part in outcome.err
    assert not (tmp_path / "run").exists()


def test_env_and_task_exclude_each_other(run_command, capsys):
    with pytest.raises(SystemExit):
        run_command("train", "--env", "Hopper-v5", "--task", "Mjlab-Stand-In")
    assert "not allowed with argument" in capsys.readouterr().err
