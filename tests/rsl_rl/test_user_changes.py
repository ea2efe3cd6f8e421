"""What users do to an algorithm, its models and its settings beyond a config: as in PPO."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import GaussianDistribution
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Laplace, Normal

from pyfast_ppo import backends
from pyfast_ppo.rsl_rl import fused_ppo

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
PARITY = {"keep_random_stream": True}
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}
SAME, OTHER = {"actor": ["policy"], "critic": ["policy"]}, {"actor": ["policy"], "critic": ["privileged"]}


def add_extras(run: object, made: Callable[[TensorDict, dict], dict]) -> None:
    """To what the environment hands out in each step: ``made`` of its observations and extras."""
    step = run.env.step

    def with_more(actions: Tensor) -> tuple:
        obs, rewards, dones, extras = step(actions)
        return obs, rewards, dones, {**extras, **made(obs, extras)}

    run.env.step = with_more


# --- models -----------------------------------------------------------------------------------------------------------


class InPlaceNormalizer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5).div_(2.0)


class WithInPlaceNormalizer(MLPModel):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.obs_normalizer = InPlaceNormalizer()


class WritesIntoItsLatent(MLPModel):
    def get_latent(self, *args: object, **kwargs: object) -> Tensor:
        latent = super().get_latent(*args, **kwargs)
        latent *= 0.5
        return latent


class WithHook(MLPModel):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.mlp.register_forward_pre_hook(halve)


def halve(module: nn.Module, args: tuple[Tensor]) -> None:
    args[0].mul_(0.5)


@pytest.mark.parametrize("model", [WithInPlaceNormalizer, WritesIntoItsLatent, WithHook])
@pytest.mark.parametrize("groups", [SAME, OTHER], ids=["same group", "other group"])
def test_models_that_write_into_their_observations(model: type, groups: dict, train: Callable) -> None:
    options = {"obs_groups": groups, "actor": {"class_name": model}, "critic": {"class_name": model}}
    stock = train("PPO", 3, **options)
    fused = train(FUSED, 3, args=PARITY, **options)
    assert fused.distance(stock) < 1e-5


class OneStd(GaussianDistribution):
    """One std for all actions: its gradient comes expanded."""

    shape: tuple[int, ...] = (1,)

    def __init__(self, output_dim: int, **kwargs: object) -> None:
        super().__init__(output_dim, **kwargs)
        self.std_param = nn.Parameter(torch.ones(self.shape))

    def update(self, mlp_output: Tensor) -> None:
        self._distribution = Normal(mlp_output, self.std_param.clamp(1e-3, 10.0))


class OneRow(OneStd):
    shape = (1, 3)


@pytest.mark.parametrize("distribution", [OneStd, OneRow])
@pytest.mark.parametrize("rows_of_piece", [40, 1000])
def test_a_std_of_another_shape(
    distribution: type, rows_of_piece: int, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_ppo, "_PIECE_BYTES", rows_of_piece * 4 * 16)
    options = {"actor": {"distribution_cfg": {"class_name": distribution}}}
    assert train(FUSED, 3, **options).losses[-1]["nonfinite_steps"] == 0.0
    stock = train("PPO", 3, **options, args={"schedule": "fixed"})
    fused = train(FUSED, 3, **options, args={"schedule": "fixed", **PARITY})
    assert fused.distance(stock) < 1e-5


class OwnForward(MLPModel):
    """A std of the state, behind a distribution whose own is a parameter."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.head = nn.Linear(self.obs_dim, 3)

    def forward(self, obs, masks=None, hidden_state=None, stochastic_output=False):
        latent = self.get_latent(obs)
        mean = self.mlp(latent)
        if not stochastic_output:
            return mean
        self.distribution._distribution = Normal(mean, nn.functional.softplus(self.head(latent)) + 0.1)
        return self.distribution.sample()


def test_an_actor_with_a_std_of_its_own(train: Callable) -> None:
    runs = [
        train(name, 3, actor={"class_name": OwnForward}, args=args) for name, args in (("PPO", {}), (FUSED, PARITY))
    ]
    assert runs[1].rates == pytest.approx(runs[0].rates, rel=1e-6)
    assert len(set(runs[1].rates)) > 2
    assert runs[1].distance(runs[0]) < 1e-5


