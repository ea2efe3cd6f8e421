"""Runs of a few iterations: what they show, what they leave, how they go on."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from pyfast_ppo.cli import training
from pyfast_ppo.cli.console import HEADER
from pyfast_ppo.cli.runner import TrainRunner
from pyfast_ppo.cli.train_config import STEPS_PER_ENV
from pyfast_ppo.gymnasium import GymnasiumVecEnv, NonFiniteActionError
from pyfast_ppo.rsl_rl import FusedPPO

STEPS = 2 * STEPS_PER_ENV  # environment steps of an iteration with two environments


def history(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["actor_state_dict"]


def progress_lines(out: str) -> list[dict[str, str]]:
    """Rows of the table, by the names in its header."""
    lines = out.splitlines()
    begin = lines.index(HEADER) + 1
    rows = lines[begin : lines.index("", begin)]
    return [dict(zip(HEADER.split(), row.split(), strict=True)) for row in rows]


def assert_one_sentence(outcome, code: int, *parts: str) -> None:
    assert outcome.code == code
    assert outcome.err.startswith("pyfast-ppo: ") and outcome.err.count("\n") == 1, outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize("algorithm", ["fused", "stock"])
def test_run_shows_progress_and_leaves_everything(train, tmp_path, algorithm):
    outcome = train("--algorithm", algorithm, "--log-dir", tmp_path / "run")
    assert outcome.code == 0
    assert "Learning iteration" not in outcome.out and "Actor Model" not in outcome.out
    last = progress_lines(outcome.out)[-1]
    assert last["iteration"] == "2/2" and last["eta"] == "0:00"
    rows = history(tmp_path / "run")
    assert [row["iteration"] for row in rows] == ["0", "1"]
    assert [int(row["env_steps"]) for row in rows] == [STEPS, 2 * STEPS]
    assert last["reward"] == f"{float(rows[-1]['mean_reward']):.1f}"
    assert last["length"] == f"{float(rows[-1]['mean_episode_length']):.1f}"
    if algorithm == "fused":
        assert last["kl"] == f"{float(rows[-1]['kl']):.5f}" and float(rows[-1]["kl"]) > 0
    else:
        assert last["kl"] == "-" and rows[-1]["kl"] == ""

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "progress.csv", "learning_curve.png", "policy.pt", "model_0.pt", "model_1.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for name in ("model_1.pt", "policy.pt", "learning_curve.png", "progress.csv"):
        assert str(tmp_path / "run" / name) in outcome.out
    assert "no (threshold 950)" in outcome.out


def test_exported_policy_is_the_actor_of_the_checkpoint(train, tmp_path):
    train("--log-dir", tmp_path)
    state = {name: value.double() for name, value in weights(tmp_path / "model_1.pt").items()}
    obs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    hidden = (obs - state["obs_normalizer._mean"]) / (state["obs_normalizer._std"] + 1e-2)
    for layer in (0, 2):
        hidden = torch.tanh(hidden @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"])
    expected = (hidden @ state["mlp.4.weight"].T + state["mlp.4.bias"]).clamp(-3.0, 3.0)  # the pendulum's bounds
    actions = torch.jit.load(tmp_path / "policy.pt")(obs)
    torch.testing.assert_close(actions.double(), expected, atol=1e-5, rtol=1e-4)


def test_wrong_export_is_noticed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainRunner, "get_inference_policy", lambda self, device: _ShiftedPolicy(self.alg.actor))
    with pytest.raises(AssertionError, match="not close"):
        train("--log-dir", tmp_path)
    assert not (tmp_path / "policy.pt").exists()


class _ShiftedPolicy:
    def __init__(self, actor) -> None:
        self.actor = actor

    def __getattr__(self, name):
        return getattr(self.actor, name)

    def __call__(self, obs):
        return self.actor(obs) + 0.1


@pytest.mark.parametrize("algorithm", ["fused", "stock"])
def test_same_seed_same_run_other_seed_another(train, tmp_path, algorithm):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train("--algorithm", algorithm, "--seed", seed, "--log-dir", tmp_path / name)
    measured = ("mean_reward", "mean_episode_length", "kl", "learning_rate")
    a, b, c = ([[row[column] for column in measured] for row in history(tmp_path / name)] for name in "abc")
    assert a == b and a != c
    first, second, third = (weights(tmp_path / name / "model_1.pt") for name in "abc")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["mlp.0.weight"], third["mlp.0.weight"])


def test_default_run_directory_names_the_task(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train().code == 0
    (run_dir,) = (tmp_path / "logs" / "pyfast_ppo" / "InvertedPendulum-v5").iterdir()
    assert (run_dir / "model_1.pt").exists()


def test_resume_continues_the_count_and_the_history(train, run_command, tmp_path):
    train("--log-dir", tmp_path, "--seed", 3)
    before = history(tmp_path)
    outcome = run_command("train", "--resume", tmp_path, "--iterations", 4)
    assert outcome.code == 0
    assert f"resumed from {tmp_path / 'model_1.pt'}" in outcome.out
    assert progress_lines(outcome.out)[0]["iteration"] == "3/4"
    after = history(tmp_path)
    assert after[:2] == before
    assert [row["iteration"] for row in after] == ["0", "1", "2", "3"]
    assert [int(row["env_steps"]) for row in after] == [STEPS * n for n in (1, 2, 3, 4)]
    walls = [float(row["wall_s"]) for row in after]
    assert walls == sorted(walls)
    assert torch.load(tmp_path / "model_3.pt", weights_only=True)["iter"] == 3
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert settings["iterations"] == 4 and settings["seed"] == 3


def test_resume_starts_from_the_saved_state(train, tmp_path, monkeypatch):
    train("--log-dir", tmp_path)
    saved = torch.load(tmp_path / "model_1.pt", weights_only=True)
    seen = {}

    def learn_until(runner, iterations, on_iteration, random_first_lengths):
        seen["weights"] = {key: value.clone() for key, value in runner.alg.actor.state_dict().items()}
        seen["learning_rate"] = float(runner.alg.learning_rate)
        seen["optimizer_steps"] = float(runner.alg.optimizer.state_dict()["state"][0]["step"])
        seen["rewards"] = list(runner.logger.rewbuffer)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainRunner, "learn_until", learn_until)
    assert train("--resume", tmp_path, "--iterations", 4).code == 130
    assert all(torch.equal(seen["weights"][key], value) for key, value in saved["actor_state_dict"].items())
    assert seen["learning_rate"] == pytest.approx(float(saved["optimizer_state_dict"]["param_groups"][0]["lr"]))
    assert seen["optimizer_steps"] == float(saved["optimizer_state_dict"]["state"][0]["step"]) > 0
    assert seen["rewards"] == saved["infos"]["recent_rewards"] != []


def test_resume_from_an_older_checkpoint_makes_later_iterations_again(train, run_command, tmp_path):
    train("--log-dir", tmp_path, "--iterations", 3)
    assert run_command("train", "--resume", tmp_path / "model_0.pt", "--iterations", 2).code == 0
    assert [row["iteration"] for row in history(tmp_path)] == ["0", "1"]
    # The later checkpoint of the first time is kept, but a resume does not take it for the newest
    assert (tmp_path / "model_2.pt.old").exists()
    outcome = run_command("train", "--resume", tmp_path, "--iterations", 3)
    assert f"resumed from {tmp_path / 'model_1.pt'}" in outcome.out


def test_resume_may_change_the_algorithm(train, run_command, tmp_path):
    train("--log-dir", tmp_path, "--algorithm", "stock")
    outcome = run_command("train", "--resume", tmp_path, "--algorithm", "fused", "--iterations", 3)
    assert outcome.code == 0
    assert [row["kl"] != "" for row in history(tmp_path)] == [False, False, True]


def test_resume_of_a_finished_run_is_refused(train, run_command, tmp_path):
    train("--log-dir", tmp_path)
    assert_one_sentence(run_command("train", "--resume", tmp_path), 2, "2 iterations already", "--iterations")


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_resume_refuses_a_pickle_with_code(train, tmp_path):
    train("--log-dir", tmp_path / "run")
    marker = tmp_path / "code was run"
    torch.save({"actor_state_dict": _RunsCode(marker)}, tmp_path / "run" / "model_9.pt")
    assert_one_sentence(train("--resume", tmp_path / "run"), 2, "model_9.pt", "can run code")
    assert not marker.exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def _garble(path: Path) -> None:
    path.write_bytes(b"no checkpoint")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _drop_the_critic(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["critic_state_dict"]
    torch.save(checkpoint, path)


def _change_the_shape(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["actor_state_dict"]["mlp.0.weight"] = torch.zeros(64, 11)
    torch.save(checkpoint, path)


def _spoil_the_iteration(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["iter"] = "one"
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged"),
        (_garble, "damaged"),
        (_empty, "damaged"),
        (_drop_the_critic, "no checkpoint of a training run"),
        (_change_the_shape, "does not fit the networks"),
        (_spoil_the_iteration, "its iteration is 'one'"),
    ],
)
def test_damaged_checkpoints_are_named(train, tmp_path, damage, message):
    train("--log-dir", tmp_path)
    damage(tmp_path / "model_1.pt")
    outcome = train("--resume", tmp_path, "--iterations", 4)
    assert_one_sentence(outcome, 2, str(tmp_path / "model_1.pt"), message)


def test_resume_without_what_it_needs_is_refused(train, tmp_path):
    assert_one_sentence(train("--resume", tmp_path / "nowhere"), 2, "does not exist")
    assert_one_sentence(train("--resume", tmp_path), 2, "holds no checkpoint")
    (tmp_path / "model_0.pt").write_bytes(b"")
    assert_one_sentence(train("--resume", tmp_path), 2, "config.json is missing")
    (tmp_path / "config.json").write_text('{"settings": {"no such setting": 1}}')
    assert_one_sentence(train("--resume", tmp_path), 2, "cannot be read")
    (tmp_path / "config.json").write_text('{"settings": {"algorithm": "os:system"}}')
    assert_one_sentence(train("--resume", tmp_path), 2, "unknown algorithm")
    (tmp_path / "config.json").write_text('{"settings": {"num_envs": "many"}}')
    assert_one_sentence(train("--resume", tmp_path), 2, "num_envs must be of type int, got 'many'")
    (tmp_path / "config.json").write_text('{"settings": {"seed": -1}}')
    assert_one_sentence(train("--resume", tmp_path), 2, "seed must be at least 0, got -1")


def test_resume_with_another_task_is_refused(train, tmp_path):
    train("--log-dir", tmp_path)
    outcome = train("--resume", tmp_path, "--env", "Hopper-v5")
    assert_one_sentence(outcome, 2, "a run of InvertedPendulum-v5, not of Hopper-v5")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_resume(run_command, tmp_path, number):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "pyfast_ppo", "train", "--num-envs", "2", "--iterations", "100000"]
    process = subprocess.Popen(
        [*command, "--log-dir", str(run_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (run_dir / "progress.csv").exists() or len(history(run_dir)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    done = len(history(run_dir))
    checkpoint = run_dir / f"model_{done - 1}.pt"
    assert str(checkpoint) in out and f"pyfast-ppo train --resume {run_dir}" in out
    assert (run_dir / "learning_curve.png").exists()

    assert run_command("train", "--resume", run_dir, "--iterations", done + 1).code == 0
    assert [int(row["iteration"]) for row in history(run_dir)] == list(range(done + 1))


@pytest.mark.parametrize("whole_iterations", [0, 3])
def test_a_second_signal_saves_too(train, run_command, tmp_path, monkeypatch, whole_iterations):
    """In the middle of an update, before the checkpoint that would have been due."""
    steps = []
    step = FusedPPO._apply

    def interrupted(alg, update):
        step(alg, update)
        steps.append({name: t.clone() for name, t in alg.actor.state_dict().items()})
        if len(steps) == 40 * whole_iterations + 5:  # 10 epochs of 4 mini-batches each
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FusedPPO, "_apply", interrupted)
    outcome = train("--log-dir", tmp_path, "--iterations", 20)
    assert outcome.code == 130
    assert f"stopped within iteration {whole_iterations + 1}; " in outcome.out
    if whole_iterations == 0:
        assert "nothing was saved yet" in outcome.out
        return
    assert f"pyfast-ppo train --resume {tmp_path}" in outcome.out
    saved = weights(tmp_path / "model_2.pt")
    assert all(torch.equal(saved[name], t) for name, t in steps[-1].items())
    monkeypatch.undo()
    assert run_command("train", "--resume", tmp_path, "--iterations", 5).code == 0
    assert [int(row["iteration"]) for row in history(tmp_path)] == list(range(5))


def test_a_second_signal_leaves_a_whole_checkpoint_alone(train, run_command, tmp_path, monkeypatch):
    """And the number does not come from progress.csv, which somebody may have taken away."""
    train("--log-dir", tmp_path)
    whole = (tmp_path / "model_1.pt").read_bytes()
    (tmp_path / "progress.csv").unlink()
    step = FusedPPO._apply

    def interrupted(alg, update):
        step(alg, update)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stopped = [tmp_path / "model_1.pt.stopped", tmp_path / "model_1.pt.stopped2"]
    for file in stopped:
        with monkeypatch.context() as patch:
            patch.setattr(FusedPPO, "_apply", interrupted)
            outcome = train("--resume", tmp_path, "--iterations", 4)
        assert outcome.code == 130 and "stopped within iteration 3; " in outcome.out
        assert f"--resume {tmp_path}, or with the steps within the iteration: --resume {file}\n" in outcome.out
        assert (tmp_path / "model_1.pt").read_bytes() == whole
        assert not torch.equal(weights(file)["mlp.0.weight"], weights(tmp_path / "model_1.pt")["mlp.0.weight"])
    outcome = run_command("train", "--resume", stopped[0], "--iterations", 3)
    assert outcome.code == 0 and f"resumed from {stopped[0]}" in outcome.out
    assert [row["iteration"] for row in history(tmp_path)] == ["2"]


KILLED_WHILE_WRITING = """
import os, signal, sys
from pyfast_ppo.cli.main import main
fsync = os.fsync
def killed(descriptor):
    if "model_25" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = killed
