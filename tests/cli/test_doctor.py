"""The report names versions, hardware and backends; with a task it says what is wrong with that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from types import ModuleType

import gymnasium
import numpy as np
import pytest
import torch

import pyfast_ppo
from pyfast_ppo import backends
from pyfast_ppo.cli.simulators import SIMULATORS
from pyfast_ppo.gymnasium import GymnasiumVecEnv


@dataclass
class Status:
    name: str
    available: bool
    reason: str | None
    detail: str


def test_each_backend_is_available_or_has_a_reason(run_command, monkeypatch):
    rows = [Status("cpu", True, None, "avx512"), Status("cuda", False, "no CUDA device", "")]
    monkeypatch.setattr(backends, "status", lambda: rows)
    outcome = run_command("doctor")
    assert outcome.code == 0
    lines = [line.split(maxsplit=2) for line in outcome.out.splitlines()]
    assert ["cpu", "available", "avx512"] in lines
    assert ["cuda", "unavailable", "no CUDA device"] in lines


def test_real_backends_are_all_listed(run_command):
    out = run_command("doctor").out.partition("Backends")[2]
    listed = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert listed == [status.name for status in backends.status()]


def test_versions(run_command, monkeypatch):
    version = importlib.metadata.version

    def without_triton(package):
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_triton)
    lines = [line.split(maxsplit=1) for line in run_command("doctor").out.splitlines()]
    assert ["pyfast_ppo", pyfast_ppo.__version__] in lines
    assert ["python", platform.python_version()] in lines
    assert ["torch", version("torch")] in lines  # torch.__version__ also says for which CUDA it was built
    assert ["triton", "not installed"] in lines


@pytest.mark.parametrize("flags", [[], ["--env", "InvertedPendulum-v5", "--num-envs", 1, "--steps", 4]])
def test_reader_that_goes_away_is_no_error(run_command, monkeypatch, flags):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_command("doctor", *flags).code == 0


def test_cuda_devices_or_their_absence(run_command):
    names = [line.split()[0] for line in run_command("doctor").out.splitlines() if line.strip()]
    expected = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert all(name in names for name in [*expected, "cpu"])
    assert ("no device" in run_command("doctor").out) == (not expected)


def test_nothing_is_found_in_a_sound_task(run_command):
    outcome = run_command("doctor", "--env", "InvertedPendulum-v5", "--num-envs", 2, "--steps", 8)
    assert outcome.code == 0
    assert outcome.out == "InvertedPendulum-v5: nothing found in 8 steps of 2 environments.\n"


def test_findings_are_printed_and_are_the_exit_code(run_command, monkeypatch):
    step = GymnasiumVecEnv.step

    def without_final_obs(self, actions):
        *result, extras = step(self, actions)
        return *result, {"time_outs": torch.ones(self.num_envs), "terminated": extras["terminated"]}

    monkeypatch.setattr(GymnasiumVecEnv, "step", without_final_obs)
    outcome = run_command("doctor", "--env", "InvertedPendulum-v5", "--num-envs", 2, "--steps", 8)
    assert outcome.code == 1
    assert outcome.out.startswith("time-outs-format: ")


def test_notes_alone_are_no_failure(run_command, monkeypatch):
    step = GymnasiumVecEnv.step

    def without_final_obs(self, actions):
        obs, rewards, *_ = step(self, actions)
        ended = torch.ones(self.num_envs, dtype=torch.long)
        return obs, rewards, ended, {"time_outs": ended.bool()}

    monkeypatch.setattr(GymnasiumVecEnv, "step", without_final_obs)
    outcome = run_command("doctor", "--env", "InvertedPendulum-v5", "--num-envs", 2, "--steps", 8)
    assert outcome.code == 0
    assert outcome.out.startswith("note: no-final-obs: ") and len(outcome.out.splitlines()) == 1


class Camera(gymnasium.Env):
    """Its picture has the channels last, and is handed out flat."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 9, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


gymnasium.register("FastPPOCamera-v0", entry_point=Camera, max_episode_steps=5)


