"""What FusedPPO does while a rollout is collected: sampling, what is stored, and how much memory that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from rsl_rl.modules.distribution import GaussianDistribution
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
ACTORS = {"mlp": {}, "heteroscedastic": HETEROSCEDASTIC, "lstm": LSTM}


@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
def test_the_actions_are_those_of_ppo_to_the_bit(actor: dict, new_run: Callable) -> None:
    """From the same random numbers, and so is all else that is stored, but for log-probabilities, to rounding."""
    stock, fused = (new_run(algorithm, actor=actor).rollout() for algorithm in ("PPO", FUSED))
    for name in ("actions", "values", "rewards", "dones"):
        assert torch.equal(getattr(fused.alg.storage, name), getattr(stock.alg.storage, name)), name
    torch.testing.assert_close(
        fused.alg.storage.actions_log_prob, stock.alg.storage.actions_log_prob, rtol=0, atol=2e-6
    )
    for ours, theirs in zip(fused.alg.storage.distribution_params, stock.alg.storage.distribution_params, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("algorithm", "times"), [("PPO", 1), (FUSED, 0)])
def test_acting_does_not_wait(algorithm: str, times: int, new_run: Callable) -> None:
    """torch.normal(mean, std) looks at the std on the host."""
    run = new_run(algorithm)
    obs = run.env.get_observations()
    with torch.inference_mode(), Operators() as mode:
        run.alg.act(obs)
    assert mode.counts["normal"] == times
    assert mode.counts["_local_scalar_dense"] == mode.counts["item"] == mode.counts["is_nonzero"] == 0


FORMULA = {"pow", "log", "neg", "div", "sum"}  # of torch's log-probability


@pytest.mark.parametrize(("algorithm", "operators"), [("PPO", FORMULA), (FUSED, set())])
def test_the_log_probability_is_one_operation(algorithm: str, operators: set, new_run: Callable) -> None:
    run = new_run(algorithm)
    obs = run.env.get_observations()
    with torch.inference_mode(), Operators() as mode:
        run.alg.act(obs)
    assert mode.counts.keys() & FORMULA == operators


class OwnSample(GaussianDistribution):
    def sample(self) -> Tensor:
        return super().sample() + 100.0


class OwnLogProb(GaussianDistribution):
    def log_prob(self, outputs: Tensor) -> Tensor:
        return super().log_prob(outputs) + 100.0


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_policys_own_log_probability_is_kept(where: str, new_run: Callable) -> None:
    """Put in later: a policy that has one from the beginning runs on PPO's formulas."""
    stock, fused = (new_run(algorithm) for algorithm in ("PPO", FUSED))
    for run in (stock, fused):
        torch.manual_seed(0)
        distribution = run.alg.actor.distribution
        if where == "class":
            distribution.__class__ = OwnLogProb
        else:
            distribution.log_prob = lambda outputs: torch.full((len(outputs),), 100.0)
        run.rollout()
        assert ("log_prob" in vars(distribution)) == (where == "instance")
    assert fused.alg.storage.actions_log_prob.max() > 50.0
    assert torch.equal(fused.alg.storage.actions_log_prob, stock.alg.storage.actions_log_prob)


def test_acting_for_other_environments(new_run: Callable) -> None:
    """As in an evaluation; nothing of it is stored."""
    run = new_run(FUSED)
    stored = run.alg.storage.observations.clone()
    assert run.alg.act(run.env.get_observations()[:5]).shape == (5, 3)
    assert (run.alg.storage.observations == stored).all()
    run.learn(1)


def test_a_policys_own_way_to_sample_is_kept(new_run: Callable) -> None:
    run = new_run(FUSED, actor={"distribution_cfg": {"class_name": OwnSample}})
    with torch.inference_mode():
        assert (run.alg.act(run.env.get_observations()) > 50.0).all()


def test_an_environment_may_write_into_its_observations(new_run: Callable) -> None:
    """The storage has s_t, not what stands in its memory a step later."""
    run = new_run(FUSED)
    env, buffer = run.env, run.env.get_observations()
    step, seen = env.step, []

    def step_in_place(actions: Tensor) -> tuple:
        seen.append(buffer.clone())
        for group in buffer.values():
            group.fill_(7.0)
        obs, *rest = step(actions)
        buffer.copy_(obs)
        return buffer, *rest

    env.step = step_in_place
    env.get_observations = lambda: buffer
    run.rollout()
    for t, obs in enumerate(seen):
        assert (run.alg.storage.observations[t] == obs).all()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_state_independent_std_is_stored_once(new_run: Callable) -> None:
    shared, per_row = (new_run(FUSED, actor=actor).rollout().alg.storage for actor in ({}, HETEROSCEDASTIC))
    _, std = shared.distribution_params
    assert std.untyped_storage().nbytes() == std.shape[-1] * std.element_size()
    _, std = per_row.distribution_params
    assert std.untyped_storage().nbytes() == std.numel() * std.element_size()


def test_the_stored_std_follows_the_parameter(new_run: Callable) -> None:
    run = new_run(FUSED, args={"entropy_coef": 1.0, "learning_rate": 1e-2, "schedule": "fixed"}).learn(2)
    run.rollout()
    std = run.alg.storage.distribution_params[1]
    assert torch.equal(std[0, 0], run.alg.actor.distribution.std_param.detach())
    assert not torch.equal(std[0, 0], torch.ones_like(std[0, 0]))


# --- mini-batches -----------------------------------------------------------------------------------------------------


def rows_of_epochs(run: object, epochs: int) -> list[list[Tensor]]:
    """The old log-probabilities of each mini-batch: they tell rows apart."""
    seen = []
    step = run.alg._step
    run.alg._step = lambda pieces, *rest: (
        seen.append(torch.cat([piece.old_actions_log_prob.flatten() for piece in pieces])),
        step(pieces, *rest),
    )
    run.alg.update()
    per_epoch = len(seen) // epochs
    return [seen[i * per_epoch : (i + 1) * per_epoch] for i in range(epochs)]


def test_mini_batches_are_drawn_anew_in_each_epoch_on_request(new_run: Callable) -> None:
    args = {"num_learning_epochs": 3, "num_mini_batches": 4}
    once, anew = (new_run(FUSED, args={**args, "reshuffle": choice}).rollout() for choice in (False, True))
    epochs = rows_of_epochs(once, 3)
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))
    epochs = rows_of_epochs(anew, 3)
    assert not any(torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    for epoch in epochs:  # each still has every row
        assert torch.equal(torch.cat(epoch).sort().values, torch.cat(epochs[0]).sort().values)


def test_recurrent_mini_batches_cannot_be_drawn(new_run: Callable) -> None:
    with pytest.raises(ValueError, match="reshuffle needs feed-forward models"):
        new_run(FUSED, actor=LSTM, args={"reshuffle": True})
