"""Where mini-batches come from: gathered at once or one by one, whole where a part would differ, or a user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from rsl_rl.storage import RolloutStorage
from torch import Tensor

from pyfast_ppo.bench.counts import count
from pyfast_ppo.rsl_rl import fused_ppo, mini_batches

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
CNN = {"class_name": "CNNModel", "cnn_cfg": {"output_channels": [2], "kernel_size": 3}}
BATCH_NORM = {"class_name": "CNNModel", "cnn_cfg": {"output_channels": [2], "kernel_size": 3, "norm": "batch"}}
GROUPS = {"actor": ["policy", "image"], "critic": ["policy", "image"]}


def images(model: dict, num_envs: int = 32, num_actions: int = 3) -> dict:
    env_args = {"images": True, "num_envs": num_envs, "num_actions": num_actions}
    return {"actor": model, "critic": model, "obs_groups": GROUPS, "env_args": env_args}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observations count as large."""
    monkeypatch.setattr(mini_batches, "AT_ONCE_BYTES", 0)


@pytest.mark.parametrize(
    "args",
    [{}, {"reshuffle": True}, {"normalize_advantage_per_mini_batch": True}],
    ids=["once", "reshuffle", "per_mini_batch"],
)
def test_gathered_one_by_one_they_are_the_same(args: dict, new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for budget in (2**28, 0):
        monkeypatch.setattr(mini_batches, "AT_ONCE_BYTES", budget)
        monkeypatch.setattr(fused_ppo, "_PIECE_BYTES", 40 * 4 * 16)  # 96 rows in three pieces
        runs.append(new_run(FUSED, args={"schedule": "adaptive", **args}).learn(3))
    assert runs[0].distance(runs[1]) == 0.0
    assert runs[0].losses == runs[1].losses


def peak_bytes(run: object) -> int:
    """Of an update that has its moments, beyond what was there before it."""
    run.learn(1).rollout()
    return count(run.alg.update, "cpu").peak_bytes


def test_large_observations_are_not_copied(new_run: Callable, one_by_one: None) -> None:
    """An update of images holds no more than PPO's, and less than a copy of the rollout's."""
    config = images(CNN, num_envs=128, num_actions=8)
    args = {"num_mini_batches": 8, "num_learning_epochs": 2}
    stock, ours = (new_run(algorithm, args=args, **config) for algorithm in ("PPO", FUSED))
    peak = peak_bytes(ours)
    assert peak <= peak_bytes(stock)
    mini_batches.AT_ONCE_BYTES = 2**28
    kept = peak_bytes(new_run(FUSED, args=args, **config))
    assert kept - peak > 0.7 * sum(obs.nbytes for obs in ours.alg.storage.observations.values())


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ppo, "_PIECE_BYTES", 40 * 4 * 16)


def statistics(run: object) -> dict[str, Tensor]:
    models = {"actor": run.alg.actor, "critic": run.alg.critic}
    return {f"{m}.{name}": b.clone() for m, model in models.items() for name, b in model.named_buffers()}