def of_the_state(distribution: GaussianDistribution, mean: Tensor) -> None:
    distribution._distribution = Normal(mean, distribution.std_param * (1.0 + mean.square()))


@pytest.mark.parametrize("step", [0, 3])
def test_a_std_that_becomes_one_of_the_state(step: int, new_run: Callable) -> None:
    """Also in the middle of a rollout, whose first steps had one row."""
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args=args).learn(1)
        act, distribution = run.alg.act, run.alg.actor.distribution

        def change_and_act(obs: TensorDict, run=run, act=act, distribution=distribution) -> Tensor:
            if run.alg.storage.step == step:
                distribution.update = lambda mean: of_the_state(distribution, mean)
            return act(obs)

        run.alg.act = change_and_act
        runs.append(run.learn(3))
    assert runs[1].rates == pytest.approx(runs[0].rates, rel=1e-6)
    assert runs[1].distance(runs[0]) < 1e-5


def test_another_distribution(new_run: Callable) -> None:
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args=args).learn(1)
        run.alg.actor.distribution = OneStd(3)
        runs.append(run.learn(3))
    assert runs[1].distance(runs[0]) < 1e-5


def test_a_storage_that_ppo_has_filled(new_run: Callable) -> None:
    run = new_run(FUSED)
    run.alg.storage = new_run("PPO", seed=2).rollout().alg.storage
    run.alg.storage.clear()
    run.learn(2)
    assert all(losses["first_kl"] < 1e-9 for losses in run.losses)


@pytest.mark.parametrize(
    "changes",
    [
        {"get_kl_divergence": lambda old, new: torch.ones(len(old[0]))},
        {"get_output_log_prob": lambda actions: -actions.square().sum(-1) * 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_formulas_of_one_policy_alone(changes: dict, new_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args={**args, "learning_rate": 1e-3}).learn(1)
        run.losses.clear()
        for name, formula in changes.items():
            setattr(run.alg.actor, name, formula)
        runs.append(run.learn(2))
    assert f"MLPModel has its own {next(iter(changes))}" in caplog.text
    assert [losses["surrogate"] for losses in runs[1].losses] == pytest.approx(
        [losses["surrogate"] for losses in runs[0].losses], abs=1e-5
    )
    assert runs[1].alg.learning_rate == pytest.approx(runs[0].alg.learning_rate, rel=1e-6)
    assert runs[1].distance(runs[0]) < 1e-5


class DoubleCritic(MLPModel):
    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return super().forward(*args, **kwargs).double()


def test_a_critic_of_another_type(train: Callable) -> None:
    runs = [
        train(name, 2, critic={"class_name": DoubleCritic}, args=args) for name, args in (("PPO", {}), (FUSED, PARITY))
    ]
    assert runs[1].distance(runs[0]) < 1e-5


def test_a_storage_of_another_layout(new_run: Callable) -> None:
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args=args)
        for name in ("values", "returns", "advantages"):
            steps, envs, _ = getattr(run.alg.storage, name).shape
            setattr(run.alg.storage, name, torch.zeros(envs, steps, 1).transpose(0, 1))
        runs.append(run.learn(2))
    assert runs[1].distance(runs[0]) < 1e-5


class DrawsFromLaplace(GaussianDistribution):
    def update(self, mlp_output: Tensor) -> None:
        self._distribution = Laplace(mlp_output, self.std_param.clamp(1e-3, 10.0) / 2**0.5)


def test_a_policy_that_draws_from_another_law(train: Callable, caplog: pytest.LogCaptureFixture) -> None:
    options = {"actor": {"distribution_cfg": {"class_name": DrawsFromLaplace}}, "args": {"schedule": "fixed"}}
    fused = train(FUSED, 3, **options)
    assert fused.distance(train("PPO", 3, **options)) < 1e-6
    assert caplog.text.count("DrawsFromLaplace draws from Laplace, not from Normal") == 1


def test_such_a_policy_cannot_have_what_only_the_fused_loss_has(new_run: Callable) -> None:
    run = new_run(FUSED, args={"kl_coef": 0.1}, actor={"distribution_cfg": {"class_name": DrawsFromLaplace}})
    with pytest.raises(ValueError, match="kl_coef needs a diagonal Gaussian policy: DrawsFromLaplace draws from"):
        run.learn(1)


def test_a_forward_of_one_layer_alone(train: Callable, new_run: Callable) -> None:
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args=args)
        layer = run.alg.actor.mlp[0]
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, 0.5 * layer.weight, layer.bias)
        runs.append(run.learn(3))
    assert runs[0].distance(runs[1]) < 1e-5


