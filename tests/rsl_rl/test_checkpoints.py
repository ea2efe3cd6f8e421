"""Checkpoints of PPO load into FusedPPO and back, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"

# RND without what rsl_rl leaves out of its checkpoints (the discounted average behind the reward normalization)
RND = {
    "num_outputs": 4,
    "predictor_hidden_dims": [8],
    "target_hidden_dims": [8],
    "weight": 0.5,
    "state_normalization": True,
}
CONFIG = {"args": {"schedule": "adaptive", "rnd_cfg": RND}}


def config_of(algorithm: str) -> dict:
    extra = {"keep_random_stream": True} if algorithm == FUSED else {}
    return {**CONFIG, "args": {**CONFIG["args"], **extra}}


@pytest.fixture
def resumed(new_run: Callable, tmp_path: Path) -> Callable:
    """A new run with other parameters, that loads what another saved and goes on in the same place."""

    def resume(algorithm: str, run, **config):
        if algorithm == "PPO" and version("rsl-rl-lib") in ("5.4.0", "5.4.1"):
            pytest.skip("this PPO does not restore its learning rate")
        path = str(tmp_path / f"from_{len(list(tmp_path.iterdir()))}.pt")
        run.runner.save(path)
        random_state = torch.get_rng_state()
        other = new_run(algorithm, seed=99, **(config or config_of(algorithm)))
        assert other.distance(run) > 0.01
        other.runner.load(path)
        other.runner.env = copy.deepcopy(run.env)
        torch.set_rng_state(random_state)
        return other

    return resume


@pytest.mark.parametrize("second", ["PPO", FUSED])
@pytest.mark.parametrize("first", ["PPO", FUSED])
def test_training_goes_on_as_if_uninterrupted(first: str, second: str, new_run: Callable, resumed: Callable) -> None:
    run = new_run(first, **config_of(first)).learn(4)
    saved_rate = run.alg.learning_rate
    assert saved_rate != 1e-3
    other = resumed(second, run)

    assert other.distance(run) == 0.0
    assert other.alg.learning_rate == saved_rate
    assert other.runner.current_learning_iteration == 3

    other.learn(4)
    uninterrupted = new_run(first, **config_of(first)).learn(4)
    uninterrupted.learn(4)
    assert other.rates == uninterrupted.rates[len(run.rates) :]
    assert torch.equal(other.random_state, uninterrupted.random_state)
    if first == second:
        assert other.distance(uninterrupted) == 0.0
        assert other.losses == uninterrupted.losses[4:]
    else:
        assert other.distance(uninterrupted) < 1e-5  # rounding, as training amplifies it


def test_there_and_back(float64: None, new_run: Callable, resumed: Callable) -> None:
    """PPO, FusedPPO, PPO: in double precision nothing but rounding tells it from PPO alone."""
    exact = {"gamma": 63 / 64, "lam": 15 / 16}

    def config(algorithm: str) -> dict:
        own = config_of(algorithm)
        return {**own, "args": {**own["args"], **exact}}

    alone = new_run("PPO", **config("PPO")).learn(3)
    alone.learn(3)
    alone.learn(3)

    run = new_run("PPO", **config("PPO")).learn(3)
    run = resumed(FUSED, run, **config(FUSED)).learn(3)
    run = resumed("PPO", run, **config("PPO")).learn(3)
    assert run.rates == alone.rates[-len(run.rates) :]
    assert run.distance(alone) < 1e-12


@pytest.mark.parametrize("iterations", [0, 2])
def test_the_checkpoints_have_the_same_entries(iterations: int, train: Callable, tmp_path: Path) -> None:
    """And hold nothing but tensors and plain Python, so that ``weights_only`` loads them."""
    loaded = {}
    for algorithm in ("PPO", FUSED):
        path = str(tmp_path / "model.pt")
        train(algorithm, iterations, **CONFIG).runner.save(path)
        loaded[algorithm] = torch.load(path, weights_only=True)
    stock, fused = loaded["PPO"], loaded[FUSED]
    assert list(fused) == list(stock)
    for part in ("actor_state_dict", "critic_state_dict", "rnd_state_dict"):
        assert list(fused[part]) == list(stock[part])
        assert [t.shape for t in fused[part].values()] == [t.shape for t in stock[part].values()]
    for part in ("optimizer_state_dict", "rnd_optimizer_state_dict"):
        (ours,), (theirs,) = fused[part]["param_groups"], stock[part]["param_groups"]
        assert ours.keys() == theirs.keys()
        assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]
        assert fused[part]["state"].keys() == stock[part]["state"].keys()
    assert type(fused["optimizer_state_dict"]["param_groups"][0]["lr"]) is float


def test_the_options_of_the_step_are_saved_as_they_were_made(new_run: Callable) -> None:
    """Also when the settings or the groups were changed since; PPO steps as they say."""
    (stock,) = new_run("PPO").alg.save()["optimizer_state_dict"]["param_groups"]
    options = {name: stock[name] for name in ("fused", "foreach", "capturable")}
    run = new_run(FUSED)
    run.learn(1)
    run.alg.desired_kl = 0.02
    run.alg.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    run.learn(1)
    for group in run.alg.save()["optimizer_state_dict"]["param_groups"]:
        assert {name: group[name] for name in options} == options


def test_groups_of_parameters_that_come_and_go(new_run: Callable) -> None:
    run = new_run(FUSED)
    (made,) = new_run("PPO").alg.save()["optimizer_state_dict"]["param_groups"]
    groups = run.alg.optimizer.param_groups
    of_actor, of_critic = (list(model.parameters()) for model in (run.alg.actor, run.alg.critic))
    del groups[0]["params"][len(of_actor) :]
    run.alg.optimizer.add_param_group({"params": of_critic, "lr": 2e-3})
    run.learn(1)
    assert len(run.alg.save()["optimizer_state_dict"]["param_groups"]) == 2
    groups[0]["params"].extend(groups.pop()["params"])
    run.learn(1)
    (saved,) = run.alg.save()["optimizer_state_dict"]["param_groups"]
    assert [saved[name] for name in ("fused", "foreach")] == [made[name] for name in ("fused", "foreach")]
    assert saved["params"] == made["params"]


def test_a_compiled_run_loads_the_checkpoint_of_a_plain_one(
    new_run: Callable, resumed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_model(model, backend="eager"))
    run = new_run("PPO", **config_of("PPO")).learn(1)
    compiled = resumed(FUSED, run, torch_compile_mode="default", **config_of(FUSED))
    assert compiled.distance(run) == 0.0
    assert compiled.alg.save().keys() == run.alg.save().keys()


def test_the_policy_is_exported_as_that_of_ppo(train: Callable, tmp_path: Path) -> None:
    run = train(FUSED, 1)
    run.runner.export_policy_to_jit(str(tmp_path))
    exported = torch.jit.load(str(tmp_path / "policy.pt"))
    obs = run.env.get_observations()
    assert torch.allclose(exported(obs["policy"]), run.runner.get_inference_policy("cpu")(obs))
