"""NaN and infinite numbers, put in where they come from: what is kept, what is counted, what is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from rsl_rl.modules import EmpiricalNormalization
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.rsl_rl import FusedPPO
from pyfast_ppo.rsl_rl.nonfinite import NonFiniteError, first_nonfinite, statistics_in_place

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
SPLIT = {"num_learning_epochs": 3, "num_mini_batches": 4}
STEPS = 12
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}
PER_MINI_BATCH = {"normalize_advantage_per_mini_batch": True}  # one bad row then reaches one mini-batch only
OPTIMIZERS = ["adam", "adamw", "sgd", "rmsprop"]


def parameters(alg: FusedPPO) -> list[Tensor]:
    return [p.detach().clone() for model in (alg.actor, alg.critic) for p in model.parameters()]


def moments(alg: FusedPPO) -> list[Tensor]:
    return [t for state in alg.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


# --- one mini-batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_such_gradients_is_not_taken(new_run: Callable, optimizer: str, value: float) -> None:
    """An infinite advantage in one row: the steps of its mini-batch leave parameters and moments as they are."""
    args = {**SPLIT, **PER_MINI_BATCH, "schedule": "fixed", "learning_rate": 1e-3, "optimizer": optimizer}
    run = new_run(FUSED, args=args).rollout()
    run.alg.storage.returns[2, 5] = value
    seen = [parameters(run.alg)]
    apply = run.alg._apply

    def recorded(*args: object) -> None:
        apply(*args)
        seen.append(parameters(run.alg))

    run.alg._apply = recorded
    losses = run.alg.update()
    assert losses["nonfinite_steps"] == 3  # once in each epoch
    unchanged = [all(map(torch.equal, a, b)) for a, b in pairwise(seen)]
    assert sum(unchanged) == 3
    assert all(torch.isfinite(p).all() for p in seen[-1])
    assert all(torch.isfinite(m).all() for m in moments(run.alg))


def test_momentum_begins_after_a_step_that_is_lost(new_run: Callable) -> None:
    """The buffers of torch's fused SGD would be memory that nobody has written."""
    args = {**PER_MINI_BATCH, "schedule": "fixed", "num_learning_epochs": 1, "num_mini_batches": 2}
    run = new_run(FUSED, args=args).rollout()
    models = (run.alg.actor, run.alg.critic)
    run.alg.optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=1e-2, momentum=0.9)
    torch.manual_seed(5)
    first = torch.randperm(192)[0]
    run.alg.storage.returns.view(-1)[first] = math.nan
    torch.manual_seed(5)
    assert run.alg.update()["nonfinite_steps"] == 1
    for p, state in run.alg.optimizer.state.items():
        assert torch.equal(state["momentum_buffer"], p.grad)  # of the one step that was taken


def test_without_such_a_step_nothing_changes(new_run: Callable) -> None:
    runs = [new_run(FUSED, args={**SPLIT, "nonfinite": mode}).learn(3) for mode in ("skip", "ignore", "raise")]
    assert runs[0].distance(runs[1]) == runs[0].distance(runs[2]) == 0.0
    assert [losses["nonfinite_steps"] for losses in runs[0].losses] == [0.0] * 3
    assert "nonfinite_steps" not in runs[1].losses[0]


def test_the_adaptive_rate_goes_down(new_run: Callable) -> None:
    """By 1.5 for each lost step; here the KL alone would leave it where it is."""
    args = {**SPLIT, **PER_MINI_BATCH, "schedule": "adaptive", "desired_kl": 1e9, "learning_rate": 1e-3}
    lost, fine = (new_run(FUSED, args=args).rollout() for _ in range(2))
    lost.alg.storage.returns[2, 5] = math.nan
    for run in (lost, fine):
        run.alg._kl_control.rule.max_rate = 1e-3
        run.alg.update()
    assert fine.alg.learning_rate == 1e-3
    ratios = [float(after / before) for before, after in pairwise([*lost.rates, lost.alg.learning_rate])]
    assert sum(math.isclose(ratio, 1 / 1.5) for ratio in ratios) == 3


def test_as_ppo_if_it_is_ignored(new_run: Callable) -> None:
    run = new_run(FUSED, args={**SPLIT, "nonfinite": "ignore"}).rollout()
    run.alg.storage.returns[2, 5] = math.nan
    run.alg.update()
    assert any(p.isnan().any() for p in parameters(run.alg))


def test_a_run_whose_std_is_lost_ends_as_with_ppo(new_run: Callable) -> None:
    """There torch refuses to draw from it, at the next step of the environment."""
    ends = []
    for algorithm, args in (("PPO", {}), (FUSED, {"nonfinite": "ignore"})):
        run = new_run(algorithm, args=args).rollout()
        run.alg.storage.actions[2, 5] = math.nan
        with pytest.raises(RuntimeError, match=r"all elements of std >= 0.0|std of the policy is not finite"):
            run.alg.update()
            run.rollout()
        ends.append(all(p.isnan().any() for p in run.alg.actor.parameters()))
    assert ends == [True, True]