def test_a_sample_of_the_users_own(new_run: Callable) -> None:
    run = new_run(FUSED)
    distribution = run.alg.actor.distribution
    distribution.sample = own = lambda: distribution.mean + 7.0
    run.learn(1)
    assert distribution.sample is own
    assert torch.allclose(run.rollout().alg.storage.actions[0], run.alg.storage.distribution_params[0][0] + 7.0)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_acts_with_its_own_policy(new_run: Callable) -> None:
    run = new_run(FUSED).rollout()
    run.alg.storage.clear()
    obs = run.env.get_observations()
    for copied in (copy.deepcopy(run.alg), copy.deepcopy(new_run(FUSED).alg)):
        with torch.no_grad():
            copied.actor.mlp[-1].bias.fill_(100.0)
            assert (copied.act(obs) > 50.0).all()
            assert (run.alg.act(obs) < 50.0).all()


# --- symmetry ---------------------------------------------------------------------------------------------------------


def mirror_in_place(env: object, obs: object, actions: Tensor | None) -> tuple:
    """Writes into what it is given."""
    if obs is not None:
        before = obs.clone()
        obs["policy"].neg_()
        obs = torch.cat([before, obs])
    return obs, None if actions is None else torch.cat([actions, -actions])


@pytest.mark.parametrize("augmented", [False, True])
def test_a_symmetry_that_writes_into_its_observations(augmented: bool, new_run: Callable) -> None:
    symmetry = {"use_data_augmentation": augmented, "use_mirror_loss": True, "mirror_loss_coeff": 0.5}
    config = {"obs_groups": {"critic": ["policy"]}}
    stock, fused = (
        new_run(algorithm, args={"schedule": "fixed", "symmetry_cfg": symmetry, **more}, **config)
        for algorithm, more in (("PPO", {}), (FUSED, PARITY))
    )
    for run in (stock, fused):
        run.alg.symmetry.data_augmentation_func = mirror_in_place
        torch.manual_seed(0)
        run.learn(1)
    assert fused.distance(stock) < 1e-6


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "changes"),
    [
        ({"schedule": "adaptive"}, {"schedule": "fixed"}),
        ({"schedule": "fixed"}, {"schedule": "adaptive"}),
        ({"schedule": "adaptive"}, {"desired_kl": 1e-7}),
    ],
)
def test_a_schedule_that_is_changed_later(args: dict, changes: dict, new_run: Callable) -> None:
    rates = []
    for algorithm, more in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args={**args, **more}).learn(1)
        for name, value in changes.items():
            setattr(run.alg, name, value)
        run.learn(2)
        rates.append(run.alg.learning_rate)
    assert rates[0] == pytest.approx(rates[1])


def test_another_optimizer(new_run: Callable, state_distance: Callable) -> None:
    run = new_run(FUSED, args={"schedule": "fixed"}).learn(1)
    parameters = [*run.alg.actor.parameters(), *run.alg.critic.parameters()]
    run.alg.optimizer = torch.optim.SGD(parameters, lr=0.0)
    before = [p.detach().clone() for p in parameters]
    run.learn(1)
    assert all(map(torch.equal, before, parameters))
    assert "betas" not in run.alg.save()["optimizer_state_dict"]["param_groups"][0]