def test_batch_normalization_sees_what_it_sees_in_ppo(float64: None, new_run: Callable, small_pieces: None) -> None:
    config = images(BATCH_NORM, num_actions=2)
    args = {"schedule": "fixed", "learning_rate": 1e-3}
    stock, ours = (new_run(algorithm, args=args, **config) for algorithm in ("PPO", FUSED))
    for run in (stock, ours):
        torch.manual_seed(0)
        run.rollout()
        torch.manual_seed(1)  # PPO draws actions in its update
        run.alg.update()
    assert ours.distance(stock) < 1e-9
    theirs = statistics(stock)
    assert sum("running" in name for name in theirs) == 4
    for name, buffer in statistics(ours).items():
        torch.testing.assert_close(buffer, theirs[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("only_time_outs", [True, False], ids=["as_on_a_cpu", "as_on_a_gpu"])
def test_final_observations_do_not_move_statistics(only_time_outs: bool, new_run: Callable) -> None:
    found = []
    for publishes in (False, True):
        run = new_run(FUSED, **images(BATCH_NORM))
        run.alg._final_values.only_time_outs = only_time_outs
        step = run.env.step

        def with_final_obs(actions: Tensor, step: Callable = step) -> tuple:
            obs, rewards, dones, extras = step(actions)
            return obs, rewards, dones, {**extras, "final_obs": obs.apply(lambda group: group + 5.0)}

        run.env.step = with_final_obs if publishes else step
        run.rollout()
        assert all(module.training for module in run.alg.critic.modules())
        found.append(statistics(run))
    assert run.env.num_time_outs > 0
    for name, buffer in found[0].items():
        assert torch.equal(buffer, found[1][name]), name


def test_hooks_run_once_for_each_step(new_run: Callable, small_pieces: None) -> None:
    """And clip the gradient of the whole mini-batch, not those of its parts."""
    runs, calls = [], []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, args={"schedule": "fixed"})
        parameter = run.alg.actor.mlp[0].weight
        calls.append([])
        parameter.register_hook(lambda g, seen=calls[-1]: (seen.append(1), g.clamp(-1e-3, 1e-3))[1])
        torch.manual_seed(0)
        run.rollout()
        torch.manual_seed(1)
        run.alg.update()
        runs.append(run)
    assert calls[0] == calls[1] == [1] * 4
    assert runs[0].distance(runs[1]) < 1e-5


# --- a user's storage -------------------------------------------------------------------------------------------------


class OwnGenerator(RolloutStorage):
    """Doubles the advantages, and counts."""

    num_calls = 0

    def mini_batch_generator(self, num_mini_batches: int, num_epochs: int = 8) -> Iterator[RolloutStorage.Batch]:
        type(self).num_calls += 1
        for batch in super().mini_batch_generator(num_mini_batches, num_epochs):
            batch.advantages = batch.advantages * 2.0
            yield batch


class OwnAddTransition(RolloutStorage):
    def add_transition(self, transition: RolloutStorage.Transition) -> None:
        _, std = transition.distribution_params
        assert std.shape == transition.actions.shape
        super().add_transition(transition)


def test_the_generator_of_a_users_storage_is_used(new_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, args={"schedule": "fixed"})
        run.alg.storage.__class__ = OwnGenerator
        for _ in range(2):
            torch.manual_seed(0)
            run.rollout()
            torch.manual_seed(1)
            run.alg.update()
        runs.append(run)
    assert OwnGenerator.num_calls == 4
    assert runs[1].distance(runs[0]) < 1e-5
    told = "The mini-batches are those of OwnGenerator: it has its own mini_batch_generator."
    assert [r.getMessage() for r in caplog.records].count(told) == 1


def test_a_storage_with_its_own_add_transition_gets_what_ppo_hands_it(
    new_run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain, own = new_run(FUSED), new_run(FUSED)
        own.alg.storage.__class__ = OwnAddTransition
        for run in (plain, own):
            torch.manual_seed(0)
            run.learn(2)
    assert own.distance(plain) < 1e-5
    assert "mini-batches are those" not in caplog.text


@pytest.mark.parametrize("num_steps", [3, 12])
def test_another_storage(num_steps: int, new_run: Callable) -> None:
    """Rollouts of another length, with final observations, from the second iteration on."""
    run = new_run(FUSED)
    step = run.env.step

    def with_final_obs(actions: Tensor) -> tuple:
        obs, rewards, dones, extras = step(actions)
        return obs, rewards, dones, {**extras, "final_obs": obs.clone()}

    run.env.step = with_final_obs
    run.learn(1)
    run.alg.storage = RolloutStorage("rl", 32, num_steps, run.env.get_observations(), [3], "cpu")
    run.rollout()
    assert "nonfinite_final_values" in run.alg.update()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_learning_epochs", "num_mini_batches"])
def test_none_is_too_few(name: str, new_run: Callable) -> None:
    run = new_run(FUSED, args={name: 0}).rollout()
    with pytest.raises(ValueError, match=f"{name} must be at least 1 for an update, got 0"):
        run.alg.update()


@pytest.mark.filterwarnings("ignore:std")
def test_one_row_cannot_be_normalised(new_run: Callable) -> None:
    run = new_run(FUSED, env_args={"num_envs": 1}, num_steps_per_env=1, args={"num_mini_batches": 1}).rollout()
    with pytest.raises(ValueError, match="advantages are normalised over the rollout, which needs two rows or more"):
        run.alg.update()
