"""When FusedPPO's steps are our kernels', and when they stay torch's; both learn the same, and keep the same state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.optim import Adam

from pyfast_ppo.backends import cpu
from pyfast_ppo.rsl_rl.optimizer import DeviceRate

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
SPLIT = {"num_learning_epochs": 3, "num_mini_batches": 4}
STEPS = 12
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}


def left_to_torch(run):
    """A hook leaves the steps to torch."""
    run.alg.optimizer.register_step_pre_hook(lambda *_: None)
    return run


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of the kernels, in order: whether they took the step."""
    taken: list[bool] = []
    adam_step = cpu.adam_step
    monkeypatch.setattr(cpu, "adam_step", lambda *args: taken.append(adam_step(*args)) or taken[-1])
    return taken


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_as_torch_steps(optimizer: str, new_run: Callable, steps: list[bool]) -> None:
    """To rounding, over some updates, with clipped gradients and an adaptive rate."""
    args = {**SPLIT, "optimizer": optimizer, "schedule": "adaptive", "max_grad_norm": 0.1}
    ours = new_run(FUSED, args=args).learn(4)
    assert steps.count(True) == 4 * STEPS
    torchs = left_to_torch(new_run(FUSED, args=args)).learn(4)
    assert steps.count(True) == 4 * STEPS
    assert 0.0 < ours.distance(torchs) < 1e-4
    assert ours.losses[-1]["value"] == pytest.approx(torchs.losses[-1]["value"], rel=1e-3)


def test_the_state_is_torchs(new_run: Callable) -> None:
    """Keys, shapes, dtypes and the number of steps: what a checkpoint holds."""
    ours, torchs = (new_run(FUSED, args={**SPLIT, "schedule": "fixed"}) for _ in range(2))
    left_to_torch(torchs)
    saved = [run.learn(2).alg.save()["optimizer_state_dict"] for run in (ours, torchs)]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    assert saved[0]["state"].keys() == saved[1]["state"].keys()
    for a, b in zip(saved[0]["state"].values(), saved[1]["state"].values(), strict=True):
        assert list(a) == list(b)
        assert a["step"] == b["step"] == 2 * 12
        assert all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)


def test_a_frozen_parameter_gets_no_state(new_run: Callable, steps: list[bool]) -> None:
    run = new_run(FUSED, args=SPLIT)
    frozen = next(run.alg.critic.parameters())
    frozen.requires_grad_(False)
    before = frozen.clone()
    run.learn(2)
    assert steps.count(True) == 2 * STEPS
    assert torch.equal(frozen, before)
    assert frozen not in run.alg.optimizer.state
    frozen.requires_grad_(True)
    run.learn(1)
    assert steps.count(True) == 3 * STEPS
    assert float(run.alg.optimizer.state[frozen]["step"]) == STEPS


def test_a_state_that_was_loaded_is_taken(new_run: Callable, steps: list[bool]) -> None:
    """Into the optimizer itself, between two updates: other tensors than before."""
    run, other = new_run(FUSED, args=SPLIT).learn(1), new_run(FUSED, args=SPLIT).learn(2)
    run.alg.optimizer.load_state_dict(other.alg.optimizer.state_dict())
    run.learn(1)
    assert steps.count(True) == 4 * STEPS
    assert {float(state["step"]) for state in run.alg.optimizer.state.values()} == {3.0 * STEPS}


def test_the_predictor_of_rnd(new_run: Callable, steps: list[bool]) -> None:
    run = new_run(FUSED, args={**SPLIT, "rnd_cfg": dict(RND)}).learn(2)
    assert steps.count(True) == 2 * 2 * STEPS
    assert {float(state["step"]) for state in run.alg.rnd.optimizer.state.values()} == {2.0 * STEPS}


class OwnAdam(Adam):
    pass


def own_class(run) -> None:
    run.alg.optimizer.__class__ = OwnAdam


def post_hook(run) -> None:
    run.alg.optimizer.register_step_post_hook(lambda *_: None)


def scheduler(run) -> None:
    run.keeps = torch.optim.lr_scheduler.ConstantLR(run.alg.optimizer, factor=1.0)


def amsgrad(run) -> None:
    run.alg.optimizer.param_groups[0]["amsgrad"] = True


def two_groups(run) -> None:
    parameters = run.alg.optimizer.param_groups[0]["params"]
    run.alg.optimizer.add_param_group({"params": [parameters.pop()], "weight_decay": 0.1})


def other_parameters(run) -> None:
    run.alg.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


def rate_of_another_type(run) -> None:
    run.alg.optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, dtype=torch.bfloat16)


UNUSUAL = [own_class, left_to_torch, post_hook, scheduler, amsgrad, two_groups, other_parameters, rate_of_another_type]


@pytest.mark.parametrize("change", UNUSUAL)
def test_what_is_unusual_is_left_to_torch(change: Callable, new_run: Callable, steps: list[bool]) -> None:
    run = new_run(FUSED, args={**SPLIT, "schedule": "fixed"})
    before = [p.detach().clone() for p in run.alg.actor.parameters()]
    change(run)
    run.learn(1)
    assert steps == []
    assert not all(map(torch.equal, before, run.alg.actor.parameters()))


def test_groups_that_are_alike_are_one(new_run: Callable, steps: list[bool]) -> None:
    run = new_run(FUSED, args={**SPLIT, "schedule": "fixed"})
    parameters = run.alg.optimizer.param_groups[0]["params"]
    run.alg.optimizer.add_param_group({"params": [parameters.pop()]})
    run.learn(1)
    assert steps.count(True) == STEPS


def test_a_rate_that_the_user_changes(new_run: Callable, steps: list[bool]) -> None:
    """In the optimizer, as a callback between two updates does it; 0 takes no step at all."""
    run = new_run(FUSED, args={**SPLIT, "schedule": "fixed"}).learn(1)
    before = [p.detach().clone() for p in run.alg.actor.parameters()]
    run.alg.optimizer.param_groups[0]["lr"] = 0
    run.learn(1)
    assert steps.count(True) == 2 * STEPS
    assert all(map(torch.equal, before, run.alg.actor.parameters()))


def test_a_copy_goes_on_by_itself(new_run: Callable) -> None:
    """After updates with the kernels: with the same numbers, in other memory."""
    run = new_run(FUSED, args=SPLIT).learn(2)
    twin = copy.deepcopy(run.alg)
    before = [p.detach().clone() for p in twin.actor.parameters()]
    run.learn(1)
    assert all(map(torch.equal, before, twin.actor.parameters()))
    assert {float(state["step"]) for state in twin.optimizer.state.values()} == {2.0 * STEPS}
    assert pickle.loads(pickle.dumps(twin._rate)).value is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype, steps: list[bool]) -> None:
    """However a tensor is looked into: as a subclass it is read through its methods."""
    for kind in (torch.nn.Parameter, Tagged):
        module = torch.nn.ParameterList([kind(torch.ones(3, dtype=dtype))])
        module[0].grad = torch.full((3,), 0.5, dtype=dtype)
        rate = DeviceRate(Adam(module.parameters(), lr=0.5))
        rate.step((module,), 1.0, skip=None, skip_nonfinite=True)
        rate.step((module,), 1.0, skip=None, skip_nonfinite=True)
        assert not any(steps)
        assert torch.allclose(module[0], torch.zeros(3, dtype=dtype), atol=1e-2)


class Tagged(torch.nn.Parameter):
    pass