def test_an_error_after_one_such_step(new_run: Callable) -> None:
    run = new_run(FUSED, args={**SPLIT, **PER_MINI_BATCH, "nonfinite": "raise"}).rollout()
    run.alg.storage.returns[2, 5] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"iteration 0: 3 of 12 steps .* the return was not finite first, at step 2"
    ):
        run.alg.update()
    run.rollout()  # the storage is ready for it
    run.alg.update()


def test_together_with_early_stop(new_run: Callable) -> None:
    args = {**SPLIT, **PER_MINI_BATCH, "schedule": "fixed", "learning_rate": 1e-2, "early_stop_kl": 1e-3}
    run = new_run(FUSED, args=args).rollout()
    run.alg.storage.returns[2, 5] = math.nan
    losses = run.alg.update()
    assert losses["nonfinite_steps"] >= 1
    assert losses["skipped_steps"] >= 1
    assert all(torch.isfinite(p).all() for p in parameters(run.alg))


def test_rnd_takes_no_such_step_either(new_run: Callable) -> None:
    """Its predictor sees the observations; PPO's gradients of that mini-batch are lost as well."""
    run = new_run(FUSED, args={**SPLIT, **PER_MINI_BATCH, "rnd_cfg": dict(RND)}).rollout()
    run.alg.storage.observations["policy"][2, 5] = math.nan
    losses = run.alg.update()
    assert losses["nonfinite_steps"] == 3
    assert all(torch.isfinite(p).all() for p in run.alg.rnd.predictor.parameters())
    assert all(torch.isfinite(p).all() for p in parameters(run.alg))


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "ignore"])
def test_steps_of_rnd_alone_are_counted(nonfinite: str, new_run: Callable) -> None:
    """Its target gives NaN; actor and critic learn."""
    run = new_run(FUSED, args={**SPLIT, "rnd_cfg": dict(RND), "nonfinite": nonfinite}).rollout()
    run.alg.rnd.target[0].bias.data.fill_(math.nan)
    if nonfinite == "ignore":
        assert "nonfinite_rnd_steps" not in run.alg.update()
        return
    steps = SPLIT["num_learning_epochs"] * SPLIT["num_mini_batches"]
    with pytest.raises(NonFiniteError, match=f"{steps} of {steps} steps of RND had gradients that are not finite"):
        run.alg.update()
    assert all(torch.isfinite(p).all() for p in run.alg.rnd.predictor.parameters())


# --- nothing could be applied -----------------------------------------------------------------------------------------

