"""``pyfast_ppo.isaaclab`` on the real Isaac Lab 3.0: Cartpole, direct and manager-based, on the CPU with Newton."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = 45


@pytest.fixture(scope="module", params=["direct", "manager"])
def rollouts(isaaclab, request):
    return request.param, isaaclab.run("wrapper.py", request.param)


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_trajectories_are_those_of_the_stock_wrapper(rollouts):
    _, result = rollouts
    assert result["difference"] == 0.0


def test_with_noise_too(rollouts):
    _, result = rollouts
    assert result["difference_with_noise"] == 0.0


def test_final_observations_are_those_of_the_terminal_frame(rollouts):
    """With histories, delays, filters and side effects; and they are not those after the reset."""
    _, result = rollouts
    assert result["final_error"] == {"policy": 0.0, "critic": 0.0}
    assert result["distance_of_final"] > 1e-3


def test_final_observations_are_there_after_resets_and_never_stale(rollouts):
    _, result = rollouts
    assert result["has_final"] == result["resets"]
    assert any(result["resets"]) and not all(result["resets"])
    assert result["rows_that_go_on"] == 0.0
    assert result["has_final_with_isaaclabs"]  # cfg.compute_final_obs = True leaves its key in the extras
    assert result["final_obs_off"]


def test_observation_wrappers_see_final_observations_too(rollouts):
    _, result = rollouts
    assert result["observation_wrapper"]


def test_no_waits_are_added(rollouts):
    _, result = rollouts
    stock, ours = result["waits"]
    assert ours == stock
    assert stock == {"nonzero": STEPS}  # Isaac Lab's own: which environments to reset


def test_time_outs(rollouts):
    _, result = rollouts
    assert result["time_outs_kept"]
    assert result["time_outs_without_terminated"]
    assert result["finite_horizon"]


def test_each_step_has_extras_of_its_own(rollouts):
    _, result = rollouts
    assert result["own_extras"]


def test_observation_space_has_the_returned_groups(rollouts):
    _, result = rollouts
    assert result["single_observation_space"] == ["critic", "policy"]
    assert result["observation_space"] == result["returned"]


def test_the_clip_is_the_intersection(rollouts):
    """A clip to [-0.25, 0.15]; the direct task declares [-0.1, 0.2], the other no limits."""
    workflow, result = rollouts
    low = -0.1 if workflow == "direct" else -0.25
    assert result["action_space"] == pytest.approx([low, 0.15])
    if workflow == "direct":
        assert result["executed"] == result["action_space"]


# --- without a simulator ----------------------------------------------------------------------------------------------


def test_environments_with_a_step_of_their_own(isaaclab):
    result = isaaclab.run("own_step.py")
    assert all(result.values()), result


def test_the_import_loads_no_simulator(isaaclab):
    assert isaaclab.run("import_alone.py") == []


def test_the_error_without_isaac_lab():
    code = "import pyfast_ppo.isaaclab"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "isaaclab_rl" in sys.modules or done.returncode == 0:
        pytest.skip("Isaac Lab is installed beside the tests")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pyfast_ppo.isaaclab needs isaaclab_rl, which cannot be imported here")
    assert "install Isaac Lab" in last


# --- training ---------------------------------------------------------------------------------------------------------


def test_isaac_labs_train_command(isaaclab):
    """Wrapper, algorithm and an asymmetric clip, all from the command line."""
    result = isaaclab.run("cli.py")
    assert result == {
        "code": 0,
        "wrapper": "pyfast_ppo.isaaclab.RslRlVecEnvWrapper",
        "algorithm": "pyfast_ppo.rsl_rl.fused_ppo.FusedPPO",
        "bounds": [[-1.5], [2.0]],
        "play": "pyfast_ppo.isaaclab",
    }


def test_training_reaches_the_reward_of_the_stock(isaaclab):
    """The reward of a whole episode at the policy's present rate; 5 is the most there is.

    Another processor rounds otherwise, and the runs part: on the way up by half a point, at the end by some hundredths.
    """
    arguments = ("--num-envs", 128, "--iterations", 55)
    stock = isaaclab.run("train.py", "--algorithm", "PPO", "--wrapper", "stock", *arguments)
    ours = isaaclab.run("train.py", "--algorithm", "pyfast_ppo.rsl_rl:FusedPPO", "--wrapper", "ours", *arguments)
    assert (stock["algorithm"], ours["algorithm"]) == ("PPO", "FusedPPO")
    reached = [sum(result["rewards"][-5:]) / 5 for result in (stock, ours)]
    assert reached[0] > 4.6  # the stock does learn
    assert reached[1] > reached[0] - 0.15
    assert ours["rewards"][0] == pytest.approx(stock["rewards"][0], abs=1e-5)  # the same task


@pytest.mark.parametrize("task", ["Isaac-Cartpole-Direct", "Isaac-Cartpole"])
def test_the_train_command(isaaclab, task):
    """pyfast-ppo train --task, without Isaac Sim and its asset server."""
    result = isaaclab.run("../../train_command.py", task)
    assert result["codes"] == [0]
    assert result["algorithm"] == "pyfast_ppo.rsl_rl:FusedPPO"
    assert {"model_1.pt", "policy.pt", "learning_curve.png", "progress.csv"} <= set(result["files"])
    assert len(result["kl"]) == 2 and result["kl"][1] > 0.0
    assert result["says"]


def test_tasks_that_cannot_be_made(isaaclab):
    result = isaaclab.run("tasks.py")
    assert "Isaac Lab has no task 'Isaac-Cartpole-Direkt'; near it: Isaac-Cartpole-Direct" in result["near"]
    assert "needs what is not installed here (No module named" in result["assets"]
    assert "without Isaac Sim and its asset server there are Isaac-Cartpole" in result["assets"]
