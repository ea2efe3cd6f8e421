"""Acting, returns and the update as CUDA graphs: when they are recorded, and that a replay computes the same.

Graphs are those of graph_on_cpu.py; where there is a GPU, test_on_a_gpu runs real ones.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rsl_rl.modules.distribution import GaussianDistribution
from rsl_rl.storage import RolloutStorage
from torch import Tensor

from pyfast_ppo import precision
from pyfast_ppo.rsl_rl import FusedPPO, captured, mini_batches
from pyfast_ppo.rsl_rl.policy import NORMALIZES_IN_UPDATE

sys.path.append(str(Path(__file__).parent))

from graph_on_cpu import GraphOnCpu, use_graphs_on_cpu

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}
HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
ITERATIONS = 6

CASES = {
    "adaptive": {"args": {"schedule": "adaptive"}},
    "fixed": {"args": {"schedule": "fixed"}},
    "proportional": {"args": {"schedule": "adaptive", "kl_rule": "proportional"}},
    "early_stop": {"args": {"schedule": "adaptive", "early_stop_kl": 1e-3}},
    "penalty": {"args": {"schedule": "adaptive", "kl_coef": 0.5, "kl_target": 1e-3}},
    "sgd": {"args": {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "adaptive"}},
    "reshuffle": {"args": {"schedule": "adaptive", "reshuffle": True}},
    "per_mini_batch": {"args": {"schedule": "fixed", "normalize_advantage_per_mini_batch": True}},
    "heteroscedastic": {"args": {"schedule": "adaptive"}, "actor": HETEROSCEDASTIC},
    "normalized": {"args": {"schedule": "adaptive"}, "actor": {"obs_normalization": True}},
    "rnd": {"args": {"schedule": "adaptive", "rnd_cfg": dict(RND)}},
    "symmetry": {"args": {"schedule": "adaptive", "symmetry_cfg": {"use_data_augmentation": True}}},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphOnCpu]:
    """The graphs that are made, on the CPU."""
    return use_graphs_on_cpu(monkeypatch)


def with_graph(case: dict, **args: object) -> dict:
    return {**case, "args": {**case["args"], "backend": "eager", "cuda_graph": True, **args}}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_replay_gives_the_bits_of_the_update(case: dict, new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """Over iterations with new data each: parameters, rates, losses."""
    plain = new_run(FUSED, **{**case, "args": {**case["args"], "backend": "eager"}}).learn(ITERATIONS)
    run = new_run(FUSED, **with_graph(case)).learn(ITERATIONS)
    if case is CASES["normalized"] and not NORMALIZES_IN_UPDATE:
        assert "moves its normalizers" in run.alg._captured.reason
        assert run.alg._captured_rollout is None
        return
    assert run.alg._captured.reason is run.alg._captured_rollout.reason is None
    num_steps = run.alg.storage.num_transitions_per_env
    assert run.alg._captured.num_records == 1
    assert run.alg._captured_rollout.num_records == num_steps + 1
    assert len(graphs) == num_steps + 2
    # the first update makes Adam's moments, the first rollout the storage of means and stds; normalizers move once
    assert min(graph.num_replays for graph in graphs) >= ITERATIONS - 3
    assert run.distance(plain) == 0.0
    assert run.losses == plain.losses
    assert run.alg.learning_rate == plain.alg.learning_rate


def test_mini_batches_that_are_gathered_one_by_one(
    new_run: Callable, graphs: list[GraphOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large observations need: memory that is given back, and taken again, within the graph."""
    plain = new_run(FUSED, **with_graph(CASES["reshuffle"], cuda_graph=False)).learn(ITERATIONS)
    monkeypatch.setattr(mini_batches, "AT_ONCE_BYTES", 0)
    run = new_run(FUSED, **with_graph(CASES["reshuffle"])).learn(ITERATIONS)
    assert run.alg._captured.num_records == 1
    assert run.distance(plain) == 0.0


