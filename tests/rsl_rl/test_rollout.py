"""What FusedPPO does while a rollout is collected: sampling, what is stored, and how much memory that takes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from rsl_rl.algorithms import PPO
from rsl_rl.modules.distribution import GaussianDistribution
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_ppo.rsl_rl import FusedPPO

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
ACTORS = {"mlp": {}, "heteroscedastic": HETEROSCEDASTIC, "lstm": LSTM}


@pytest.mark.parametrize("num_rollouts", [1, 2])
@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
def test_the_actions_are_those_of_ppo(actor: dict, num_rollouts: int, new_run: Callable) -> None:
    """From the same random numbers, and so is all else that is stored: to the bit where the hidden layers are not
    fused, but for log-probabilities, and else to rounding."""
    runs = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, actor=actor).rollout()
        for _ in range(num_rollouts - 1):
            run.alg.storage.clear()
            run.rollout()
        runs.append(run.alg.storage)
    stock, fused = runs
    near = 0.0 if actor else 2e-6
    for name in ("actions", "values", "rewards", "dones"):
        torch.testing.assert_close(getattr(fused, name), getattr(stock, name), rtol=0, atol=near)
    torch.testing.assert_close(fused.actions_log_prob, stock.actions_log_prob, rtol=0, atol=4e-6)
    for ours, theirs in zip(fused.distribution_params, stock.distribution_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near)
    for name, group in stock.observations.items():
        torch.testing.assert_close(fused.observations[name], group, rtol=0, atol=near)


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


@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
def test_what_a_user_puts_into_the_transition_is_stored(actor: dict, new_run: Callable) -> None:
    """As the actions that the environment made of them."""
    runs = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, actor=actor)
        act, process_env_step = run.alg.act, run.alg.process_env_step

        def act_and_clip(obs: TensorDict, run=run, act=act) -> Tensor:
            run.alg.transition.actions = act(obs).clamp(-0.5, 0.5)
            return run.alg.transition.actions

        def with_other_values(*args: object, run=run, process_env_step=process_env_step) -> None:
            run.alg.transition.values = torch.full_like(run.alg.transition.values, 3.0)
            process_env_step(*args)

        run.alg.act, run.alg.process_env_step = act_and_clip, with_other_values
        run.rollout()
        run.alg.storage.clear()
        runs.append(run.rollout().alg.storage)
    stock, fused = runs
    assert fused.actions.abs().max() == 0.5
    assert (fused.values == 3.0).all()
    torch.testing.assert_close(fused.actions, stock.actions, rtol=0, atol=2e-6)
    torch.testing.assert_close(fused.rewards, stock.rewards, rtol=0, atol=2e-6)  # time-outs bootstrap from the values


@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
def test_an_environment_may_write_into_the_actions(actor: dict, new_run: Callable) -> None:
    run = new_run(FUSED, actor=actor)
    step, seen = run.env.step, []

    def step_in_place(actions: Tensor) -> tuple:
        seen.append(actions.clone())
        return step(actions.fill_(0.0))

    run.env.step = step_in_place
    for _ in range(2):
        seen.clear()
        run.rollout()
        assert torch.equal(run.alg.storage.actions, torch.stack(seen))
        run.alg.storage.clear()


def test_a_group_that_a_user_replaces_in_the_transition(new_run: Callable) -> None:
    """Its observations are a TensorDict, in which that is not seen from outside."""
    run = new_run(FUSED)
    process_env_step, relabelled = run.alg.process_env_step, []

    def relabel(*args: object) -> None:
        if not relabelled or len(relabelled) % 6 == 2:
            obs = run.alg.transition.observations
            obs["policy"] = obs["policy"] + 100.0
        relabelled.append(run.alg.transition.observations["policy"].clone())
        process_env_step(*args)

    run.alg.process_env_step = relabel
    for _ in range(3):
        relabelled_before = len(relabelled)
        run.rollout()
        assert torch.equal(run.alg.storage.observations["policy"], torch.stack(relabelled[relabelled_before:]))
        run.alg.storage.clear()
    assert torch.stack(relabelled).max() > 90.0


@pytest.mark.parametrize("how", ["cleared", "another"])
def test_a_rollout_that_is_thrown_away_within_a_step(how: str, new_run: Callable) -> None:
    """The transition is the first of the new one, in full."""
    run = new_run(FUSED).rollout()
    alg = run.alg
    alg.storage.clear()
    with torch.inference_mode():
        obs = run.env.get_observations()
        for _ in range(3):
            obs, *outcome = run.env.step(alg.act(obs))
            alg.process_env_step(obs, *outcome)
        _, *outcome = run.env.step(actions := alg.act(obs))
        if how == "cleared":
            alg.storage.clear()
        else:
            st = alg.storage
            alg.storage = type(st)("rl", st.num_envs, st.num_transitions_per_env, obs, st.actions_shape, st.device)
        alg.process_env_step(obs, *outcome)
    assert alg.storage.step == 1
    assert torch.equal(alg.storage.actions[0], actions)
    assert torch.equal(alg.storage.observations["policy"][0], obs["policy"])


def test_what_a_transition_has(new_run: Callable) -> None:
    """In the first step as later: shapes as in PPO."""
    shapes = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm)
        process_env_step = run.alg.process_env_step

        def note(*args: object, run=run, process_env_step=process_env_step) -> None:
            t = run.alg.transition
            tensors = (t.actions, t.values, t.actions_log_prob, *t.distribution_params)
            shapes[-1].append(([x.shape for x in tensors], t.observations.batch_size, t.hidden_states))
            process_env_step(*args)

        run.alg.process_env_step = note
        shapes.append([])
        run.rollout()
    assert shapes[0] == shapes[1]


class Watching(PPO):
    seen = 0

    def act(self, obs: TensorDict) -> Tensor:
        Cooperative.seen += 1
        return super().act(obs)


class Cooperative(FusedPPO, Watching):
    pass


def test_the_act_of_another_parent_is_called(new_run: Callable) -> None:
    run = new_run(Cooperative).rollout()
    assert Cooperative.seen == run.alg.storage.num_transitions_per_env


class OwnValues(PPO):
    def process_env_step(self, *args: object) -> None:
        self.transition.values = torch.full_like(self.transition.values, 3.0)
        super().process_env_step(*args)


class FusedOwnValues(FusedPPO, OwnValues):
    pass


def test_what_another_parent_puts_into_the_transition_is_stored(new_run: Callable) -> None:
    assert (new_run(FusedOwnValues).rollout().alg.storage.values == 3.0).all()


@pytest.mark.parametrize("where", ["for all", "this one", "this one, later"])
def test_a_replaced_way_to_store_is_called(where: str, new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen, own = new_run(FUSED), [], RolloutStorage.add_transition
    run.rollout()
    run.alg.storage.clear()
    if where == "for all":
        monkeypatch.setattr(RolloutStorage, "add_transition", lambda st, t: seen.append(st.step) or own(st, t))
    mine = lambda t: seen.append(run.alg.storage.step) or own(run.alg.storage, t)  # noqa: E731
    step = run.env.step

    def put_in_and_step(actions: Tensor) -> tuple:
        if run.alg.storage.step == {"this one": 0, "this one, later": 3}.get(where):
            run.alg.storage.add_transition = mine
        return step(actions)

    run.env.step = put_in_and_step
    run.rollout()
    assert seen == list(range(3 if where == "this one, later" else 0, 6))
    if where != "for all":
        assert run.alg.storage.add_transition is mine


def test_a_group_that_comes_later(new_run: Callable) -> None:
    run = new_run(FUSED).rollout()
    st, get_observations = run.alg.storage, run.env.get_observations
    st.clear()
    st.observations["more"] = torch.zeros(*st.observations.batch_size, 2)
    run.env.get_observations = lambda: get_observations().set("more", torch.ones(st.num_envs, 2))
    run.rollout()
    assert (st.observations["more"] == 1.0).all()


def test_acting_for_rows_of_several_dimensions(new_run: Callable) -> None:
    alg = new_run(FUSED).rollout().alg
    with torch.inference_mode():
        assert alg.act(alg.storage.observations).shape == alg.storage.actions.shape


@pytest.mark.parametrize("name", ["observations", "actions", "distribution_params", "a group"])
def test_other_memory_for_a_rollout(name: str, new_run: Callable) -> None:
    """What a user puts into the storage is written to from then on."""
    run = new_run(FUSED).rollout()
    storage = run.alg.storage
    storage.clear()
    if name == "a group":
        storage.observations["policy"] = torch.zeros_like(storage.observations["policy"])
    elif name == "distribution_params":
        storage.distribution_params = tuple(torch.zeros_like(t) for t in storage.distribution_params)
    else:
        setattr(storage, name, torch.zeros_like(getattr(storage, name)))
    run.rollout()
    assert all((group != 0.0).any() for group in storage.observations.values())
    assert (storage.actions != 0.0).any()
    mean, std = storage.distribution_params
    with torch.no_grad():
        torch.testing.assert_close(run.alg.actor(storage.observations[3]), mean[3], rtol=0, atol=2e-6)
    assert (std == run.alg.actor.distribution.std_param).all()


def test_outside_of_inference_mode(new_run: Callable) -> None:
    """After a rollout within."""
    run = new_run(FUSED).rollout()
    run.alg.storage.clear()
    obs = run.env.get_observations()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            for _ in range(3):
                actions = run.alg.act(obs)
                assert not actions.requires_grad
                run.alg.process_env_step(*run.env.step(actions))
    assert run.alg.storage.step == 6
    with torch.inference_mode():
        run.alg.compute_returns(obs)
    run.alg.update()


def test_a_copy_in_the_middle_of_a_rollout(new_run: Callable) -> None:
    run = new_run(FUSED).rollout()
    run.alg.storage.clear()
    with torch.inference_mode():
        obs = run.env.get_observations()
        for _ in range(3):
            run.alg.process_env_step(*run.env.step(run.alg.act(obs)))
        actions = run.alg.act(obs)
        before = run.alg.storage.actions.clone()
        copied = copy.deepcopy(run.alg)
        outcome = run.env.step(actions)
        copied.process_env_step(*outcome)
        assert torch.equal(copied.storage.actions[3], actions)
        copied.act(obs + 1.0)
        assert torch.equal(run.alg.storage.actions, before)
        assert not torch.equal(copied.storage.actions, before)
    assert (run.alg.storage.step, copied.storage.step) == (3, 4)


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
