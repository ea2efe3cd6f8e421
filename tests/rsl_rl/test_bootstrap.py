"""Bootstrapping at time-outs: worlds whose values are known, and what FusedPPO does with extras["final_obs"]."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import pytest
import torch
from rsl_rl.algorithms import PPO
from rsl_rl.env import VecEnv
from rsl_rl.models import MLPModel
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_ppo.rsl_rl import FusedPPO, mini_batches

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
GAMMA, LAM = 0.9, 0.95


# --- worlds -----------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A Markov chain without choices; an episode starts in a random one of ``starts``."""

    next_state: tuple[int, ...]  # -1: the end
    rewards: tuple[float, ...]  # of leaving a state
    limit: int  # steps until the time-out
    starts: tuple[int, ...]
    true: tuple[float, ...]  # values with discount GAMMA
    stock: tuple[float, ...]  # to which PPO converges


FOREVER = 1.0 / (1.0 - GAMMA)
WORLDS = {
    # the state in which it is cut off looks like the one before: V(s_t) = V(final)
    "one state": World((0,), (1.0,), 10, (0,), (FOREVER,), (FOREVER,)),
    "reward after the limit": World((1, 1), (0.0, 1.0), 1, (0, 1), (GAMMA * FOREVER, FOREVER), (0.0, FOREVER)),
    "a loss ahead": World(
        (1, 2, 2), (1.0, -1.0, 0.0), 1, (0, 1, 2), (1.0 - GAMMA, -1.0, 0.0), (FOREVER, -FOREVER, 0.0)
    ),
    "the end on the step of the limit": World((-1,), (1.0,), 1, (0,), (1.0,), (FOREVER,)),
    "the end before the limit": World((1, -1), (1.0, 1.0), 5, (0, 1), (1.0 + GAMMA, 1.0), (1.0 + GAMMA, 1.0)),
}


class WorldEnv(VecEnv):
    """A world as an environment of rsl_rl; the state is seen as a one-hot vector."""

    device, num_actions, cfg = "cpu", 1, {}

    def __init__(self, world: World, num_envs: int = 16) -> None:
        self.world, self.num_envs, self.max_episode_length = world, num_envs, world.limit
        self.next_state, self.rewards = torch.tensor(world.next_state), torch.tensor(world.rewards)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long)
        self.state = self._start(num_envs)

    def _start(self, num: int) -> Tensor:
        return torch.tensor(self.world.starts)[torch.randint(len(self.world.starts), (num,))]

    def _seen(self, state: Tensor) -> TensorDict:
        one_hot = torch.nn.functional.one_hot(state.clamp(min=0), len(self.next_state)).float()
        return TensorDict({"policy": one_hot}, batch_size=[self.num_envs])

    def get_observations(self) -> TensorDict:
        return self._seen(self.state)

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        rewards, self.state = self.rewards[self.state], self.next_state[self.state]
        self.episode_length_buf += 1
        terminated, truncated = self.state < 0, self.episode_length_buf >= self.world.limit
        dones, final_obs = terminated | truncated, self._seen(self.state)
        self.state = torch.where(dones, self._start(self.num_envs), self.state)
        self.episode_length_buf[dones] = 0
        # as Isaac Lab publishes it: a step that ends the episode and reaches the limit counts as a time-out, too
        extras = {"time_outs": truncated, "terminated": terminated, "final_obs": final_obs}
        return self.get_observations(), rewards, dones.long(), extras