main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's names of open files")
def test_killed_while_a_checkpoint_is_written(run_command, tmp_path):
    """Half of it lies there; the run goes on from the one before."""
    run_dir = tmp_path / "run"
    flags = ["train", "--num-envs", "2", "--iterations", "40", "--log-dir", str(run_dir)]
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *flags], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    whole, half = run_dir / "model_0.pt", run_dir / ".model_25.pt.tmp"
    assert sorted(file.name for file in run_dir.glob("*model_*")) == [half.name, whole.name]
    assert 0 < half.stat().st_size < 0.6 * whole.stat().st_size
    before = weights(whole)

    assert run_command("train", "--resume", run_dir, "--iterations", 27).code == 0
    assert [int(row["iteration"]) for row in history(run_dir)] == list(range(27))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(whole).values(), strict=True))
    assert weights(run_dir / "model_25.pt").keys() == before.keys()
    assert not half.exists()


def test_unknown_task_names_near_ones(train, tmp_path):
    outcome = train("--env", "invertedpendulm-v5", "--log-dir", tmp_path / "run")
    assert_one_sentence(outcome, 2, "'invertedpendulm-v5'", "InvertedPendulum-v5")
    assert not (tmp_path / "run").exists()


def test_task_with_other_actions_is_refused(train):
    assert_one_sentence(train("--env", "CartPole-v1"), 2, "CartPole-v1", "Discrete(2)", "Box")


