"""pyfast_ppo.mjlab with the real mjlab, on the CPU.

The scripts in runs/ do the work, in mjlab's own virtual environment; here it says what must come out.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

CARTPOLE = "Mjlab-Cartpole-Balance"
ROUGH = "Mjlab-Velocity-Rough-Unitree-Go1"  # commands, contacts, ray casts, a terrain curriculum
FLAT = "Mjlab-Velocity-Flat-Unitree-Go1"


@pytest.fixture(scope="module")
def trajectories(mjlab: Any) -> dict[str, Any]:
    return mjlab.run("trajectories.py", CARTPOLE, ROUGH)


@pytest.fixture(scope="module")
def final_frames(mjlab: Any) -> dict[str, Any]:
    return mjlab.run("final_frames.py", CARTPOLE, ROUGH)


@pytest.fixture(scope="module")
def behaviour(mjlab: Any) -> dict[str, Any]:
    return mjlab.run("behaviour.py")


@pytest.mark.skipif(importlib.util.find_spec("mjlab") is not None, reason="mjlab is installed")
def test_without_mjlab_the_import_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", "import pyfast_ppo.mjlab"], capture_output=True, text=True)
    assert "pip install 'mjlab>=1.6,<1.7'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("task", [CARTPOLE, ROUGH])
class TestTrajectories:
    def test_bit_identical_to_the_stock(self, trajectories, task):
        # observations with noise, delays and history, rewards, log, simulation, commands, random numbers, recorders
        assert trajectories[task]["differences"] == []
        assert trajectories[task]["recorded"] > 40

    def test_final_obs_only_in_steps_with_a_reset(self, trajectories, task):
        dones = [any(row) for row in trajectories[task]["dones"]]
        assert trajectories[task]["has_final_obs"] == dones
        assert 5 < sum(dones) < len(dones) - 5

    def test_a_row_that_terminated_has_no_time_out(self, trajectories, task):
        seen = trajectories[task]
        both = 0
        for dones, terminated, time_outs, stock in zip(
            seen["dones"], seen["terminated"], seen["time_outs"], seen["stock_time_outs"], strict=True
        ):
            assert time_outs == [t and not e for t, e in zip(stock, terminated, strict=True)]
            assert dones == [t or e for t, e in zip(time_outs, terminated, strict=True)]
            both += sum(t and e for t, e in zip(stock, terminated, strict=True))
        assert both > 0  # the case was there

    def test_the_log_has_entries(self, trajectories, task):
        assert max(trajectories[task]["log_keys"]) >= 3


@pytest.mark.parametrize("task", [CARTPOLE, ROUGH])
class TestFinalFrames:
    def test_is_the_frame_of_an_episode_that_goes_on(self, final_frames, task):
        seen = final_frames[task]
        assert seen["dones"] == [1, 1, 0, 0, 0, 0]
        assert seen["other_dones"] == [0, 1, 0, 0, 0, 0]
        assert seen["groups"] == ["actor", "critic"]
        assert seen["is_terminal_frame"] == [True, True]

    def test_is_neither_the_next_episode_nor_the_step_before(self, final_frames, task):
        assert final_frames[task]["is_next_episode"] == [False, False]
        assert final_frames[task]["is_frame_before"] == [False, False]

    def test_rows_that_go_on_have_what_is_returned(self, final_frames, task):
        assert final_frames[task]["others_are_returned"] == [True, True]


class TestClip:
    def test_only_the_executed_action_is_clipped(self, behaviour):
        seen = behaviour["clip"]
        assert seen["given_is_unchanged"]
        assert seen["executed"] == seen["clipped"]
        assert seen["bounds"] == [[-0.5], [0.25]]

    def test_the_action_space_is_cut_to_it(self, behaviour):
        assert behaviour["clip"]["single"] == [-0.5, 0.25]
        assert behaviour["clip"]["batched"] == [-0.5, 0.25, [6, 1]]

    def test_a_tighter_space_stays_in_force(self, behaviour):
        seen = behaviour["clip_and_declared_space"]
        assert seen["tighter"] == [-0.3, 1.0]
        assert seen["executed"] == pytest.approx(-0.3)

    def test_a_second_wrapper_has_its_own_clip(self, behaviour):
        assert behaviour["clip_and_declared_space"]["again"] == pytest.approx([-0.3, 1.5, 1.5])

    def test_without_a_clip_the_space_is_left_alone(self, behaviour):
        assert behaviour["clip_and_declared_space"]["none"] == [None, True]

    def test_refuses_what_does_not_fit(self, behaviour):
        seen = behaviour["clip_and_declared_space"]
        assert "declare a Box" in seen["not_a_box"]
        assert "clip_actions: low must be one number or 1" in seen["one_per_joint"]


class TestObservationSpace:
    def test_matches_the_returned_groups(self, behaviour):
        assert behaviour["observation_space"]["as_declared"]
        assert behaviour["observation_space"]["matches"]

    def test_a_missing_group_is_an_error_with_those_that_there_are(self, behaviour):
        assert "'privileged'" in behaviour["observation_space"]["missing_group"]
        assert "available: 'actor', 'critic'" in behaviour["observation_space"]["missing_group"]


class TestExtras:
    def test_nothing_returned_changes_later(self, behaviour):
        assert behaviour["extras"]["changed"] == []
        assert behaviour["extras"]["new_dicts"] == 12
        assert behaviour["extras"]["dtypes"] == ["torch.bool"]

    def test_the_environment_keeps_only_its_own(self, behaviour):
        assert behaviour["extras"]["env_extras"] == ["log"]
        assert behaviour["extras"]["sim_reset_is_own"]

    def test_switches(self, behaviour):
        seen = behaviour["switches"]
        assert seen["without"] == ["log", "terminated", "time_outs"]
        assert seen["finite_horizon_stock"] == ["log"]
        assert seen["finite_horizon"] == ["final_obs", "log", "terminated"]
        assert seen["in_recorder"] == ["final_obs", "log", "terminated", "time_outs"]

    def test_environments_that_cannot_be_wrapped(self, behaviour):
        assert behaviour["switches"]["manual"].startswith("ValueError: env has cfg.auto_reset=False")
        assert behaviour["switches"]["other_reset"].startswith("RuntimeError: this version of mjlab")


def test_a_diverged_row_does_not_spoil_the_final_observations(behaviour):
    """The others'; its own is handed out as it is, so that nobody takes a value from made-up numbers."""
    seen = behaviour["diverged"]
    assert seen["dones"] == [0, 0, 1, 0, 0, 0]
    assert seen["terminated"] == [False, False, True, False, False, False]
    assert seen["obs_finite"] and seen["policy"]
    assert seen["final_finite"] == [True, True, False, True, True, True]