def test_a_flat_image_is_found_and_is_not_trained(run_command):
    outcome = run_command("doctor", "--env", "FastPPOCamera-v0", "--num-envs", 2, "--steps", 8)
    assert outcome.code == 1
    assert outcome.out.startswith("flat-image: ") and "(8, 9, 3)" in outcome.out
    outcome = run_command("train", "--env", "FastPPOCamera-v0")
    assert outcome.code == 2
    assert "'policy' is an image" in outcome.err and "CNNModel" in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "InvertedPendulum-v99"], "no Gymnasium task"),
        (["--env", ""], "no Gymnasium task ''"),
        (["--task", ""], "needs Isaac Lab or mjlab"),
        (["--env", "CartPole-v1"], "Box with a float dtype"),
        (["--steps", 3], "--steps goes with --env or --task"),
        (["--num-envs", 3], "--num-envs goes with --env or --task"),
        (["--env", "InvertedPendulum-v5", "--device", "no_such_device"], "--device no_such_device cannot be used"),
    ],
)
def test_wrong_arguments_are_explained(run_command, flags, message):
    outcome = run_command("doctor", *flags)
    assert outcome.code == 2
    assert message in outcome.err and len(outcome.err.splitlines()) == 1


@pytest.fixture
def simulators(monkeypatch):
    """Modules in place of those that need a simulator; each has one task, and remembers what it was asked for."""
    modules = {}
    for package in SIMULATORS.values():
        module = modules[package] = ModuleType(f"pyfast_ppo.{package}")
        module.asked = []
        monkeypatch.setitem(sys.modules, module.__name__, module)

        def make(task, num_envs, device, seed, module=module):
            module.asked.append((task, num_envs, device))
            if task not in module.tasks:
                raise ValueError(f"{module.__name__} has no task {task!r}.")
            return GymnasiumVecEnv("InvertedPendulum-v5", num_envs, device=device, seed=seed), None

        module.make = make
    modules["isaaclab"].tasks = ["Isaac-Pole"]
    modules["mjlab"].tasks = ["Mjlab-Pole", "Pole"]
    return modules


@pytest.mark.parametrize(("task", "package"), [("Isaac-Pole", "isaaclab"), ("Mjlab-Pole", "mjlab")])
def test_a_simulator_is_chosen_by_the_name_of_its_task(run_command, simulators, task, package):
    outcome = run_command("doctor", "--task", task, "--num-envs", 1, "--steps", 4, "--device", "cpu")
    assert (outcome.code, outcome.out) == (0, f"{task}: nothing found in 4 steps of 1 environment.\n")
    assert {name: module.asked for name, module in simulators.items() if module.asked} == {package: [(task, 1, "cpu")]}


def test_each_installed_simulator_is_asked_for_other_names(run_command, simulators, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert run_command("doctor", "--task", "Pole", "--steps", 4, "--device", "cpu").code == 0
    assert [len(module.asked) for module in simulators.values()] == [1, 1]
    outcome = run_command("doctor", "--task", "Pond", "--device", "cpu")
    assert outcome.code == 2
    assert "isaaclab has no task 'Pond'" in outcome.err and "mjlab has no task 'Pond'" in outcome.err


def test_simulators_that_are_missing_are_named(run_command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = run_command("doctor", "--task", "Pole")
    assert outcome.code == 2 and "needs Isaac Lab or mjlab" in outcome.err
    outcome = run_command("doctor", "--env", "InvertedPendulum-v5")
    assert outcome.code == 2 and "pip install 'pyfast-ppo[gym]'" in outcome.err


@pytest.mark.parametrize("package", SIMULATORS.values())
def test_import_errors_of_a_simulator_are_shown(run_command, monkeypatch, package):
    monkeypatch.setitem(sys.modules, f"pyfast_ppo.{package}", None)
    prefix = next(prefix for prefix, name in SIMULATORS.items() if name == package)
    outcome = run_command("doctor", "--task", f"{prefix}Pole", "--device", "cpu")
    assert outcome.code == 2 and f"--task {prefix}Pole cannot be made: " in outcome.err
