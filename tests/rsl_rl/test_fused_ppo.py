"""What FusedPPO does besides what PPO does: fewer draws, gathers and host syncs, more metrics, arguments of its own."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rsl_rl.algorithms import PPO
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import GaussianDistribution
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"

RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}
HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
BETA = {"distribution_cfg": {"class_name": "BetaDistribution"}}
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}

EPOCHS, MINI_BATCHES = 3, 4
SPLIT = {"num_learning_epochs": EPOCHS, "num_mini_batches": MINI_BATCHES}


# --- what an update costs ---------------------------------------------------------------------------------------------


class CountedOps(TorchDispatchMode):
    """Counts operators, except in the step of the optimizer, which is torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._in_optimizer = False
        optimizer.register_step_pre_hook(lambda *_: self._enter_optimizer(True))
        optimizer.register_step_post_hook(lambda *_: self._enter_optimizer(False))

    def _enter_optimizer(self, inside: bool) -> None:
        self._in_optimizer = inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._in_optimizer:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def host_reads(counts: Counter[str]) -> int:
    """How often the host asked for the value of a tensor; in inference mode bool() is an operator of its own."""
    return counts["_local_scalar_dense"] + counts["is_nonzero"] + counts["item"]


@pytest.fixture
def ops_of_update(new_run: Callable) -> Callable[..., Counter[str]]:
    """Counts the operators of one update after a rollout."""

    def count(algorithm: str, **config) -> Counter[str]:
        run = new_run(algorithm, **config).rollout()
        mode = CountedOps(run.alg.optimizer)
        with mode:
            run.alg.update()
        return mode.counts

    return count


@pytest.mark.parametrize("actor", [{}, HETEROSCEDASTIC], ids=["state_independent", "heteroscedastic"])
def test_a_fixed_learning_rate_needs_no_read_by_the_host(actor: dict, ops_of_update: Callable) -> None:
    """Nothing is read before the end; the one read there copies a tensor, which is no ``item()``. The optimizer is left
    out: Adam reads its step counters, which are on the CPU on every device. PPO reads three losses per mini-batch."""
    args = {**SPLIT, "schedule": "fixed"}
    steps = EPOCHS * MINI_BATCHES
    assert host_reads(ops_of_update(FUSED, args=args, actor=actor)) == 0
    assert host_reads(ops_of_update("PPO", args=args, actor=actor)) == 3 * steps


def test_an_adaptive_learning_rate_needs_no_read_either(ops_of_update: Callable) -> None:
    """It comes with the metrics; whatever else reacts to the KL. PPO reads three losses per mini-batch, and compares
    the KL on the host besides, once to three times."""
    args = {**SPLIT, "schedule": "adaptive"}
    steps = EPOCHS * MINI_BATCHES
    extras = [{}, {"adapt_before_first_step": True}, {"kl_rule": "rsl_rl_4"}, {"kl_rule": "proportional"}]
    extras += [{"early_stop_kl": 0.02}, {"kl_coef": 0.1, "kl_target": 0.01}, {"optimizer": "sgd"}]
    for extra in extras:
        assert host_reads(ops_of_update(FUSED, args={**args, **extra})) == 0, extra
    assert host_reads(ops_of_update("PPO", args=args)) >= 4 * steps


@pytest.mark.parametrize(("algorithm", "times"), [(FUSED, 1), ("PPO", EPOCHS)])
def test_each_mini_batch_is_gathered_once_per_update(
    algorithm: str, times: int, ops_of_update: Callable, new_run: Callable
) -> None:
    num_tensors = len(new_run(algorithm).env.get_observations().keys()) + 6  # a, V, R, log π, A, μ
    num_tensors += algorithm == "PPO"  # σ is the same in all rows
    counts = ops_of_update(algorithm, args=SPLIT)
    assert counts["index"] == num_tensors * MINI_BATCHES * times


@pytest.mark.parametrize("model", ["MLPModel", "RNNModel"])
def test_the_mini_batches_are_those_of_the_storage(model: str, new_run: Callable) -> None:
    """In its order, from the same random numbers, the same ones in each epoch."""
    run = new_run(FUSED, args=SPLIT, actor={"class_name": model}).rollout()
    storage = run.alg.storage
    random_state = torch.get_rng_state()
    generate = storage.recurrent_mini_batch_generator if model == "RNNModel" else storage.mini_batch_generator
    expected = list(generate(MINI_BATCHES, 1))
    torch.set_rng_state(random_state)
    batches, step = [], run.alg._step
    run.alg._step = lambda pieces, *rest: (batches.extend(pieces), step(pieces, *rest))
    run.alg.update()
    assert len(batches) == EPOCHS * MINI_BATCHES  # too small to be cut up
    for i, batch in enumerate(batches):
        want = expected[i % MINI_BATCHES]
        assert (batch.observations == want.observations).all()
        for name in ("actions", "values", "advantages", "returns", "old_actions_log_prob"):
            assert torch.equal(getattr(batch, name), getattr(want, name)), name
        assert all(map(torch.equal, batch.old_distribution_params, want.old_distribution_params))
    assert len(run.rates) == EPOCHS * MINI_BATCHES