def test_directory_that_cannot_be_made_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_sentence(train("--log-dir", tmp_path / "file" / "run"), 2, str(tmp_path / "file" / "run"), "--log-dir")


def test_directory_of_another_run_is_not_overwritten(train, tmp_path):
    train("--log-dir", tmp_path)
    assert_one_sentence(train("--log-dir", tmp_path), 2, "already holds a run", "--resume")


def test_config_of_another_program_is_not_overwritten(train, tmp_path):
    (tmp_path / "config.json").write_text('{"theirs": 1}')
    assert_one_sentence(train("--log-dir", tmp_path), 2, "config.json cannot be read", "another directory")
    assert (tmp_path / "config.json").read_text() == '{"theirs": 1}'


def test_run_that_ended_before_it_saved_anything_may_begin_anew(train, tmp_path, monkeypatch):
    def interrupted(runner, iterations, on_iteration, random_first_lengths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainRunner, "learn_until", interrupted)
        assert train("--log-dir", tmp_path, "--seed", 3).code == 130
    assert (tmp_path / "config.json").exists() and not list(tmp_path.glob("model_*"))
    assert_one_sentence(train("--resume", tmp_path), 2, "holds no checkpoint", f"--log-dir {tmp_path}")
    assert train("--log-dir", tmp_path, "--seed", 4).code == 0
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["seed"] == 4
    assert len(history(tmp_path)) == 2