FAULTS = {
    "observation": ("observations", "policy", "the observation group 'policy' was not finite first, at step 3"),
    "privileged": ("observations", "privileged", "the observation group 'privileged' was not finite first, at step 3"),
    "reward": ("rewards", None, "the reward was not finite first, at step 3 of the rollout in environment 7"),
    "value": ("values", None, "the value was not finite first, at step 3"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_was_not_finite_first_is_named(new_run: Callable, fault: tuple[str, str | None, str]) -> None:
    """In the rollout, before the returns: advantages are normalised over all of it, so that no step can be taken."""
    name, group, message = fault
    run = new_run(FUSED, args={**SPLIT, "schedule": "adaptive"}, actor={"obs_normalization": True}).learn(2)
    alg = run.alg
    compute_returns = alg.compute_returns

    def with_fault(obs: object) -> None:
        data = getattr(alg.storage, name)
        (data if group is None else data[group])[3, 7] = math.nan
        if group is not None:
            alg.storage.values[3, 7] = math.nan  # what a critic makes of it
        compute_returns(obs)

    alg.compute_returns = with_fault
    run.rollout()
    before = {name: t.clone() for name, t in alg.save()["actor_state_dict"].items()}
    weights, state = parameters(alg), [m.clone() for m in moments(alg)]
    with pytest.raises(NonFiniteError, match=rf"^iteration 2: 12 of 12 steps .*{message}"):
        alg.update()
    assert all(map(torch.equal, weights, parameters(alg)))
    assert all(map(torch.equal, state, moments(alg)))
    after = alg.save()["actor_state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)  # the normalizer as well
    alg.compute_returns = compute_returns
    run.rollout()
    assert math.isfinite(alg.update()["value"])


def test_where_a_return_that_is_not_finite_began(new_run: Callable) -> None:
    """Backwards from there it spreads, as far as the episode goes."""
    run = new_run(FUSED, args=SPLIT).rollout()
    storage = run.alg.storage
    storage.dones.zero_()
    storage.dones[1, 7] = 1
    storage.returns[2:5, 7] = math.nan
    storage.advantages[:] = math.nan  # which are normalised with it
    with pytest.raises(
        NonFiniteError, match="the return was not finite first, at step 4 of the rollout in environment 7"
    ):
        run.alg.update()


def test_the_observation_after_the_rollout(new_run: Callable) -> None:
    """It is not in the rollout, but the last returns are made of its value."""
    run = new_run(FUSED, args=SPLIT)
    compute_returns = run.alg.compute_returns

    def with_fault(obs: TensorDict) -> None:
        run.alg.storage.dones[5, 7] = 0
        obs["privileged"][7] = math.nan
        compute_returns(obs)

    run.alg.compute_returns = with_fault
    run.rollout()
    where = "the return was not finite first, at step 5 of the rollout in environment 7, and so, it seems, the value of"
    with pytest.raises(NonFiniteError, match=f"{where} the observation after it"):
        run.alg.update()


def test_advantages_that_were_normalised_have_no_place(new_run: Callable) -> None:
    run = new_run(FUSED, args=SPLIT).rollout()
    run.alg.storage.advantages[:] = math.nan
    with pytest.raises(NonFiniteError, match="the returns were finite, but the mean or the std of the advantages"):
        run.alg.update()


@pytest.mark.parametrize("step", [3, 5])
def test_rnd_makes_the_reward_of_the_observation_that_follows(new_run: Callable, step: int) -> None:
    """The observation is named, not the reward of the step before; the last one is not in the rollout."""
    run = new_run(FUSED, args={**SPLIT, "rnd_cfg": dict(RND)})
    env_step, steps = run.env.step, iter(range(1, 100))

    def with_fault(actions: Tensor) -> tuple:
        obs, *others = env_step(actions)
        if next(steps) == step + 1:
            obs["policy"][7] = math.nan
        return obs, *others

    run.env.step = with_fault
    run.rollout()
    names = {
        3: r"the observation group 'policy' was not finite first, at step 4 of the rollout in environment 7\.",
        5: r"the reward was not finite first, at step 5 .* environment 7 \(RND's part, from the observation",
    }
    with pytest.raises(NonFiniteError, match=names[step]):
        run.alg.update()


def test_another_process(new_run: Callable) -> None:
    storage = new_run(FUSED, args=SPLIT).rollout().alg.storage
    for _ in range(2):
        message = first_nonfinite(storage, [], num_ranks=4)
        assert "what this process collected was finite" in message
        assert "averaged over 4 processes" in message
        storage.advantages[:] = math.nan  # normalised over all processes


@pytest.mark.parametrize(
    ("index", "name"), [(0, "the policy's mean"), (1, r"the policy's std \(which must be positive, too\)")]
)
def test_mean_and_std_are_named(new_run: Callable, index: int, name: str) -> None:
    run = new_run(FUSED, args={**SPLIT, "nonfinite": "raise"}).rollout()
    storage = run.alg.storage
    with torch.inference_mode():
        storage.distribution_params[index][0, 0] = math.nan  # of the std there is one row
    storage.actions_log_prob[:] = math.nan
    with pytest.raises(NonFiniteError, match=f"{name} was not finite first, at step 0"):
        run.alg.update()


def test_a_parameter_is_named(new_run: Callable) -> None:
    """What a checkpoint may bring along."""
    run = new_run(FUSED, args=SPLIT).rollout()
    with torch.no_grad():
        run.alg.critic.mlp[2].bias[0] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"the parameter mlp\.2\.bias of the MLPModel was not finite before the update"
    ):
        run.alg.update()


def test_an_overflow_is_named(new_run: Callable) -> None:
    run = new_run(FUSED, args={**SPLIT, "use_clipped_value_loss": False}).rollout()
    run.alg.storage.returns[:] = 1e38
    with pytest.raises(NonFiniteError, match="everything in the rollout was finite, but the gradients were not"):
        run.alg.update()


def test_the_iteration_goes_on_after_a_resume(new_run: Callable, tmp_path) -> None:
    run = new_run(FUSED, args=SPLIT).learn(3)
    run.runner.save(str(tmp_path / "run.pt"))
    resumed = new_run(FUSED, args=SPLIT)
    resumed.runner.load(str(tmp_path / "run.pt"))
    resumed.rollout()
    resumed.alg.storage.returns[:] = math.nan
    with pytest.raises(NonFiniteError, match=r"^iteration 2: "):
        resumed.alg.update()


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_stay_finite(value: float) -> None:
    normalizer = EmpiricalNormalization(3)
    normalizer.update(torch.randn(50, 3))
    before = [b.clone() for b in normalizer.buffers()]
    batch = torch.randn(50, 3)
    addresses = [b.data_ptr() for b in normalizer.buffers()]
    with statistics_in_place([torch.nn.Sequential(normalizer)], finite_only=True):
        normalizer.update(batch)
    assert addresses == [b.data_ptr() for b in normalizer.buffers()]
    assert not all(map(torch.equal, before, normalizer.buffers()))
    before = [b.clone() for b in normalizer.buffers()]
    batch[7, 1] = value
    with statistics_in_place([torch.nn.Sequential(normalizer)], finite_only=True):
        normalizer.update(batch)
    assert all(map(torch.equal, before, normalizer.buffers()))


def test_a_wrong_argument_is_named(new_run: Callable) -> None:
    with pytest.raises(ValueError, match=r"nonfinite must be one of \('skip', 'raise', 'ignore'\), got 'stop'"):
        new_run(FUSED, args={"nonfinite": "stop"})