def test_another_optimizer_of_rnd(new_run: Callable) -> None:
    run = new_run(FUSED, args={"rnd_cfg": RND}).learn(1)
    predictor = run.alg.rnd.predictor
    run.alg.rnd.optimizer = torch.optim.Adam(predictor.parameters(), lr=0.0)
    before = [p.detach().clone() for p in predictor.parameters()]
    run.learn(1)
    assert all(map(torch.equal, before, predictor.parameters()))
    assert len(run.alg.rnd.optimizer.state) == len(before)
    assert run.alg.save()["rnd_optimizer_state_dict"]["param_groups"][0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("early_stop_kl", 1e-9),
        ("kl_rule", "proportional"),
        ("kl_target", 1e-4),
        ("adapt_before_first_step", True),
        ("keep_random_stream", True),
    ],
)
def test_arguments_that_are_changed_later(name: str, value: object, new_run: Callable) -> None:
    """An update is then that of an algorithm that had them from the beginning."""
    args = {"schedule": "adaptive", "kl_coef": 0.1}
    later, always, never = (new_run(FUSED, args=args | more) for more in ({}, {name: value}, {}))
    setattr(later.alg, name, value)
    for run in (later, always, never):
        torch.manual_seed(0)
        run.learn(1)
    assert later.losses == always.losses
    assert later.distance(always) == 0.0
    assert torch.equal(later.random_state, always.random_state)
    if name != "adapt_before_first_step":  # the first KL is rounding, which does not count
        assert later.losses != never.losses or not torch.equal(later.random_state, never.random_state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kl_rule", "adaptive", "kl_rule must be one of"),
        ("nonfinite", "Skip", "nonfinite must be one of"),
        ("time_out_bootstrap", "final", "time_out_bootstrap must be one of"),
        ("kl_coef", -1.0, "kl_coef must be 0 or more, got -1.0"),
        ("kl_coef", math.nan, "kl_coef must be 0 or more, got nan"),
        ("max_grad_norm", math.nan, "max_grad_norm must be 0 or more, got nan"),
    ],
)
def test_a_wrong_value_that_is_set_later(name: str, value: object, message: str, new_run: Callable) -> None:
    run = new_run(FUSED).learn(1).rollout()
    setattr(run.alg, name, value)
    with pytest.raises(ValueError, match=message):
        run.alg.update()


def test_a_checkpoint_is_written_whatever_is_set(new_run: Callable) -> None:
    alg = new_run(FUSED).learn(1).alg
    alg.kl_coef = math.nan
    assert "actor_state_dict" in alg.save()


def test_a_std_for_all_actions(train: Callable) -> None:
    class OneForAll(GaussianDistribution):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.std_param = nn.Parameter(torch.tensor([0.5]))

    actor = {"distribution_cfg": {"class_name": OneForAll}}
    stock = train("PPO", 2, actor=actor, args={"schedule": "fixed"})
    fused = train(FUSED, 2, actor=actor, args={"schedule": "fixed", **PARITY})
    assert stock.distance(fused) < 1e-5


def test_an_adapted_penalty_that_is_switched_off_later(new_run: Callable) -> None:
    run = new_run(FUSED, args={"schedule": "fixed", "kl_coef": 0.5, "kl_target": 1e-4}).learn(1)
    assert run.alg.kl_coef != 0.5
    run.alg.kl_target, run.alg.kl_coef = None, 0.125
    other = copy.deepcopy(run.rollout().alg)
    other.kl_coef = 50.0
    torch.manual_seed(0)
    assert "kl_coef" not in run.alg.update()
    torch.manual_seed(0)
    other.update()
    assert run.alg.kl_coef == 0.125
    assert not all(map(torch.equal, run.alg.actor.parameters(), other.actor.parameters()))


@pytest.mark.parametrize("raw", [False, True])
def test_another_critic(raw: bool, new_run: Callable) -> None:
    """Put in between two updates, with an optimizer that has its parameters."""
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args={"schedule": "fixed", "max_grad_norm": 0.05, **args}).learn(1)
        alg = run.alg
        critic = copy.deepcopy(alg.critic)
        for parameter in critic.parameters():
            parameter.data.mul_(1.5)
        alg.critic = critic
        if raw:
            alg._raw_critic = critic
        alg.optimizer = torch.optim.Adam([*alg.actor.parameters(), *critic.parameters()], lr=1e-3)
        before = copy.deepcopy(critic)
        run.learn(2)
        moved = [(a - b).abs().max() for a, b in zip(critic.parameters(), before.parameters(), strict=True)]
        assert min(moved) > 0.0
        runs.append(run)
    assert runs[0].distance(runs[1]) < 1e-5