def test_a_storage_that_draws_its_mini_batches_is_not_captured(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    class Own(RolloutStorage):
        def mini_batch_generator(self, *args: int) -> Iterator[RolloutStorage.Batch]:
            return super().mini_batch_generator(*args)

    run = new_run(FUSED, **with_graph(CASES["fixed"]))
    run.alg.storage.__class__ = Own
    run.learn(3)
    assert run.alg._captured.reason == "Own draws its mini-batches itself"
    assert run.alg._captured_rollout.reason is None


def hand_out_final_obs(run: object) -> None:
    """The environment publishes what came before its resets; any numbers do, if they change."""
    step = run.env.step

    def with_final_obs(actions: Tensor) -> tuple:
        obs, rewards, dones, extras = step(actions)
        final_obs = obs.apply(lambda group: group + rewards.unsqueeze(-1))
        return obs, rewards, dones, {**extras, "final_obs": final_obs}

    run.env.step = with_final_obs


@pytest.mark.parametrize("actor", [{}, HETEROSCEDASTIC], ids=["mlp", "heteroscedastic"])
@pytest.mark.parametrize("final_obs", [False, True])
def test_a_replayed_rollout_stores_the_same_bits(
    final_obs: bool, actor: dict, new_run: Callable, graphs: list[GraphOnCpu]
) -> None:
    runs = []
    for config in (with_graph(CASES["adaptive"]), with_graph(CASES["adaptive"], cuda_graph=False)):
        run = new_run(FUSED, actor=actor, **config)
        run.alg._final_values.only_time_outs = False  # as on a GPU
        if final_obs:
            hand_out_final_obs(run)
        runs.append(run.learn(4).rollout())
    captured_run, plain = (run.alg.storage for run in runs)
    assert runs[0].env.num_time_outs > 0
    assert min(graph.num_replays for graph in graphs) >= 2
    for name in ("actions", "actions_log_prob", "values", "rewards", "dones", "returns", "advantages"):
        assert torch.equal(getattr(captured_run, name), getattr(plain, name)), name
    assert (captured_run.observations == plain.observations).all()
    for ours, theirs in zip(captured_run.distribution_params, plain.distribution_params, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ahead", [0, 1], ids=["actor_ahead", "critic_ahead"])
@pytest.mark.parametrize("name", ["adaptive", "heteroscedastic", "rnd", "symmetry"])
def test_the_critic_beside_the_actor(
    name: str, ahead: int, new_run: Callable, graphs: list[GraphOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads what was there before the other began, and what follows waits for both."""
    plain = new_run(FUSED, **with_graph(CASES[name], cuda_graph=False)).learn(ITERATIONS)
    monkeypatch.setattr(FusedPPO, "_two_streams", True)
    monkeypatch.setattr(GraphOnCpu, "ahead", ahead)
    run = new_run(FUSED, **with_graph(CASES[name])).learn(ITERATIONS)
    num_steps = run.alg.storage.num_transitions_per_env
    # each step, the returns, which need the critic alone, and the update
    assert [len(graph.streams) for graph in graphs] == [*[2] * num_steps, 1, 2]
    assert all(any(isinstance(item, tuple) for item in stream) for graph in graphs for stream in graph.streams)
    assert run.distance(plain) == 0.0
    assert run.losses == plain.losses


@pytest.mark.parametrize("ahead", [0, 1], ids=["actor_ahead", "critic_ahead"])
def test_the_emulation_of_streams_runs_ahead(
    ahead: int, new_run: Callable, graphs: list[GraphOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: streams that do not wait for each other read what is not there yet."""
    plain = new_run(FUSED, **with_graph(CASES["adaptive"], cuda_graph=False)).learn(ITERATIONS)
    monkeypatch.setattr(FusedPPO, "_two_streams", True)
    monkeypatch.setattr(GraphOnCpu, "ahead", ahead)
    run = new_run(FUSED, **with_graph(CASES["adaptive"])).learn(3)
    for stream in graphs[-1].streams:
        stream[:] = [item if isinstance(item, tuple) else 0 for item in stream]
    run.learn(ITERATIONS - 3)
    assert run.distance(plain) > 0.0


def test_shared_parameters_stay_on_one_stream(
    new_run: Callable, graphs: list[GraphOnCpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedPPO, "_two_streams", True)
    run = new_run(FUSED, **with_graph(CASES["fixed"]))
    run.alg.critic.mlp[0].bias = run.alg.actor.mlp[0].bias
    run.learn(4)
    assert [len(graph.streams) for graph in graphs] == [1] * len(graphs)


def of_the_state(std: float) -> Callable[[Tensor], None]:
    def update(distribution: object, mean: Tensor) -> None:
        distribution._distribution = torch.distributions.Normal(mean, std * (1.0 + mean.square()))

    return update


def test_functions_that_are_replaced_on_one_policy(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """A graph would go on with the old ones."""
    runs = []
    for captures in (False, True):
        args = {"schedule": "adaptive", "backend": "eager", "cuda_graph": captures}
        run = new_run(FUSED, args=args).learn(4)
        distribution = run.alg.actor.distribution
        distribution.update = partial(of_the_state(0.5), distribution)
        runs.append(run.learn(4))
    assert runs[1].alg._captured.reason is runs[1].alg._captured_rollout.reason is None
    assert runs[1].alg._captured.num_records == 2
    assert runs[1].distance(runs[0]) == 0.0


@pytest.mark.parametrize("name", ["backend", "global_advantage_statistics"])
def test_the_rollout_is_recorded_anew_with_other_arguments(
    name: str, new_run: Callable, graphs: list[GraphOnCpu]
) -> None:
    alg = new_run(FUSED, **with_graph(CASES["fixed"])).learn(1).rollout().alg
    before = alg._key_of_rollout()
    setattr(alg, name, "cpu" if name == "backend" else True)
    assert alg._key_of_rollout() != before


@pytest.mark.parametrize(
    "change",
    [
        lambda alg: setattr(alg, "gamma", 0.5),
        lambda alg: setattr(alg.storage, "rewards", 1.0 + alg.storage.rewards),
        lambda alg: setattr(alg.storage, "returns", torch.zeros_like(alg.storage.returns)),
    ],
    ids=["gamma", "rewards", "returns"],
)
def test_what_is_changed_before_the_returns_shows_in_them(
    change: Callable, new_run: Callable, graphs: list[GraphOnCpu]
) -> None:
    """In the last step of a rollout, as a user's class may who steers by it."""
    runs = []
    for cuda_graph in (True, False):
        run = new_run(FUSED, **with_graph(CASES["fixed"], cuda_graph=cuda_graph)).learn(4)
        steps = itertools.count(1)

        def step(actions: Tensor, run: object = run, steps: Iterator = steps, usual: Callable = run.env.step) -> tuple:
            if next(steps) == run.alg.storage.num_transitions_per_env:
                change(run.alg)
            return usual(actions)

        run.env.step = step
        runs.append(run.rollout().alg)
    assert min(graph.num_replays for graph in graphs) >= 1
    for name in ("returns", "advantages"):
        assert torch.equal(*(getattr(alg.storage, name) for alg in runs)), name


def test_a_storage_that_stores_in_its_own_way_from_now_on(new_run: Callable) -> None:
    run = new_run(FUSED).learn(1)
    storage, stored = run.alg.storage, []
    add = storage.add_transition
    storage.add_transition = lambda transition: (stored.append(len(transition.distribution_params)), add(transition))
    run.learn(1)
    assert set(stored) == {2}
    assert run.losses[-1]["first_kl"] < 1e-9


def test_another_storage(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """Graphs of the old one, which write there, are not replayed."""
    runs = []
    for captures in (False, True):
        run = new_run(FUSED, **with_graph(CASES["adaptive"], cuda_graph=captures)).learn(3)
        before = run.alg.storage
        obs = before.observations[0]
        num_envs = run.env.num_envs
        run.alg.storage = RolloutStorage("rl", num_envs, before.num_transitions_per_env, obs, [run.env.num_actions])
        runs.append(run.learn(4))
    assert runs[0].distance(runs[1]) == 0.0
    assert runs[0].losses == runs[1].losses
    assert runs[1].alg._captured.num_records == 2


def test_an_environment_may_write_into_the_actions(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """And keep them: they are nobody else's memory."""
    run = new_run(FUSED, **with_graph(CASES["adaptive"])).learn(3)
    assert graphs
    step, kept = run.env.step, []

    def step_in_place(actions: Tensor) -> tuple:
        kept.append((actions, actions.clone()))
        result = step(actions)
        actions.fill_(7.0)
        return result

    run.env.step = step_in_place
    run.rollout()
    for t, (actions, before) in enumerate(kept):
        assert torch.equal(run.alg.storage.actions[t], before)
        assert (actions == 7.0).all()


def test_the_emulation_freezes_numbers_on_the_host(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """The tests above can fail: a coefficient that is changed behind the key's back has no effect."""
    run = new_run(FUSED, **with_graph(CASES["fixed"])).learn(3)
    key = run.alg._key_of_update()
    run.alg._key_of_update = lambda: key
    other = new_run(FUSED, **with_graph(CASES["fixed"])).learn(3)
    for each in (run, other):
        each.alg.entropy_coef = 5.0
        each.learn(1)
    assert run.distance(other) > 1e-4


def halved(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return 0.5 * torch.nn.functional.linear(x, layer.weight, layer.bias)


class OwnUpdate(GaussianDistribution):
    def update(self, mlp_output: Tensor) -> None:
        super().update(0.5 * mlp_output)


@pytest.mark.parametrize(
    "change",
    [
        lambda alg: setattr(alg, "clip_param", 0.3),
        lambda alg: setattr(alg, "entropy_coef", 0.1),
        lambda alg: setattr(alg, "max_grad_norm", 0.1),
        lambda alg: setattr(alg, "train_mode", alg.eval_mode),
        lambda alg: alg.actor.mlp[0].bias.requires_grad_(False),
        lambda alg: alg.actor.mlp[0].weight.set_(alg.actor.mlp[0].weight.detach().clone()),
        lambda alg: alg.load(copy.deepcopy(alg.save()), None, True),
        lambda alg: [group.update(lr=1e-4) for group in alg.optimizer.param_groups],
        lambda alg: [group.update(betas=(0.5, 0.9)) for group in alg.optimizer.param_groups],
        lambda alg: setattr(alg, "nonfinite", "ignore"),
        lambda alg: alg.actor.distribution.std_range.__setitem__(1, 0.9),
        lambda alg: alg.actor.mlp[2].register_forward_hook(lambda module, args, output: 0.5 * output),
        lambda alg: alg.critic.mlp[0].weight.register_hook(lambda grad: 0.5 * grad),
        lambda alg: alg.actor.mlp.__setitem__(1, torch.nn.Sigmoid()),
        lambda alg: setattr(alg.critic.mlp[0], "forward", partial(halved, alg.critic.mlp[0])),
        lambda alg: setattr(alg.actor.distribution, "__class__", OwnUpdate),
        lambda alg: setattr(alg.actor.distribution, "std_range", [1e-6, np.float32(0.9)]),
        lambda alg: alg.optimizer.register_step_pre_hook(lambda *_: None),
    ],
    ids=[
        *("clip_param", "entropy_coef", "max_grad_norm", "mode", "requires_grad", "address", "load", "rate", "betas"),
        *("nonfinite", "std_range", "hook", "hook_of_a_parameter", "type", "forward", "class", "numpy"),
        "hook_of_the_optimizer",
    ],
)
def test_it_is_recorded_anew_when_something_frozen_changes(
    change: Callable, new_run: Callable, graphs: list[GraphOnCpu]
) -> None:
    """And the result is that of a run without a graph with the same change."""
    runs = [
        new_run(FUSED, **config)
        for config in (with_graph(CASES["fixed"]), with_graph(CASES["fixed"], cuda_graph=False))
    ]
    for run in runs:
        torch.manual_seed(0)
        for _ in range(3):
            run.rollout()
            run.alg.update()
        with torch.no_grad():
            change(run.alg)
        for _ in range(3):
            run.rollout()
            run.alg.update()
    assert runs[0].alg._captured.num_records == 2
    assert runs[0].distance(runs[1]) == 0.0


def test_a_number_that_changes_in_each_update_is_never_recorded(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """An entropy bonus that is annealed: no graph is better than a new one each time."""
    run = new_run(FUSED, **with_graph(CASES["fixed"]))
    for i in range(4):
        run.alg.entropy_coef = 0.01 / (i + 1)
        run.rollout()
        run.alg.update()
    assert run.alg._captured.num_records == 0
    assert run.alg._captured.reason is None


@pytest.mark.parametrize("name", ["use_data_augmentation", "use_mirror_loss", "data_augmentation_func"])
def test_what_is_changed_of_the_symmetry(name: str, new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    runs = []
    symmetry = {"use_data_augmentation": True, "use_mirror_loss": False, "mirror_loss_coeff": 0.5}
    for captures in (False, True):
        run = new_run(
            FUSED, **with_graph({"args": {"schedule": "fixed", "symmetry_cfg": symmetry}}, cuda_graph=captures)
        )
        run.learn(3)
        present = getattr(run.alg.symmetry, name)
        changed = partial(present) if callable(present) else not present
        setattr(run.alg.symmetry, name, changed)
        runs.append(run.learn(3))
    assert runs[1].alg._captured.num_records == 2
    assert runs[0].distance(runs[1]) == 0.0


class Counts(torch.nn.Identity):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


def test_hooks_that_replace_each_other(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """Of which the next may lie where the last has lain."""
    run = new_run(FUSED, **with_graph(CASES["fixed"])).learn(2)
    weight = run.alg.critic.mlp[0].weight
    for i in range(10):
        handle = weight.register_hook(lambda grad, i=i: grad * float(i))
        run.learn(2)
        handle.remove()
        del handle
    assert run.alg._captured.num_records == 10


class KeepsItsInput(torch.nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


def test_a_module_that_keeps_what_it_saw_last(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    run = new_run(FUSED, **with_graph(CASES["fixed"]))
    run.alg.actor.obs_normalizer = KeepsItsInput()
    run.alg.actor.feature_hooks = [run.alg.actor.register_forward_hook(lambda *_: None)]
    run.learn(4)
    assert run.alg._captured.num_records == 1


def test_a_number_that_always_changes_is_named(
    new_run: Callable, graphs: list[GraphOnCpu], caplog: pytest.LogCaptureFixture
) -> None:
    run = new_run(FUSED, **with_graph(CASES["fixed"]))
    run.alg.actor.obs_normalizer = Counts()
    with caplog.at_level(logging.WARNING):
        run.learn(captured._MANY_CHANGES + 3)
    told = [r.getMessage() for r in caplog.records if "changes each time" in r.getMessage()]
    assert len(told) == 2
    assert all("from ('calls', " in message for message in told)
    assert run.alg._captured.num_records == 0


class Waiting(torch.nn.Module):
    """Looks at a number on the host in its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if x.sum().item() > 1e9 else x


class NothingNoticed(contextlib.AbstractContextManager):
    where = None

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("noticed", [True, False])
def test_what_waits_runs_as_it_is(
    noticed: bool,
    new_run: Callable,
    graphs: list[GraphOnCpu],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not even tried if that was noticed before; if it is tried in vain, training goes on as well."""
    if not noticed:
        monkeypatch.setattr(captured, "Waits", NothingNoticed)
    runs = []
    for cuda_graph in (True, False):
        run = new_run(FUSED, **with_graph(CASES["adaptive"], cuda_graph=cuda_graph))
        run.alg.actor.mlp.append(Waiting())
        with caplog.at_level(logging.WARNING):
            runs.append(run.learn(4))
    # acting and the update; the returns are a part of the rollout
    assert [graph.num_replays for graph in graphs] == ([] if noticed else [0, 0])
    why = "it waits for the device, first at " if noticed else "it cannot be recorded (operation not permitted"
    assert runs[0].alg._captured.reason.startswith(why)
    assert [r.getMessage() for r in caplog.records if "without a CUDA graph" in r.getMessage()] == [
        f"The rollout runs without a CUDA graph: {runs[0].alg._captured_rollout.reason}.",
        f"The update runs without a CUDA graph: {runs[0].alg._captured.reason}.",
    ]
    assert runs[0].distance(runs[1]) == 0.0
    assert runs[0].losses == runs[1].losses


class WaitingOnce(Waiting):
    """As a table that is made at the first call."""

    waited = False

    def forward(self, x: Tensor) -> Tensor:
        if self.waited:
            return x
        self.waited = True
        return super().forward(x)


def test_what_waits_once_is_recorded(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    run = new_run(FUSED, **with_graph(CASES["fixed"]))
    run.alg.critic.mlp.append(WaitingOnce())
    run.learn(5)
    assert run.alg._captured.reason is run.alg._captured_rollout.reason is None
    assert run.alg._captured.num_records == 1


def test_a_copy_records_its_own_graphs(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    run = new_run(FUSED, **with_graph(CASES["fixed"])).learn(3)
    assert run.alg._captured._graphs
    twin = copy.deepcopy(run.alg)
    assert not twin._captured._graphs
    assert run.alg._captured._graphs
    assert twin._captured.num_records == 1


def test_the_precision_of_matrix_products_in_either_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's older interface raises where the newer one was used."""
    before = precision.matmul_precision()

    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert precision.matmul_precision() == (None, *before[1:])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"critic": LSTM}, "recurrent models"),
        ({"args": {"keep_random_stream": True}}, "keep_random_stream draws random numbers"),
        ({"args": {"optimizer": "rmsprop"}}, "RMSprop reads its learning rate on the host"),
    ],
    ids=["recurrent", "random_stream", "rmsprop"],
)
def test_what_is_known_beforehand(config: dict, reason: str, new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    config = {"args": {}, **config}
    run = new_run(FUSED, **with_graph(config)).learn(2)
    assert reason in run.alg._captured.reason
    assert run.alg._captured.num_records == 0


def test_rsl_rls_own_update_is_not_recorded(
    new_run: Callable, graphs: list[GraphOnCpu], caplog: pytest.LogCaptureFixture
) -> None:
    beta = {"distribution_cfg": {"class_name": "BetaDistribution"}}
    with caplog.at_level(logging.WARNING):
        new_run(FUSED, actor=beta, **with_graph(CASES["fixed"])).learn(3)
    assert graphs == []
    assert "The update runs without a CUDA graph: rsl_rl's own waits for the device." in caplog.text


def test_on_the_cpu_it_says_so(new_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = new_run(FUSED, args={"cuda_graph": True})
    assert run.alg._captured.reason == "the device is cpu"
    assert "The update runs without a CUDA graph: the device is cpu." in caplog.text
    run.learn(1)


def test_a_lost_step_within_a_graph(new_run: Callable, graphs: list[GraphOnCpu]) -> None:
    """Data that are not finite reach a replay: its steps are not taken, and the next update goes on."""
    case = CASES["per_mini_batch"]
    runs = [new_run(FUSED, **with_graph(case, cuda_graph=choice)) for choice in (True, False)]
    for run in runs:
        torch.manual_seed(0)
        for i in range(4):
            run.rollout()
            if i == 2:
                run.alg.storage.returns[2, 5] = torch.nan
            run.alg.update()
    assert [losses["nonfinite_steps"] for losses in runs[0].losses] == [0.0, 0.0, 2.0, 0.0]
    assert runs[0].distance(runs[1]) == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("two_streams", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case: dict, two_streams: bool, new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real graphs, the fastest backend: the bits of the update without one."""
    monkeypatch.setattr(FusedPPO, "_two_streams", two_streams)
    runs = []
    for cuda_graph in (True, False):
        config = {**case, "args": {**case["args"], "cuda_graph": cuda_graph}}
        runs.append(new_run(FUSED, device="cuda", **config).learn(ITERATIONS))
    assert runs[0].alg._captured.reason is runs[0].alg._captured_rollout.reason is None
    assert runs[0].alg._captured.num_records == 1
    assert runs[0].alg._captured_rollout.num_records == runs[0].alg.storage.num_transitions_per_env + 1
    assert runs[0].distance(runs[1]) == 0.0
    assert runs[0].losses == runs[1].losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("noticed", [True, False])
def test_what_waits_on_a_gpu(noticed: bool, new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that fails leaves stream, allocator and random numbers as they were."""
    if not noticed:
        monkeypatch.setattr(captured, "Waits", NothingNoticed)
    stream = torch.cuda.current_stream()
    runs = []
    for cuda_graph in (True, False):
        run = new_run(FUSED, device="cuda", args={"schedule": "adaptive", "cuda_graph": cuda_graph})
        run.alg.actor.mlp.append(Waiting())
        runs.append(run.learn(4))
    assert torch.cuda.current_stream() == stream
    assert ("it waits for the device" if noticed else "it cannot be recorded") in runs[0].alg._captured.reason
    assert runs[0].distance(runs[1]) == 0.0
    other = new_run(FUSED, device="cuda", args={"schedule": "adaptive", "cuda_graph": True}).learn(4)
    assert other.alg._captured.num_records == 1


GPU_CASES: dict[str, dict] = {
    "mixed_precision": {"args": {"schedule": "adaptive", "use_mixed_precision": True}},
    "final_obs": {"args": {"schedule": "adaptive"}},
    "compiled": {"args": {"schedule": "adaptive"}},
    "annealed": {"args": {"schedule": "fixed"}},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", GPU_CASES)
def test_more_on_a_gpu(name: str, new_run: Callable) -> None:
    """The bits of the update without a graph, in what users combine with it."""
    runs = []
    for cuda_graph in (True, False):
        args = {**GPU_CASES[name]["args"], "cuda_graph": cuda_graph}
        run = new_run(FUSED, device="cuda", args=args)
        if name == "final_obs":
            hand_out_final_obs(run)
        if name == "compiled":
            run.alg.compile("default")
        for i in range(8):
            if name == "annealed":  # the rollout replays long before the update is recorded
                run.alg.entropy_coef = 0.01 / (1 + min(i, 4))
            run.rollout()
            run.alg.update()
        runs.append(run)
    assert runs[0].alg._captured.reason is runs[0].alg._captured_rollout.reason is None
    assert runs[0].alg._captured.num_records == 1
    assert runs[0].distance(runs[1]) == 0.0
