"""What FusedPPO does with the KL beyond rsl_rl: other rules for the learning rate, early stop, the adaptive penalty."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pyfast_ppo.rsl_rl import FusedPPO
from pyfast_ppo.rsl_rl.optimizer import DeviceRate
from pyfast_ppo.schedules import AdaptivePenalty, EarlyStop, ProportionalSchedule, RslRlScheduleBefore5

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
SPLIT = {"num_learning_epochs": 3, "num_mini_batches": 4}
STEPS = 12


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def rule_kls_of(run) -> list[torch.Tensor]:
    """Filled while it learns: what the rule of the learning rate is fed with at each mini-batch."""
    kls: list[torch.Tensor] = []
    before_step = run.alg._kl_control.before_step
    run.alg._kl_control.before_step = lambda update: (kls.append(update.last_rule_kl()), before_step(update))
    return kls


def test_diagnostics_of_an_update(new_run: Callable) -> None:
    """Of the KLs and rates that the update went through, seen from outside."""
    run = new_run(FUSED, args={**SPLIT, "schedule": "adaptive", "desired_kl": 0.01, "learning_rate": 3e-3})
    kls = rule_kls_of(run)
    run.learn(1)
    kls, losses = [float(kl) for kl in kls], run.losses[0]
    assert len(kls) == STEPS
    assert losses["first_kl"] == kls[0] < 1e-10
    assert losses["max_kl"] == max(kls)
    assert losses["last_kl"] == kls[-1]
    assert losses["kl"] == pytest.approx(sum(kls) / STEPS, rel=1e-6)
    rates = [float(rate) for rate in run.rates]
    assert (losses["learning_rate_min"], losses["learning_rate_max"]) == (min(rates), max(rates))
    assert min(rates) < max(rates)
    assert run.alg.learning_rate == rates[-1]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_the_rule_before_5_raises_the_rate_at_the_first_mini_batch(new_run: Callable) -> None:
    """Its KL is 1e-5 per action at equality, and above 0: that is a raise at every update."""
    args = {**SPLIT, "schedule": "adaptive", "desired_kl": 0.01, "learning_rate": 1e-3}
    now, before = (new_run(FUSED, args={**args, "kl_rule": rule}).learn(1) for rule in ("rsl_rl", "rsl_rl_4"))
    assert float(now.rates[0]) == 1e-3
    assert float(before.rates[0]) == pytest.approx(1.5e-3)


def test_the_kl_before_5() -> None:
    """The formula of rsl_rl 4: too large by log(1 + 1e-5) per action at equality."""
    mean, std = torch.randn(50, 12, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.5
    at_equality = RslRlScheduleBefore5.kl(mean, std, mean, std)
    assert at_equality.shape == (50,)
    torch.testing.assert_close(at_equality, torch.full((50,), 12 * math.log1p(1e-5), dtype=torch.float64))
    new_mean, new_std = mean + 0.1, std * 1.3
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(new_mean, new_std)
    ).sum(-1)
    error = RslRlScheduleBefore5.kl(mean, std, new_mean, new_std) - exact
    torch.testing.assert_close(error, torch.full((50,), 12 * math.log1p(1e-5 / 1.3), dtype=torch.float64))


def test_the_rule_before_5_is_that_of_rsl_rl_bit_for_bit() -> None:
    rule, rate, expected = RslRlScheduleBefore5(0.01), number(1e-3), 1e-3
    generator = torch.Generator().manual_seed(0)
    kls = (0.01 * torch.randn(3000, generator=generator, dtype=torch.float64).exp()).tolist()
    for kl in [*kls, 0.0, -1e-6, math.nan, math.inf, 0.02, 0.005]:
        if kl > 0.01 * 2.0:
            expected = max(1e-5, expected / 1.5)
        elif kl < 0.01 / 2.0 and kl > 0.0:
            expected = min(1e-2, expected * 1.5)
        rate = rule.update(number(kl), rate)
        assert rate.item() == expected


def test_the_proportional_rule_acts_once_per_update(new_run: Callable) -> None:
    """On the mean KL of the last epoch; within an update the rate stays."""
    args = {**SPLIT, "schedule": "adaptive", "desired_kl": 0.01, "learning_rate": 1e-3, "kl_rule": "proportional"}
    run = new_run(FUSED, args=args)
    kls = rule_kls_of(run)
    run.learn(2)
    first, second = run.rates[:STEPS], run.rates[STEPS:]
    assert {float(rate) for rate in first} == {1e-3}
    expected = ProportionalSchedule(0.01).update(torch.stack(kls[STEPS - 4 : STEPS]).mean(), number(1e-3))
    assert {float(rate) for rate in second} == {expected.item()}
    assert expected.item() != 1e-3


# --- early stop -------------------------------------------------------------------------------------------------------


def test_early_stop_rule() -> None:
    rule = EarlyStop(0.02)
    stopped = None
    for kl, expected in ((0.0, False), (0.02, False), (0.021, True), (0.0, True), (math.nan, True)):
        stopped = rule.update(number(kl), stopped)
        assert stopped.item() == expected
    assert rule.update(number(math.nan), None).item()
    with pytest.raises(ValueError, match=r"^limit must be positive, got 0"):
        EarlyStop(0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_early_stop_leaves_parameters_and_moments_as_they_are(new_run: Callable, optimizer: str) -> None:
    """From the mini-batch on whose KL is beyond the limit; the next update goes on."""
    rate = {"sgd": 0.3}.get(optimizer, 1e-2)
    args = {**SPLIT, "schedule": "fixed", "learning_rate": rate, "optimizer": optimizer, "early_stop_kl": 1e-3}
    run = new_run(FUSED, args=args)
    seen = []

    def remember(optimizer, *_) -> None:
        parameters = [p.detach().clone() for p in run.alg.actor.parameters()]
        steps = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
        seen.append((parameters, steps))

    run.alg.optimizer.register_step_post_hook(remember)
    run.learn(2)
    assert len(seen) == 2 * STEPS
    for first, losses in ((0, run.losses[0]), (STEPS, run.losses[1])):
        taken = STEPS - round(losses["skipped_steps"])
        assert 0 < taken < STEPS
        last = seen[first + taken - 1]
        for parameters, steps in seen[first + taken : first + STEPS]:
            assert all(map(torch.equal, parameters, last[0]))
            assert steps == last[1]
        for i in range(first + 1, first + taken):
            assert not all(map(torch.equal, seen[i][0], seen[i - 1][0]))
    without = new_run(FUSED, args={**args, "early_stop_kl": None}).learn(1)
    assert without.losses[0]["last_kl"] > run.losses[0]["last_kl"]


def test_early_stop_needs_an_optimizer_that_can_skip(new_run: Callable) -> None:
    with pytest.raises(ValueError, match=r"early_stop_kl needs an optimizer that can skip a step.*not RMSprop"):
        new_run(FUSED, args={"optimizer": "rmsprop", "early_stop_kl": 0.01})


# --- adaptive penalty -------------------------------------------------------------------------------------------------


def test_the_penalty_follows_the_kl(new_run: Callable) -> None:
    """Doubled or halved after each update by the mean KL of its last epoch, and in loss_dict."""
    args = {**SPLIT, "schedule": "fixed", "learning_rate": 3e-3, "kl_coef": 0.5, "kl_target": 1e-4}
    run = new_run(FUSED, args=args)
    kls = rule_kls_of(run)
    run.learn(3)
    coef, rule = torch.tensor(0.5), AdaptivePenalty(1e-4)
    for i, losses in enumerate(run.losses):
        coef = rule.update(torch.stack(kls[i * STEPS + 8 : (i + 1) * STEPS]).mean(), coef)
        assert losses["kl_coef"] == float(coef)
    assert run.alg.kl_coef == float(coef) > 0.5


def test_the_penalty_acts_on_the_policy(new_run: Callable) -> None:
    """A target far below what the update does by itself: after some updates the KL comes down."""
    args = {**SPLIT, "schedule": "fixed", "learning_rate": 3e-3}
    free = new_run(FUSED, args=args).learn(12)
    held = new_run(FUSED, args={**args, "kl_coef": 1.0, "kl_target": 3e-4}).learn(12)
    assert held.losses[-1]["kl"] < 0.5 * free.losses[-1]["kl"]


def test_the_penalty_is_in_the_checkpoint(new_run: Callable, tmp_path) -> None:
    args = {**SPLIT, "kl_coef": 0.5, "kl_target": 1e-4}
    run = new_run(FUSED, args=args).learn(3)
    run.runner.save(str(tmp_path / "run.pt"))
    other = new_run(FUSED, args=args)
    other.runner.load(str(tmp_path / "run.pt"))
    assert other.alg.kl_coef == run.alg.kl_coef != 0.5
    stock = new_run("PPO")
    stock.runner.load(str(tmp_path / "run.pt"))
    assert stock.distance(run) == 0.0


# --- the rate on the device -------------------------------------------------------------------------------------------


def test_numbers_again_after_an_update_that_failed(new_run: Callable) -> None:
    """Ctrl-C in the middle: what is saved then has a number as its learning rate."""
    run = new_run(FUSED, args={**SPLIT, "schedule": "adaptive"}).rollout()
    apply, calls = run.alg._apply, []

    def interrupted(*args) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        apply(*args)

    run.alg._apply = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.alg.update()
    assert type(run.alg.learning_rate) is float
    assert [type(group["lr"]) for group in run.alg.save()["optimizer_state_dict"]["param_groups"]] == [float]


def test_which_optimizers_take_a_tensor() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert DeviceRate(torch.optim.Adam([parameter])).on_device
    assert not DeviceRate(torch.optim.RMSprop([parameter])).on_device  # its capturable step is for GPUs

    assert DeviceRate(torch.optim.SGD([parameter], lr=0.1)).on_device
    assert not DeviceRate(torch.optim.SGD([parameter], lr=0.1, momentum=0.9)).on_device

    class Own(torch.optim.Adam):
        pass

    assert not DeviceRate(Own([parameter])).on_device
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = torch.optim.Adam([parameter, parameter])
    assert not DeviceRate(twice).on_device


def test_wrong_arguments(new_run: Callable) -> None:
    adaptive = {"schedule": "adaptive"}
    for args, message in (
        ({"kl_rule": "adaptive"}, r"kl_rule must be one of \('rsl_rl', 'rsl_rl_4', 'proportional'\), got 'adaptive'"),
        ({"kl_target": 0.01}, "kl_target adapts kl_coef, which must then be positive, got 0.0"),
        ({"kl_target": 0.0, "kl_coef": 1.0}, "kl_target must be positive, got 0.0"),
        ({"kl_target": -1.0, "kl_coef": 1.0}, "kl_target must be positive, got -1.0"),
        ({"early_stop_kl": 0}, "early_stop_kl must be positive, got 0"),
        ({"early_stop_kl": -1.0}, "early_stop_kl must be positive, got -1.0"),
        ({"kl_coef": -0.1}, "kl_coef must be 0 or more, got -0.1"),
        ({"kl_coef": math.nan}, "kl_coef must be 0 or more, got nan"),
        ({**adaptive, "desired_kl": -0.01}, "desired_kl must be 0 or more, got -0.01"),
        ({**adaptive, "desired_kl": 0.0, "kl_rule": "proportional"}, "desired_kl must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            new_run(FUSED, args=args)
    for name in ("kl_coef", "kl_target", "early_stop_kl", "desired_kl"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got '1e-2'"):
            new_run(FUSED, args={**adaptive, "kl_coef": 1.0, name: "1e-2"})
    new_run(FUSED, args={"schedule": "fixed", "desired_kl": None})


def test_a_setting_that_is_changed_is_looked_at(new_run: Callable) -> None:
    run = new_run(FUSED, args={"schedule": "adaptive"})
    run.alg.desired_kl = "1e-2"
    with pytest.raises(TypeError, match="desired_kl must be a number, got '1e-2'"):
        run.learn(1)


def test_arguments_are_those_of_the_docstring() -> None:
    for name in ("kl_target", "kl_rule", "early_stop_kl"):
        assert f"{name}:" in FusedPPO.__init__.__doc__