class DoublesItsOutput(GaussianDistribution):
    def deterministic_output(self, mlp_output: Tensor) -> Tensor:
        return 2.0 * mlp_output


def test_a_critic_with_a_distribution(train: Callable) -> None:
    """Its values are what that makes of the network's output."""
    critic = {"distribution_cfg": {"class_name": DoublesItsOutput}}
    stock = train("PPO", 2, critic=critic, args={"schedule": "fixed"})
    fused = train(FUSED, 2, critic=critic, args={"schedule": "fixed", **PARITY})
    assert stock.distance(fused) < 1e-5


def test_another_actor_draws_nothing_that_nobody_uses(new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(FUSED, args={"symmetry_cfg": {}}).learn(1)
    alg = run.alg
    alg.actor = alg._raw_actor = copy.deepcopy(alg.actor)
    alg.optimizer = torch.optim.Adam([*alg.actor.parameters(), *alg.critic.parameters()], lr=1e-3)
    run.rollout()
    draws, sample = [], GaussianDistribution.sample
    monkeypatch.setattr(GaussianDistribution, "sample", lambda self: (draws.append(1), sample(self))[1])
    alg.update()
    assert draws == []


class OneMoreDimension(RolloutStorage):
    def mini_batch_generator(self, *args: int) -> Iterator[RolloutStorage.Batch]:
        for batch in super().mini_batch_generator(*args):
            batch.observations = batch.observations.unsqueeze(0)
            for name in ("actions", "values", "advantages", "returns", "old_actions_log_prob"):
                setattr(batch, name, getattr(batch, name).unsqueeze(0))
            batch.old_distribution_params = tuple(params.unsqueeze(0) for params in batch.old_distribution_params)
            yield batch


def test_mini_batches_of_another_shape(new_run: Callable) -> None:
    runs = [new_run(name, args={"schedule": "fixed", **more}) for name, more in (("PPO", {}), (FUSED, PARITY))]
    for run in runs:
        run.alg.storage.__class__ = OneMoreDimension
        torch.manual_seed(0)
        run.learn(1)
    assert runs[0].distance(runs[1]) < 1e-5


def test_a_backend_that_is_set_later(new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(FUSED).learn(1)
    steps = []
    step = backends.cpu.adam_step
    monkeypatch.setattr(backends.cpu, "adam_step", lambda *args: (steps.append(1), step(*args))[1])
    log_probs = []
    log_prob = backends.cpu.gaussian_log_prob
    monkeypatch.setattr(backends.cpu, "gaussian_log_prob", lambda *args: (log_probs.append(1), log_prob(*args))[1])
    run.learn(1)
    assert (len(steps), len(log_probs)) == (4, 6)
    run.alg.backend = "eager"
    run.learn(1)
    assert (len(steps), len(log_probs)) == (4, 6)


def test_no_clipping_is_infinity(new_run: Callable) -> None:
    run = new_run(FUSED, args={"max_grad_norm": None}).rollout()
    with pytest.raises(TypeError, match=r"max_grad_norm must be a number, got None; math.inf clips nothing"):
        run.alg.update()


def test_momentum_that_is_set_later_and_a_layer_that_is_trained_later(new_run: Callable) -> None:
    runs = []
    for algorithm, more in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args={"optimizer": "sgd", "schedule": "fixed", "learning_rate": 1e-2, **more}).learn(1)
        run.alg.optimizer.param_groups[0]["momentum"] = 0.9
        weight = run.alg.actor.mlp[0].weight
        weight.requires_grad_(False)
        run.learn(1)
        weight.requires_grad_(True)
        runs.append(run.learn(1))
    assert runs[0].distance(runs[1]) < 1e-5


def test_another_group_of_parameters(new_run: Callable) -> None:
    run = new_run(FUSED).learn(1)
    run.alg.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    run.learn(1)
    assert len(run.alg.save()["optimizer_state_dict"]["param_groups"]) == 2


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("args", [{}, {"adapt_before_first_step": True}])
def test_a_frozen_actor_does_not_raise_the_rate(backend: str | None, args: dict, new_run: Callable) -> None:
    """As while only the critic is warmed up."""
    rates = []
    for algorithm, more in (("PPO", {}), (FUSED, {"backend": backend, **args})):
        run = new_run(algorithm, args={"schedule": "adaptive", "learning_rate": 1e-3, **more})
        run.alg.actor.requires_grad_(False)
        rates.append(run.learn(3).alg.learning_rate)
    assert rates == [1e-3, 1e-3]


def test_the_rate_rests_while_no_step_is_taken(new_run: Callable) -> None:
    args = {"schedule": "adaptive", "desired_kl": 1e-3, "early_stop_kl": 3e-3, "num_learning_epochs": 10}
    run = new_run(FUSED, args={**args, "learning_rate": 5e-3}).learn(1)
    skipped = round(run.losses[-1]["skipped_steps"])
    assert 2 < skipped < 19
    after_stop = [float(rate) for rate in run.rates[-skipped:]]
    assert len(set(after_stop)) == 1
    assert run.alg.learning_rate == pytest.approx(after_stop[0])


def test_random_numbers_stay_those_of_ppo_with_large_mini_batches(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch draws normal numbers in blocks: parts of a mini-batch would take others."""
    monkeypatch.setattr(fused_ppo, "_PIECE_BYTES", 7 * 4 * 16)
    stock, fused = train("PPO", 2), train(FUSED, 2, args=PARITY)
    assert torch.equal(stock.random_state, fused.random_state)
    assert fused.distance(stock) < 1e-5


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_that_is_left_does_not_bootstrap_the_next(new_run: Callable) -> None:
    fresh, left = new_run(FUSED), new_run(FUSED)
    final_obs = left.env.get_observations()
    for step in range(3):  # and no compute_returns
        left.alg._final_values.record(step, final_obs, torch.ones(32, dtype=torch.bool))
    returns = []
    for run in (fresh, left):
        torch.manual_seed(0)
        returns.append(run.rollout().alg.storage.returns.clone())
    assert torch.equal(*returns)


FOREIGN_FORMS = {
    "tensor": lambda obs: torch.zeros(32, 6),
    "nothing": lambda obs: {},
    "another group": lambda obs: {"policy": obs["policy"]},
    "some rows": lambda obs: {name: group[:3] for name, group in obs.items()},
    "no tensor": lambda obs: {name: None for name in obs.keys()},  # noqa: SIM118
}


@pytest.mark.parametrize("form", FOREIGN_FORMS)
def test_final_observations_of_another_form(form: str, new_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody's own meaning of the key, which rsl_rl does not look at."""
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args=args)
        add_extras(run, lambda obs, _: {"final_obs": FOREIGN_FORMS[form](obs)})
        runs.append(run.learn(3))
    assert runs[1].env.num_time_outs > 0
    assert runs[1].distance(runs[0]) < 1e-5
    assert caplog.text.count("It is ignored: time-outs bootstrap from V(s_t), as in PPO.") == 1
    assert "extras['final_obs']" in caplog.text


def test_time_outs_with_weights(new_run: Callable) -> None:
    """rsl_rl multiplies by them."""
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, PARITY)):
        run = new_run(algorithm, args=args)
        add_extras(run, lambda _, extras: {"time_outs": 0.5 * extras["time_outs"].float()})
        runs.append(run.learn(3))
    assert runs[1].env.num_time_outs > 0
    assert runs[1].distance(runs[0]) < 1e-5


