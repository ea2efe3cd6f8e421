"""``train --task``: a simulator's task. Here it is a stand-in; tests/isaaclab and tests/mjlab train real ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from pyfast_ppo.cli.train_config import Settings, train_config
from pyfast_ppo.gymnasium import GymnasiumVecEnv


@pytest.fixture
def mjlab(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A module in the place of pyfast_ppo.mjlab; what it was asked for."""
    asked = []

    def make(task: str, num_envs: int, device: str, seed: int) -> tuple[GymnasiumVecEnv, dict]:
        if task != "Mjlab-Stand-In":
            raise ValueError(f"mjlab has no task {task!r}")
        asked.append({"num_envs": num_envs, "device": device, "seed": seed})
        config = train_config(Settings(algorithm="stock"), ["policy"])
        config |= {"max_iterations": 2, "num_steps_per_env": 8, "logger": "wandb", "clip_actions": None}
        return GymnasiumVecEnv("InvertedPendulum-v5", num_envs, seed=seed), config

    module = ModuleType("pyfast_ppo.mjlab")
    module.make = make
    monkeypatch.setitem(sys.modules, "pyfast_ppo.mjlab", module)
    return asked


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("algorithm", "class_name"), [("fused", "pyfast_ppo.rsl_rl:FusedPPO"), ("stock", "PPO")]
)  # fmt: skip
def test_a_task_is_trained_as_its_config_says(run_command, mjlab, tmp_path, algorithm, class_name):
    flags = ("--task", "Mjlab-Stand-In", "--num-envs", 2, "--device", "cpu", "--algorithm", algorithm, "--seed", 7)
    outcome = run_command("train", *flags, "--log-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert mjlab == [{"num_envs": 2, "device": "cpu", "seed": 7}]
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
    assert len(mjlab) == 2
    assert torch.load(tmp_path / "model_2.pt", weights_only=True)["iter"] == 2
    other = run_command("train", "--resume", tmp_path, "--task", "Mjlab-Other", "--iterations", 4)
    assert other.code == 2 and "is a run of Mjlab-Stand-In, not of Mjlab-Other" in other.err


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