def test_steps_in_and_out_of_inference_mode(behaviour):
    assert behaviour["modes"]["gradient"]


def test_the_host_waits_no_more_often_than_in_the_stock(behaviour):
    assert behaviour["host_waits"]["ours"] == behaviour["host_waits"]["stock"]
    without_reset, with_reset = behaviour["host_waits"]["stock"]
    assert 0 < sum(without_reset.values()) < sum(with_reset.values())  # the counter counts


def test_an_error_in_the_step_leaves_no_hook(behaviour):
    assert behaviour["failing_step"]["error"].startswith("ValueError: Invalid action shape")
    assert behaviour["failing_step"]["sim_reset_is_own"]


class TestMake:
    def test_environment_and_config(self, behaviour):
        seen = behaviour["made"]
        assert seen["type"] == ["pyfast_ppo.mjlab", "RslRlVecEnvWrapper"]
        assert seen["num_envs"] == 4
        assert seen["seeds"] == [7, 7]
        assert seen["class_name"] == "PPO"
        assert seen["critic"] == ["activation", "class_name", "hidden_dims", "obs_normalization"]

    def test_errors(self, behaviour):
        seen = behaviour["made"]
        assert "near it: Mjlab-Cartpole-Balance" in seen["near"]
        assert "there are: Mjlab-Cartpole-Balance" in seen["far"]
        assert "needs a motion file" in seen["motion"]


def test_cartpole_reaches_the_reward_of_the_stock(mjlab):
    with ThreadPoolExecutor(2) as pool:
        stock, ours = pool.map(lambda kind: mjlab.run("train.py", kind, 30), ("stock", "ours"))
    assert (stock["algorithm"], ours["algorithm"]) == ("PPO", "FusedPPO")
    for run in (stock, ours):  # reward per second: 1 at most
        assert min(run["rewards"][:5]) < 0.5
        assert sum(run["rewards"][-5:]) / 5 > 0.85
    assert ours["rewards"][-1] > stock["rewards"][-1] - 0.1


def test_a_velocity_task_with_its_own_runner(mjlab):
    run = mjlab.run("train.py", FLAT, 3)
    assert run["algorithm"] == "FusedPPO"
    assert run["finite"]
    assert run["files"] == ["model_0.pt", "model_2.pt"]
    assert run["exported"]


def test_the_train_command(mjlab):
    """pyfast-ppo train --task, from mjlab's registry to policy and picture."""
    result = mjlab.run("../../train_command.py", CARTPOLE)
    assert result["codes"] == [0]
    assert result["algorithm"] == "pyfast_ppo.rsl_rl:FusedPPO"
    assert {"model_1.pt", "policy.pt", "learning_curve.png", "progress.csv"} <= set(result["files"])
    assert len(result["kl"]) == 2 and result["kl"][1] > 0.0
    assert result["says"]