def test_a_hook_that_reads_the_learning_rate(new_run: Callable) -> None:
    seen: dict[str, list] = {}
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, args=PARITY if algorithm == FUSED else {})
        rates = seen[algorithm] = []
        alg = run.alg
        alg.optimizer.register_step_pre_hook(lambda *_, alg=alg, rates=rates: rates.append(float(alg.learning_rate)))
        run.learn(2)
        assert type(alg.learning_rate) is float
    assert seen[FUSED] == pytest.approx(seen["PPO"], rel=1e-6)
    assert len(set(seen[FUSED])) > 2


def test_more_mini_batches_than_rows(new_run: Callable) -> None:
    run = new_run(FUSED, env_args={"num_envs": 1}, args={"num_mini_batches": 7}).rollout()
    with pytest.raises(ValueError, match="num_mini_batches is 7, more than the rollout has rows: 1 environments x 6"):
        run.alg.update()


def test_more_mini_batches_than_environments_of_a_recurrent_policy(new_run: Callable) -> None:
    lstm = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
    run = new_run(FUSED, env_args={"num_envs": 2}, actor=lstm, args={"num_mini_batches": 3}).rollout()
    with pytest.raises(
        ValueError, match="3, more than the rollout has environments, by which recurrent models are cut"
    ):
        run.alg.update()