class Table(MLPModel):
    """One number for each state."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.mlp = torch.nn.Linear(self.obs_dim, 1, bias=False)


def learned_values(algorithm: str, world: World) -> list[float]:
    torch.manual_seed(0)
    cfg = {
        "num_steps_per_env": 16,
        "save_interval": 10_000,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {
            "class_name": "MLPModel",
            "hidden_dims": [4],
            "distribution_cfg": {"class_name": "GaussianDistribution"},
        },
        "critic": {"class_name": Table},
        "algorithm": {
            "class_name": algorithm,
            "num_learning_epochs": 2,
            "num_mini_batches": 2,
            "gamma": GAMMA,
            "lam": LAM,
            "schedule": "fixed",
            "optimizer": "sgd",
            "learning_rate": 0.3,
            "max_grad_norm": 1e9,
            "use_clipped_value_loss": False,
            "rnd_cfg": None,
            "symmetry_cfg": None,
        },
    }
    runner = OnPolicyRunner(WorldEnv(world), cfg, None, "cpu")
    runner.learn(150)
    return runner.alg.critic.mlp.weight[0].tolist()


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_tabular_critic_finds_the_true_values(world: World) -> None:
    assert learned_values(FUSED, world) == pytest.approx(world.true, abs=0.02 * FOREVER)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_what_the_stock_finds(world: World) -> None:
    """In two of the worlds the same."""
    assert learned_values("PPO", world) == pytest.approx(world.stock, abs=0.02 * FOREVER)


def test_the_worlds_tell_them_apart() -> None:
    same = [name for name, world in WORLDS.items() if world.true == world.stock]
    assert same == ["one state", "the end before the limit"]


# --- one rollout ------------------------------------------------------------------------------------------------------

LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
GRU = {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8}
CRITICS = {"mlp": {}, "normalized": {"obs_normalization": True}, "lstm": LSTM, "gru": GRU}
STEPS = 6


class Recorder:
    """Stands between a run and its environment: adds final observations, and keeps what went by."""

    def __init__(self, run: object, *, extras: Callable[[TensorDict, Tensor], dict]) -> None:
        self.steps: list[dict] = []
        env, step = run.env, run.env.step

        def recorded(actions: Tensor) -> tuple:
            obs, rewards, dones, original = step(actions)
            obs = obs.clone()
            final_obs = TensorDict({k: v + 10.0 for k, v in obs.items()}, batch_size=obs.batch_size)
            added = {**original, **extras(final_obs, dones)}
            self.steps.append({"obs": obs, "final_obs": final_obs, "rewards": rewards, "dones": dones, "extras": added})
            return obs, rewards, dones, added

        env.step = recorded


def with_final_obs(final_obs: TensorDict, dones: Tensor) -> dict:
    return {"final_obs": final_obs.clone()}


def nothing(final_obs: TensorDict, dones: Tensor) -> dict:
    return {}


def recorded_run(
    new_run: Callable,
    critic: dict,
    extras: Callable = with_final_obs,
    algorithm: str = FUSED,
    *,
    rollout: bool = True,
    **args: object,
) -> tuple[object, Recorder]:
    """A run and its first rollout; runs with the same networks have the same random numbers."""
    run = new_run(algorithm, critic=critic, env_args={"num_envs": 64}, args={"schedule": "fixed", **args})
    recorder = Recorder(run, extras=extras)
    if rollout:
        run.rollout()
    return run, recorder


def expected_returns(run: object, recorder: Recorder, final_values: Tensor) -> Tensor:
    """By the definition, in float64; ``final_values`` [T, E]."""
    alg, st = run.alg, run.alg.storage
    values = st.values.squeeze(-1).double()
    advantage = torch.zeros(64, dtype=torch.float64)
    returns = torch.empty(STEPS, 64, dtype=torch.float64)
    with torch.no_grad():
        following = alg.critic(run.env.get_observations()).squeeze(-1).double()
    for t in reversed(range(STEPS)):
        step = recorder.steps[t]
        dones, time_outs = step["dones"].bool(), step["extras"]["time_outs"]
        after = torch.where(dones, torch.where(time_outs, final_values[t].double(), 0.0), following)
        delta = step["rewards"].double() + alg.gamma * after - values[t]
        advantage = delta + alg.gamma * alg.lam * torch.where(dones, 0.0, advantage)
        returns[t] = advantage + values[t]
        following = values[t]
    return returns


@pytest.mark.parametrize("critic", CRITICS.values(), ids=CRITICS)
def test_returns_are_those_of_the_definition(critic: dict, new_run: Callable) -> None:
    """V(final observation) with the hidden state, and the normalizer, that were in force at its step."""
    run, recorder = recorded_run(new_run, critic, rollout=False)
    alg = run.alg
    final_values = torch.zeros(STEPS, 64)
    process = alg.process_env_step

    def with_reference(obs: TensorDict, rewards: Tensor, dones: Tensor, extras: dict) -> None:
        state = alg.critic.get_hidden_state()
        kept = None if state is None else tuple(s.clone() for s in (state if isinstance(state, tuple) else (state,)))
        with torch.no_grad():
            final_values[alg.storage.step] = alg.critic(recorder.steps[-1]["final_obs"]).squeeze(-1)
        alg.critic.reset(hidden_state=kept if kept is None or len(kept) > 1 else kept[0])
        process(obs, rewards, dones, extras)

    alg.process_env_step = with_reference
    run.rollout()
    assert any(step["extras"]["time_outs"].any() for step in recorder.steps)
    torch.testing.assert_close(
        alg.storage.returns.squeeze(-1).double(), expected_returns(run, recorder, final_values), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("critic", CRITICS.values(), ids=CRITICS)
def test_the_rollout_itself_stays_as_it_is(critic: dict, new_run: Callable) -> None:
    """Hidden states, values and observations: bit for bit those of a run without final observations."""
    runs = [recorded_run(new_run, critic, extras)[0] for extras in (with_final_obs, nothing)]
    ours, theirs = (run.alg.storage for run in runs)
    for name in ("values", "actions", "dones"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert not torch.equal(ours.returns, theirs.returns)
    states = [run.alg.critic.get_hidden_state() for run in runs]
    if states[0] is not None:
        for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in states), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("extras", [nothing, with_final_obs])
def test_the_argument_gives_what_ppo_does(extras: Callable, new_run: Callable, state_distance: Callable) -> None:
    stock, _ = recorded_run(new_run, {}, extras, "PPO")
    ours, _ = recorded_run(new_run, {}, extras, time_out_bootstrap="rsl_rl")
    torch.testing.assert_close(ours.alg.storage.returns, stock.alg.storage.returns, rtol=1e-5, atol=1e-5)


def test_without_final_observations_it_is_what_ppo_does(new_run: Callable) -> None:
    runs = [recorded_run(new_run, {}, nothing, algorithm)[0] for algorithm in ("PPO", FUSED)]
    stock, ours = (run.alg.storage.returns for run in runs)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_terminations_are_masked_without_final_observations_too(new_run: Callable) -> None:
    everything = lambda _, dones: {"time_outs": dones.bool(), "terminated": dones.bool()}  # noqa: E731
    run, _ = recorded_run(new_run, {}, everything)
    unmasked, _ = recorded_run(new_run, {}, lambda _, dones: {"time_outs": dones.bool()})
    masked, _ = recorded_run(new_run, {}, lambda _, dones: {"time_outs": torch.zeros_like(dones)})
    assert torch.equal(run.alg.storage.returns, masked.alg.storage.returns)
    assert not torch.equal(run.alg.storage.returns, unmasked.alg.storage.returns)


def test_rows_that_are_not_done_are_not_looked_at(new_run: Callable) -> None:
    """Isaac Lab leaves the key of an earlier step there; here with NaN in its rows."""

    def stale(final_obs: TensorDict, dones: Tensor) -> dict:
        rows = dones.bool().unsqueeze(-1)
        return {"final_obs": {k: torch.where(rows, v, torch.nan) for k, v in final_obs.items()}}  # a dict is fine

    runs = [recorded_run(new_run, {}, extras)[0] for extras in (with_final_obs, stale)]
    assert torch.equal(runs[0].alg.storage.returns, runs[1].alg.storage.returns)


@pytest.mark.parametrize("only_time_outs", [True, False], ids=["as_on_a_cpu", "as_on_a_gpu"])
@pytest.mark.parametrize(
    ("critic", "bad"),
    [*((critic, math.nan) for critic in CRITICS.values()), (CRITICS["mlp"], math.inf)],
    ids=[*CRITICS, "infinite"],
)
def test_a_final_observation_that_is_not_finite(
    critic: dict, bad: float, only_time_outs: bool, new_run: Callable
) -> None:
    """Its time-out bootstraps from V(s_t), as in PPO; nothing else changes, and it is counted."""
    returns = []
    where: list[tuple[int, int]] = []  # of the first time-out

    for extras in (with_final_obs, lambda *args: spoiled(*args)):
        run, recorder = recorded_run(new_run, critic, extras, rollout=False)
        run.alg._final_values.only_time_outs = only_time_outs
        steps = count()

        def spoiled(final_obs: TensorDict, dones: Tensor, steps: Iterator[int] = steps) -> dict:
            final_obs = final_obs.clone()
            if next(steps) == where[0][0]:
                final_obs["policy"][where[0][1], 1] = bad
            return {"final_obs": final_obs}

        run.rollout()
        returns.append(run.alg.storage.returns.squeeze(-1).clone())
        time_outs = torch.stack([step["extras"]["time_outs"] for step in recorder.steps])
        where.append(tuple(time_outs.nonzero()[0].tolist()))
    t, env = where[0]
    alg, st = run.alg, run.alg.storage
    expected = st.rewards[t, env] + alg.gamma * st.values[t, env]
    torch.testing.assert_close(returns[1][t, env], expected.squeeze(), rtol=1e-5, atol=1e-5)
    reached = torch.zeros_like(returns[0], dtype=torch.bool)
    reached[: t + 1, env] = True
    assert torch.equal(returns[0][~reached], returns[1][~reached])
    assert returns[0][t, env] != returns[1][t, env]
    losses = alg.update()
    assert losses["nonfinite_final_values"] == 1.0
    assert losses["nonfinite_steps"] == 0.0
    run.rollout()
    assert alg.update()["nonfinite_final_values"] == 0.0


def test_another_critic_gives_the_final_values(new_run: Callable) -> None:
    run, recorder = recorded_run(new_run, CRITICS["mlp"])
    run.alg.update()
    run.alg.critic = run.alg._raw_critic = critic = copy.deepcopy(run.alg.critic)
    for parameter in critic.parameters():
        parameter.data.zero_()
    critic.mlp[-1].bias.data.fill_(7.0)
    recorder.steps.clear()
    run.rollout()
    assert any(step["extras"]["time_outs"].any() for step in recorder.steps)
    expected = expected_returns(run, recorder, torch.full((STEPS, 64), 7.0))
    torch.testing.assert_close(run.alg.storage.returns.squeeze(-1).double(), expected, rtol=1e-5, atol=1e-4)


def test_the_count_is_told_where_final_observations_are_published(new_run: Callable) -> None:
    beta = {"distribution_cfg": {"class_name": "BetaDistribution"}}
    for actor in ({}, beta):
        for extras, told in ((with_final_obs, True), (nothing, False)):
            run = new_run(FUSED, actor=actor, env_args={"num_envs": 64})
            Recorder(run, extras=extras)
            losses = run.learn(1).losses[0]
            assert losses.get("nonfinite_final_values") == (0.0 if told else None)


def test_each_rollout_starts_anew(new_run: Callable) -> None:
    """Time-outs of a rollout with final observations are forgotten in the next one, which has none."""
    returns = []
    for extras in (with_final_obs, nothing):
        run, recorder = recorded_run(new_run, {}, extras)
        run.alg.storage.clear()
        original = run.env.step
        run.env.step = lambda actions, original=original: (
            *(out := original(actions))[:3],
            {"time_outs": out[3]["time_outs"]},
        )
        run.rollout()
        assert any(step["extras"]["time_outs"].any() for step in recorder.steps[STEPS:])
        returns.append(run.alg.storage.returns)
    assert torch.equal(*returns)


def test_a_policy_with_its_own_formulas_bootstraps_alike(new_run: Callable) -> None:
    beta = {"distribution_cfg": {"class_name": "BetaDistribution"}}
    returns = []
    for bootstrap in ("final_obs", "rsl_rl"):
        run = new_run(FUSED, actor=beta, env_args={"num_envs": 64}, args={"time_out_bootstrap": bootstrap})
        Recorder(run, extras=with_final_obs)
        returns.append(run.rollout().alg.storage.returns)
    assert not torch.equal(*returns)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_one_pass_of_the_critic_more_per_iteration(new_run: Callable) -> None:
    calls = {}
    for extras in (with_final_obs, nothing):
        run, _ = recorded_run(new_run, {}, extras, rollout=False)
        calls[extras] = 0

        def count(*_: object, extras: Callable = extras) -> None:
            calls[extras] += 1

        run.alg.critic.register_forward_hook(count)
        run.rollout()
    assert calls[nothing] == STEPS + 1
    assert calls[with_final_obs] == STEPS + 2


def test_a_critic_whose_statistics_move_sees_final_observations_at_their_step(new_run: Callable) -> None:
    run, _ = recorded_run(new_run, {}, rollout=False)
    run.alg.critic.mlp.insert(1, torch.nn.BatchNorm1d(run.alg.critic.mlp[0].out_features))
    run.alg._final_values = run.alg._new_final_values()
    run.rollout()
    assert not [t for t in run.alg._final_values.memory() if t.dim() > 2 and t.shape[-1] > 1]


def test_large_observations_are_not_kept(new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic sees them at their step; on the CPU those of time-outs only, and on a GPU all."""
    returns, rows = [], []
    for budget, only_time_outs in ((2**28, True), (0, True), (0, False)):
        monkeypatch.setattr(mini_batches, "AT_ONCE_BYTES", budget)
        run, recorder = recorded_run(new_run, {}, rollout=False)
        run.alg._final_values.only_time_outs = only_time_outs
        seen: list[int] = []
        run.alg.critic.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].batch_size[0]))
        returns.append(run.rollout().alg.storage.returns)
        rows.append(sum(seen) - 64 * (STEPS + 1))
        kept = [t for t in run.alg._final_values.memory() if t.dim() > 2 and t.shape[-1] > 1]
        assert len(kept) == (2 if budget else 0)
    num_time_outs = sum(int(step["extras"]["time_outs"].sum()) for step in recorder.steps)
    assert rows == [num_time_outs, num_time_outs, 64 * STEPS]
    torch.testing.assert_close(returns[1], returns[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns[2], returns[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("critic", CRITICS.values(), ids=CRITICS)
def test_a_step_reads_nothing_on_the_host(critic: dict, new_run: Callable) -> None:
    run, _ = recorded_run(new_run, critic, rollout=False)
    run.alg._final_values.only_time_outs = False  # as on a GPU
    counts: Counter[str] = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    process = run.alg.process_env_step

    def counted(*args: object) -> None:
        with Counted():
            process(*args)

    run.alg.process_env_step = counted
    run.rollout()
    assert counts
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select"):
        assert counts[name] == 0, name


def test_other_forms_of_final_observations(new_run: Callable) -> None:
    """Double precision, arrays of numpy."""
    forms = (
        with_final_obs,
        lambda final_obs, _: {"final_obs": final_obs.to(torch.float64)},
        lambda final_obs, _: {"final_obs": {name: group.numpy() for name, group in final_obs.items()}},
    )
    for critic in ({}, GRU):
        returns = [recorded_run(new_run, critic, form)[0].alg.storage.returns for form in forms]
        assert torch.equal(returns[0], returns[1])
        assert torch.equal(returns[0], returns[2])


@pytest.mark.parametrize("form", [3, None, {"fell": 2}, torch.tensor(0.5), torch.zeros(5)], ids=repr)
def test_what_is_not_an_environments_termination_is_ignored(
    form: object, new_run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Users log numbers under that name."""
    plain, _ = recorded_run(new_run, {}, nothing)
    run, _ = recorded_run(new_run, {}, lambda *_: {"terminated": form})
    assert torch.equal(run.alg.storage.returns, plain.alg.storage.returns)
    told = [r.getMessage() for r in caplog.records if "extras['terminated'] is ignored" in r.getMessage()]
    assert len(told) == 1
    assert "with an entry for each of the 64 environments" in told[0]


class OwnReturns(FusedPPO):
    def compute_returns(self, obs: TensorDict) -> None:
        PPO.compute_returns(self, obs)


class AddsToReturns(FusedPPO):
    def compute_returns(self, obs: TensorDict) -> None:
        self.storage.rewards += 0.0
        super().compute_returns(obs)


def test_a_compute_returns_of_the_users_own(new_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """What it has to see is in the rewards, as in PPO."""
    stock, _ = recorded_run(new_run, {}, with_final_obs, "PPO")
    ours, _ = recorded_run(new_run, {}, with_final_obs, OwnReturns)
    for run in (stock, ours):
        run.alg.storage.clear()
        torch.manual_seed(3)
        run.rollout()
    torch.testing.assert_close(ours.alg.storage.returns, stock.alg.storage.returns, rtol=1e-5, atol=1e-5)
    assert caplog.text.count("OwnReturns has a compute_returns of its own that has not called FusedPPO's") == 1


def test_one_that_calls_ours_has_final_values_from_the_second_rollout_on(new_run: Callable) -> None:
    runs = [recorded_run(new_run, {}, with_final_obs, algorithm)[0] for algorithm in (FUSED, AddsToReturns)]
    assert not torch.equal(*(run.alg.storage.returns for run in runs))
    for run in runs:
        run.alg.storage.clear()
        torch.manual_seed(3)
        run.rollout()
    assert torch.equal(*(run.alg.storage.returns for run in runs))


def test_wrong_arguments_are_named(new_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"time_out_bootstrap must be one of \('final_obs', 'rsl_rl'\), got 'stock'"):
        new_run(FUSED, args={"time_out_bootstrap": "stock"})
    wrong = {
        "lacks the groups ['privileged'] of the critic; it has ['policy']": lambda obs: obs.select("policy"),
        "['policy'] has the shape (3, 6), but the observation group has (64, 6)": lambda obs: {
            **obs,
            "policy": obs["policy"][:3],
        },
        "['policy'] must be a tensor [E, ...], got NoneType": lambda obs: {**obs, "policy": None},
    }
    for message, form in wrong.items():
        caplog.clear()
        recorded_run(new_run, {}, lambda final_obs, _, form=form: {"final_obs": form(final_obs)})
        assert message in caplog.text