@pytest.mark.parametrize("actor", [{}, HETEROSCEDASTIC, LSTM], ids=["mlp", "heteroscedastic", "lstm"])
def test_no_action_is_drawn_that_nobody_uses(actor: dict, new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    sample = GaussianDistribution.sample
    monkeypatch.setattr(GaussianDistribution, "sample", lambda self: draws.append(1) or sample(self))

    def draws_of_update(**args: object) -> int:
        run = new_run(FUSED, actor=actor, args={**SPLIT, **args}).rollout()
        draws.clear()
        run.alg.update()
        num = len(draws)
        with torch.inference_mode():
            obs = run.env.get_observations()
            assert not torch.equal(run.alg.act(obs), run.alg.act(obs))  # the next rollout draws again
        draws.clear()
        return num

    assert draws_of_update() == 0
    assert draws_of_update(keep_random_stream=True) == EPOCHS * MINI_BATCHES


def test_an_update_takes_nothing_from_the_random_stream_but_the_shuffle(new_run: Callable) -> None:
    run = new_run(FUSED, args=SPLIT).rollout()
    before = torch.get_rng_state()
    run.alg.update()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randperm(run.env.num_envs * run.runner.cfg["num_steps_per_env"])
    assert torch.equal(torch.get_rng_state(), after)


def test_sampling_is_back_after_an_error_in_the_update(new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(FUSED).rollout()

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(run.alg.actor.mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run.alg.update()
    monkeypatch.undo()
    first, second = (run.alg.act(run.env.get_observations()) for _ in range(2))
    assert not torch.equal(first, second)


def test_training_learns_without_the_random_stream_of_ppo(train: Callable) -> None:
    """The default: other random numbers than PPO's, the same task. Both come from 0.54 to 0.79."""
    run = train(FUSED, 40, args={"schedule": "adaptive", "num_learning_epochs": 5, "gamma": 0.9})
    rewards = run.env.mean_rewards
    assert sum(rewards[-40:]) / 40 > sum(rewards[:40]) / 40 + 0.15
    assert all(losses["first_kl"] < 1e-10 for losses in run.losses)


# --- loss_dict --------------------------------------------------------------------------------------------------------


def metrics_by_hand(old: Normal, new: Normal, actions: Tensor, old_log_prob: Tensor, direction: str) -> dict:
    """The metrics of one mini-batch from torch.distributions."""
    clip_param = 0.2
    log_ratio = new.log_prob(actions).sum(-1) - old_log_prob
    kl = kl_divergence(old, new) if direction == "old_new" else kl_divergence(new, old)
    return {
        "kl": kl.sum(-1).mean().item(),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean().item(),
        "clip_fraction": ((log_ratio.exp() - 1.0).abs() > clip_param).double().mean().item(),
        "entropy": new.entropy().sum(-1).mean().item(),
    }


@pytest.mark.parametrize("heteroscedastic", [False, True])
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_loss_dict_has_the_metrics_of_the_mini_batches(
    direction: str, heteroscedastic: bool, new_run: Callable
) -> None:
    """Against what rsl_rl's own mini-batches and networks give just before each step."""
    args = {**SPLIT, "schedule": "fixed", "learning_rate": 3e-3, "kl_direction": direction}
    run = new_run(FUSED, args=args, actor=HETEROSCEDASTIC if heteroscedastic else {}).rollout()
    alg = run.alg
    random_state = torch.get_rng_state()
    batches = list(alg.storage.mini_batch_generator(MINI_BATCHES, 1))
    torch.set_rng_state(random_state)
    rows = []

    def by_hand(*_) -> None:
        batch = batches[len(rows) % MINI_BATCHES]
        policy = alg.get_policy()
        with torch.no_grad():
            latent = policy.get_latent(batch.observations)
            output = policy.mlp(latent).double()
            if heteroscedastic:
                mean, std = output[:, 0], output[:, 1].exp()
            else:
                mean, std = output, policy.distribution.std_param.double().expand_as(output)
        old_mean, old_std = (p.double() for p in batch.old_distribution_params)
        old_log_prob = batch.old_actions_log_prob.squeeze(-1).double()
        rows.append(
            metrics_by_hand(
                Normal(old_mean, old_std), Normal(mean, std), batch.actions.double(), old_log_prob, direction
            )
        )

    alg.optimizer.register_step_pre_hook(by_hand)
    loss_dict = alg.update()

    assert len(rows) == EPOCHS * MINI_BATCHES
    expected = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    assert {name: loss_dict[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert 1e-3 < loss_dict["kl"] < 1.0
    assert 0.0 < loss_dict["clip_fraction"] < 1.0
    assert 0.0 <= loss_dict["first_kl"] < 1e-10
    assert abs(rows[0]["kl"]) < 1e-10


@pytest.mark.parametrize(
    ("args", "extra"), [({}, []), ({"rnd_cfg": RND}, ["rnd"]), ({"symmetry_cfg": {}}, ["symmetry"])]
)
def test_the_keys_of_loss_dict(args: dict, extra: list[str], train: Callable) -> None:
    """PPO's keys first, in its order: the console shows them so."""
    stock = train("PPO", 1, args=args).losses[0]
    fused = train(FUSED, 1, args=args).losses[0]
    assert list(stock) == ["value", "surrogate", "entropy", *extra]
    kl = ["kl", "clip_fraction", "approx_kl", "first_kl", "max_kl", "last_kl"]
    rates = ["learning_rate_min", "learning_rate_max"] if args.get("schedule", "adaptive") == "adaptive" else []
    assert list(fused) == [*stock, *kl, *rates, "nonfinite_steps", *(["nonfinite_rnd_steps"] if "rnd" in extra else [])]
    assert all(type(value) is float for value in fused.values())


def test_tensorboard_gets_the_metrics(train: Callable, tmp_path: Path) -> None:
    run = train(FUSED, 3, log_dir=str(tmp_path))
    run.runner.logger.writer.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for key in ("kl", "first_kl", "clip_fraction", "approx_kl", "value", "surrogate", "entropy"):
        logged = [(event.step, event.value) for event in events.Scalars(f"Loss/{key}")]
        assert [step for step, _ in logged] == [0, 1, 2]
        assert [value for _, value in logged] == pytest.approx([losses[key] for losses in run.losses], rel=1e-6)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_every_argument_of_ppo_keeps_its_name_and_place(new_run: Callable) -> None:
    """By name, and the first three by position."""
    alg = new_run(FUSED).alg
    parameters = list(inspect.signature(PPO.__init__).parameters.values())[1:]
    assert [p.name for p in parameters[:3]] == ["actor", "critic", "storage"]
    assert all(p.default is not p.empty for p in parameters[3:])
    again = type(alg)(alg.actor, alg.critic, alg.storage, **{p.name: p.default for p in parameters[3:]})
    for p in parameters[3:]:
        if hasattr(again, p.name) and p.name != "optimizer":  # not those that become an object of another name
            assert getattr(again, p.name) == p.default


def test_an_unknown_argument_is_refused_as_by_ppo(new_run: Callable) -> None:
    for algorithm in ("PPO", FUSED):
        with pytest.raises(TypeError, match="clip_parameter"):
            new_run(algorithm, args={"clip_parameter": 0.2})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"backend": "vulkan"}, "backend must be one of .*'vulkan'"),
        ({"kl_direction": "forward"}, "kl_direction must be one of .*'forward'"),
    ],
)
@pytest.mark.parametrize("actor", [{}, BETA], ids=["gaussian", "beta"])
def test_a_wrong_value_is_told_when_the_algorithm_is_made(
    args: dict, message: str, actor: dict, new_run: Callable
) -> None:
    with pytest.raises(ValueError, match=message):
        new_run(FUSED, args=args, actor=actor)


def test_the_eager_backend_agrees_with_the_compiled_one(train: Callable) -> None:
    args = {"schedule": "adaptive"}
    compiled, eager = (train(FUSED, 5, args={**args, "backend": backend}) for backend in ("cpu", "eager"))
    nudged = train(FUSED, 5, nudge=0, args={**args, "backend": "cpu"})
    assert compiled.rates == eager.rates
    assert compiled.distance(eager) <= 10.0 * max(nudged.distance(compiled), 1e-7)
    for ours, theirs in zip(compiled.losses, eager.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_same_seed_gives_the_same_bits(train: Callable) -> None:
    first, second = (train(FUSED, 5, args={"schedule": "adaptive"}) for _ in range(2))
    assert first.distance(second) == 0.0
    assert first.losses == second.losses
    assert first.distance(train(FUSED, 5, seed=2, args={"schedule": "adaptive"})) > 1e-3


# --- policies that the fused loss does not know -----------------------------------------------------------------------


class HalfLogProb(GaussianDistribution):
    """A log-probability that is not the Gaussian's."""

    def log_prob(self, outputs: Tensor) -> Tensor:
        return 0.5 * super().log_prob(outputs)


class DoubleEntropy(GaussianDistribution):
    """An entropy that is not the Gaussian's."""

    @property
    def entropy(self) -> Tensor:
        return 2.0 * super().entropy


class HalfKL(GaussianDistribution):
    """A KL that is not the Gaussian's: only the adaptive learning rate sees it."""

    def kl_divergence(self, old_params: tuple[Tensor, ...], new_params: tuple[Tensor, ...]) -> Tensor:
        return 0.5 * super().kl_divergence(old_params, new_params)


class SquashedModel(MLPModel):
    """A model whose log-probability has the correction for a squashed action."""

    def get_output_log_prob(self, outputs: Tensor) -> Tensor:
        return super().get_output_log_prob(outputs) - torch.log1p(outputs.square()).sum(-1)


OWN_FORMULAS = {
    "BetaDistribution is not a Gaussian": BETA,
    "HalfLogProb has its own log_prob": {"distribution_cfg": {"class_name": HalfLogProb}},
    "DoubleEntropy has its own entropy": {"distribution_cfg": {"class_name": DoubleEntropy}},
    "HalfKL has its own kl_divergence": {"distribution_cfg": {"class_name": HalfKL}},
    "SquashedModel has its own get_output_log_prob": {"class_name": SquashedModel},
}


@pytest.mark.parametrize("reason", OWN_FORMULAS)
def test_a_policy_with_its_own_formulas_runs_those(
    reason: str, new_run: Callable, train: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says so once."""
    config = {"args": {"schedule": "adaptive"}, "actor": OWN_FORMULAS[reason]}
    stock = train("PPO", 10, **config)
    nudged = train("PPO", 10, nudge=0, **config)
    with caplog.at_level(logging.WARNING, logger="pyfast_ppo"):
        fused = train(FUSED, 10, **config)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert list(fused.losses[0]) == list(stock.losses[0])
    assert fused.rates == stock.rates
    assert fused.distance(stock) <= 10.0 * max(nudged.distance(stock), 1e-7)

    with pytest.raises(ValueError, match=f"kl_coef needs a diagonal Gaussian policy: {reason}"):
        new_run(FUSED, args={"kl_coef": 0.1}, actor=OWN_FORMULAS[reason])


@pytest.mark.parametrize("actor", [{}, HETEROSCEDASTIC, LSTM], ids=["mlp", "heteroscedastic", "lstm"])
def test_a_gaussian_policy_logs_nothing(actor: dict, train: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pyfast_ppo"):
        train(FUSED, 1, actor=actor)
    assert not caplog.records


class DecayingStd(GaussianDistribution):
    """A std that falls a little at each forward pass: each step of the rollout then has another."""

    def __init__(self, output_dim: int) -> None:
        super().__init__(output_dim)
        self.num_calls = 0

    def update(self, mlp_output: Tensor) -> None:
        self.num_calls += 1
        self._distribution = Normal(mlp_output, self.std_param * 0.998**self.num_calls)


def test_a_std_that_changes_during_the_rollout(float64: None, train: Callable) -> None:
    """The old std is then a row per transition; with the first one for all, KL and learning rate would be others."""
    config = {"actor": {"distribution_cfg": {"class_name": DecayingStd}}}
    exact = {"schedule": "adaptive", "gamma": 63 / 64, "lam": 15 / 16}
    stock = train("PPO", 10, **config, args=exact)
    fused = train(FUSED, 10, **config, args={**exact, "keep_random_stream": True, "adapt_before_first_step": True})
    assert fused.losses[0]["first_kl"] > 1e-6
    assert len(set(stock.rates)) > 1
    assert fused.rates == stock.rates
    assert fused.distance(stock) < 1e-12


class SquareStd(GaussianDistribution):
    """A std that a rule makes of the mean, as a policy of the user's own may do."""

    def update(self, mlp_output: Tensor) -> None:
        self._distribution = Normal(mlp_output, self.std_param * (1.0 + 0.1 * mlp_output.square()))


def test_a_std_that_depends_on_the_mean(float64: None, train: Callable) -> None:
    config = {"actor": {"distribution_cfg": {"class_name": SquareStd}}}
    exact = {"schedule": "fixed", "gamma": 63 / 64, "lam": 15 / 16}
    stock = train("PPO", 10, **config, args=exact)
    fused = train(FUSED, 10, **config, args={**exact, "keep_random_stream": True})
    assert fused.distance(stock) < 1e-12