def test_the_advantages_of_one_row_have_no_std(new_run: Callable) -> None:
    args = {"num_mini_batches": 6, "normalize_advantage_per_mini_batch": True}
    run = new_run(FUSED, env_args={"num_envs": 1}, args=args).rollout()
    with pytest.raises(ValueError, match="normalize_advantage_per_mini_batch needs two rows or more in a mini-batch"):
        run.alg.update()


@pytest.mark.parametrize("args", [{"nonfinite": "raise"}, {"reshuffle": True}])
def test_arguments_that_a_beta_policy_cannot_have(args: dict, new_run: Callable) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(args))} needs a diagonal Gaussian policy"):
        new_run(FUSED, args=args, actor={"distribution_cfg": {"class_name": "BetaDistribution"}})


def test_recurrent_mini_batches_of_one_environment(train: Callable) -> None:
    """Before any step the surrogate is the mean of normalized advantages, 0; PPO broadcasts [T, 1] with [T]."""
    model = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
    args = {"num_mini_batches": 2, "num_learning_epochs": 1, "learning_rate": 0.0, "schedule": "fixed"}
    options = {"env_args": {"num_envs": 2}, "actor": model, "critic": model, "args": args, "num_steps_per_env": 18}
    assert abs(train(FUSED, 1, **options).losses[0]["surrogate"]) < 1e-5
    assert abs(train("PPO", 1, **options).losses[0]["surrogate"]) > 1e-2


# --- models with rsl_rl's interface and nothing else ------------------------------------------------------------------


class Duck(torch.nn.Module):
    """Neither ``obs_groups`` nor ``obs_normalization`` nor a ``distribution``: rsl_rl asks for none of them."""

    is_recurrent = False

    def __init__(self, obs: TensorDict, obs_groups: dict, obs_set: str, output_dim: int, **_: object) -> None:
        super().__init__()
        self.reads = obs_groups[obs_set]
        self.net = torch.nn.Linear(sum(obs[name].shape[-1] for name in self.reads), output_dim)
        self.std = torch.nn.Parameter(torch.ones(output_dim))

    def forward(self, obs, masks=None, hidden_state=None, stochastic_output=False):
        mean = self.net(torch.cat([obs[name] for name in self.reads], -1))
        self.law = Normal(mean, self.std.expand_as(mean))
        return self.law.sample() if stochastic_output else mean

    def reset(self, dones=None, hidden_state=None):
        pass

    def get_hidden_state(self):
        return None

    def update_normalization(self, obs):
        pass

    @property
    def output_distribution_params(self):
        return self.law.mean, self.law.stddev

    @property
    def output_entropy(self):
        return self.law.entropy().sum(-1)

    @property
    def output_std(self):
        return self.law.stddev

    def get_output_log_prob(self, actions):
        return self.law.log_prob(actions).sum(-1)

    def get_kl_divergence(self, old, new):
        return torch.distributions.kl_divergence(Normal(*old), Normal(*new)).sum(-1)


@pytest.mark.parametrize("final_obs", [False, True])
@pytest.mark.parametrize("models", [("critic",), ("actor",), ("actor", "critic")], ids="+".join)
def test_models_that_are_not_rsl_rls(
    models: tuple[str, ...], final_obs: bool, new_run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, args=PARITY if algorithm == FUSED else {}, **{m: {"class_name": Duck} for m in models})
        if final_obs:
            add_extras(run, lambda obs, _: {"final_obs": obs.clone()})
        runs.append(run.learn(2))
    told = "The loss runs on rsl_rl's own formula: Duck has no distribution of rsl_rl."
    assert (told in caplog.text) == ("actor" in models)
    if not final_obs:
        assert runs[1].distance(runs[0]) < 1e-5