OWN_TASK = """
import gymnasium
import numpy as np

class Point(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-0.01, 0.01, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.place += action
        return self.place.copy(), -float(np.square(self.place).sum()), False, False, {}

gymnasium.register("FastPPOPoint-v0", entry_point=Point, max_episode_steps=20)
"""


def test_task_of_a_module_in_the_present_folder(train, run_command, tmp_path, monkeypatch):
    (tmp_path / "fast_ppo_own_task.py").write_text(OWN_TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    near = train("--env", "fast_ppo_own_task:FastPPOPiont-v0")
    assert_one_sentence(near, 2, "near it: fast_ppo_own_task:FastPPOPoint-v0.")
    assert train("--env", "fast_ppo_own_task:FastPPOPoint-v0", "--log-dir", "run").code == 0

    strict = gymnasium.make("FastPPOPoint-v0").unwrapped
    policy, (obs, _) = torch.jit.load("run/policy.pt"), strict.reset(seed=0)
    with torch.inference_mode():
        for _ in range(20):
            obs, *_ = strict.step(policy(torch.from_numpy(obs)[None])[0].numpy())
    assert run_command("doctor", "--env", "fast_ppo_own_task:FastPPOPoint-v0", "--steps", 4).code == 0


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_device_that_is_not_there_is_named(train, device):
    assert_one_sentence(train("--device", device), 2, repr(device), "--device cpu")


@pytest.mark.parametrize("package", ["gymnasium", "mujoco", "matplotlib"])
def test_missing_package_names_the_extra(train, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_sentence(train(), 2, package, "pip install 'pyfast-ppo[gym]'")


@pytest.mark.parametrize("package", ["gymnasium", "mujoco"])
def test_missing_package_is_named_on_resume(train, tmp_path, monkeypatch, package):
    train("--log-dir", tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    outcome = train("--resume", tmp_path, "--iterations", 4)
    assert_one_sentence(outcome, 2, f"training needs {package}", "pip install 'pyfast-ppo[gym]'")


@pytest.mark.parametrize(
    "flags",
    [("--iterations", "0"), ("--iterations", "9" * 20), ("--num-envs", "x"), ("--seed", "-1"), ("--algorithm", "sac")],
)
def test_senseless_numbers_are_refused(train, flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train(*flags)
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algorithm", "bad"), [("fused", float("nan")), ("fused", float("inf")), ("stock", float("nan"))]
)
def test_a_reward_that_is_not_finite_ends_the_run_with_a_sentence(train, tmp_path, monkeypatch, bad, algorithm):
    """NaN is seen by rsl_rl's runner, infinity by FusedPPO."""
    step = GymnasiumVecEnv.step
    calls = []

    def diverge_in_the_second_iteration(self, actions):
        calls.append(None)
        obs, rewards, dones, extras = step(self, actions)
        return obs, rewards * (bad if len(calls) == STEPS_PER_ENV + 1 else 1.0), dones, extras

    monkeypatch.setattr(GymnasiumVecEnv, "step", diverge_in_the_second_iteration)
    code = train("--log-dir", tmp_path, "--algorithm", algorithm)
    assert_one_sentence(code, 1, "not finite", f"checkpoints from before are in {tmp_path}", "reward")
    assert len(history(tmp_path)) == 1


def test_divergence_ends_the_run_with_a_sentence(train, tmp_path, monkeypatch):
    step = GymnasiumVecEnv.step
    calls = []

    def diverge_in_the_second_iteration(self, actions):
        calls.append(None)
        if len(calls) > STEPS_PER_ENV:
            raise NonFiniteActionError("actions are NaN")
        return step(self, actions)

    monkeypatch.setattr(GymnasiumVecEnv, "step", diverge_in_the_second_iteration)
    assert_one_sentence(train("--log-dir", tmp_path), 1, "not finite", str(tmp_path), "actions are NaN")
    assert (tmp_path / "model_0.pt").exists() and (tmp_path / "learning_curve.png").exists()
    assert len(history(tmp_path)) == 1


def test_an_infinite_observation_is_not_blamed_on_the_policy(train, tmp_path, monkeypatch):
    to_tensordict = GymnasiumVecEnv._to_tensordict

    def infinite(self, obs):
        return to_tensordict(self, obs * np.inf)

    monkeypatch.setattr(GymnasiumVecEnv, "_to_tensordict", infinite)
    outcome = train("--log-dir", tmp_path)
    assert_one_sentence(outcome, 1, "nothing was saved yet", "the observation 'policy' of environment 0")
    assert "diverged" not in outcome.err and "checkpoints" not in outcome.err


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_ends_the_run_with_a_sentence(train, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainRunner, "save", full)
    assert_one_sentence(train("--log-dir", tmp_path), 1, str(tmp_path), "No space left on device")


@pytest.mark.parametrize("method", ["write", "flush"])
def test_full_disk_under_tensorboard_ends_the_run_with_a_sentence(train, tmp_path, monkeypatch, method):
    """It writes in a thread of its own, and raises again where it is closed."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    run = TrainRunner.learn_until

    def learn_until(self, *args):
        monkeypatch.setattr(RecordWriter, method, full)
        run(self, *args)

    monkeypatch.setattr(TrainRunner, "learn_until", learn_until)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's, which prints nothing
    outcome = train("--log-dir", tmp_path, "--iterations", 200)
    assert_one_sentence(outcome, 1, f"cannot write to {tmp_path}", "No space left on device")


def test_a_file_that_the_environment_misses_is_not_the_runs(train, tmp_path, monkeypatch):
    def misses(self, actions):
        return open(tmp_path / "terrain.png")

    monkeypatch.setattr(GymnasiumVecEnv, "step", misses)
    with pytest.raises(FileNotFoundError, match=r"terrain\.png"):
        train("--log-dir", tmp_path / "run")


def test_a_file_that_cannot_be_written_is_named(train, tmp_path, monkeypatch):
    def refused(self, path, infos=None):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(TrainRunner, "save", refused)
    assert_one_sentence(train("--log-dir", tmp_path), 1, f"cannot write to {tmp_path} (Permission denied)")


def test_stock_rsl_rl_loads_the_checkpoint(train, tmp_path):
    from rsl_rl.runners import OnPolicyRunner

    train("--log-dir", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["train_config"]
    config["algorithm"]["class_name"] = "PPO"
    env = GymnasiumVecEnv("InvertedPendulum-v5", num_envs=2)
    runner = OnPolicyRunner(env, config, log_dir=None, device="cpu")
    runner.load(str(tmp_path / "model_1.pt"))
    assert runner.current_learning_iteration == 1
    saved = weights(tmp_path / "model_1.pt")
    assert all(torch.equal(value, saved[key]) for key, value in runner.alg.actor.state_dict().items())


def test_tensorboard_has_the_rewards(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("--log-dir", tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = [event.value for event in events.Scalars("Train/mean_reward")]
    np.testing.assert_allclose(logged, [float(row["mean_reward"]) for row in history(tmp_path)], rtol=1e-5)


def test_threads_follow_the_users_variable(train, monkeypatch):
    monkeypatch.setattr(training, "make_task", _stop_here)
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert train().code == 130 and torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert train().code == 130 and torch.get_num_threads() == 1


def _stop_here(settings):
    raise KeyboardInterrupt
