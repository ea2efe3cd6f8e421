"""GymnasiumVecEnv on tiny environments whose every number is known."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList
from rsl_rl.runners import OnPolicyRunner

from pyfast_ppo.cli.train_config import Settings, train_config
from pyfast_ppo.gymnasium import NO_TIME_LIMIT, GymnasiumVecEnv, NonFiniteActionError
from pyfast_ppo.rsl_rl.export import export_policy_to_jit, export_policy_to_onnx


class Counter(gymnasium.Env):
    """Observation: [steps of the episode, episodes so far]. Reward: the action's sum. Terminates after ``length``."""

    def __init__(self, length: int = 10**6, action_space: spaces.Space | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = action_space or spaces.Box(-1.0, 2.0, (1,), np.float32)
        self.length = length
        self.steps = 0
        self.episodes = -1
        self.last_action = None

    def _obs(self) -> np.ndarray:
        return np.array([self.steps, self.episodes], dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.episodes += 1
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.last_action = np.array(action)
        self.steps += 1
        return self._obs(), float(np.sum(action)), self.steps >= self.length, False, {}


class ReusesItsObservation(Counter):
    """``reset`` and ``step`` write into one array and return it."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._buffer = np.zeros(2)

    def _obs(self) -> np.ndarray:
        self._buffer[:] = (self.steps, self.episodes)
        return self._buffer


class Random(Counter):
    """Observations drawn from the environment's own generator."""

    def _obs(self) -> np.ndarray:
        return self.np_random.normal(size=2)


class DictObservation(Counter):
    """A vector, a matrix, a channel-first and a channel-last image."""

    def __init__(self, length: int = 10**6) -> None:
        super().__init__(length)
        self.observation_space = spaces.Dict(
            {
                "vector": spaces.Box(-np.inf, np.inf, (2,), np.float32),
                "matrix": spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
                "channel_first": spaces.Box(0, 255, (3, 8, 9), np.uint8),
                "channel_last": spaces.Box(0, 255, (8, 9, 3), np.uint8),
            }
        )

    def _obs(self) -> dict[str, np.ndarray]:
        return {
            name: np.full(space.shape, self.steps, dtype=space.dtype)
            for name, space in self.observation_space.spaces.items()
        }


class GroupsInOneArray(VectorEnv):
    """Two environments in one, with groups, each of which is one array, also in ``final_obs``."""

    def __init__(self) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = 2
        self.single_observation_space = spaces.Dict(a=spaces.Box(-9, 9, (2,)), b=spaces.Box(-9, 9, (3,)))
        self.single_action_space = spaces.Box(-1.0, 1.0, (1,))

    def obs(self, value: float) -> dict[str, np.ndarray]:
        return {"a": np.full((2, 2), value, np.float32), "b": np.full((2, 3), -value, np.float32)}

    def reset(self, *, seed=None, options=None):
        return self.obs(0.0), {}

    def step(self, actions):
        ended = np.array([False, True])
        return self.obs(1.0), np.zeros(2), ended, ~ended & False, {"final_obs": self.obs(7.0)}


class ReusesItsBuffers(VectorEnv):
    """Two environments in one, whose every array is written to again at the next step. Episodes last three steps."""

    def __init__(self) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = 2
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.obs = np.zeros((2, 2), dtype=np.float32)
        self.rewards = np.zeros(2, dtype=np.float32)
        self.ended = np.zeros(2, dtype=bool)
        self.final_obs = np.zeros((2, 2), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        self.obs[:] = 0
        return self.obs, {}

    def step(self, actions):
        self.obs += 1
        self.rewards += actions[:, 0]
        self.ended[:] = self.obs[:, 0] == 3
        self.final_obs[:] = self.obs
        self.obs[self.ended] = 0
        infos = {"final_obs": self.final_obs} if self.ended.any() else {}
        return self.obs, self.rewards, self.ended, np.zeros(2, dtype=bool), infos


class RewardInAnArray(Counter):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


LIMIT = 3
gymnasium.register("FastPPOCounter-v0", entry_point=Counter, max_episode_steps=LIMIT)
gymnasium.register("FastPPOCounterNoLimit-v0", entry_point=Counter)


def steps_of(obs) -> list[float]:
    """First column of the policy group: the step counter."""
    return obs["policy"][:, 0].tolist()


def step(env: GymnasiumVecEnv, value: float = 0.0):
    return env.step(torch.full((env.num_envs, env.num_actions), value))


def test_time_out_is_no_termination_and_final_observation_is_kept():
    env = GymnasiumVecEnv("FastPPOCounter-v0", num_envs=2)
    for expected in range(1, LIMIT):
        obs, _, dones, extras = step(env)
        assert steps_of(obs) == steps_of(extras["final_obs"]) == [expected] * 2
        assert dones.tolist() == [0, 0]
        assert not extras["time_outs"].any() and not extras["terminated"].any()
    obs, _, dones, extras = step(env)
    assert steps_of(obs) == [0, 0]
    assert steps_of(extras["final_obs"]) == [LIMIT, LIMIT]
    assert dones.tolist() == [1, 1]
    assert extras["time_outs"].tolist() == [True, True]
    assert extras["terminated"].tolist() == [False, False]


def test_termination_is_no_time_out():
    env = GymnasiumVecEnv("FastPPOCounter-v0", num_envs=2, length=2)
    step(env)
    obs, _, dones, extras = step(env)
    assert (steps_of(obs), steps_of(extras["final_obs"])) == ([0, 0], [2, 2])
    assert dones.tolist() == [1, 1]
    assert extras["time_outs"].tolist() == [False, False]
    assert extras["terminated"].tolist() == [True, True]


def test_termination_on_the_step_of_the_limit_is_no_time_out():
    env = GymnasiumVecEnv("FastPPOCounter-v0", length=LIMIT)
    for _ in range(LIMIT):
        _, _, dones, extras = step(env)
    assert dones.tolist() == [1]
    assert extras["terminated"].tolist() == [True]
    assert extras["time_outs"].tolist() == [False]


def test_rows_end_independently_and_final_observation_is_current_elsewhere():
    lengths = iter([2, 3, 100])
    env = GymnasiumVecEnv(lambda: Counter(next(lengths)), num_envs=3)
    seen = []
    for _ in range(3):
        obs, _, dones, extras = step(env)
        seen.append((steps_of(obs), steps_of(extras["final_obs"]), dones.tolist()))
    assert seen == [
        ([1, 1, 1], [1, 1, 1], [0, 0, 0]),
        ([0, 2, 2], [2, 2, 2], [1, 0, 0]),
        ([1, 0, 3], [1, 3, 3], [0, 1, 0]),
    ]
    assert env.episode_length_buf.tolist() == [1, 0, 3]


def test_final_observation_survives_an_environment_that_reuses_its_array():
    env = GymnasiumVecEnv(ReusesItsObservation, num_envs=2, length=2)
    step(env)
    obs, _, _, extras = step(env)
    assert (steps_of(obs), steps_of(extras["final_obs"])) == ([0, 0], [2, 2])


def test_final_observation_survives_in_a_sync_vector_env_that_is_passed_in():
    vector_env = SyncVectorEnv([lambda: ReusesItsObservation(2)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymnasiumVecEnv(vector_env)
    step(env)
    obs, _, _, extras = step(env)
    assert (steps_of(obs), steps_of(extras["final_obs"])) == ([0, 0], [2, 2])


def test_final_observations_may_be_a_dict_of_arrays():
    _, _, dones, extras = step(GymnasiumVecEnv(GroupsInOneArray()))
    assert dones.tolist() == [0, 1]
    assert extras["final_obs"]["a"].tolist() == [[1.0] * 2, [7.0] * 2]
    assert extras["final_obs"]["b"].tolist() == [[-1.0] * 3, [-7.0] * 3]


def test_types_shapes_and_device():
    env = GymnasiumVecEnv("FastPPOCounter-v0", num_envs=4, seed=0)
    assert (env.num_envs, env.num_actions, env.max_episode_length) == (4, 1, LIMIT)
    obs, rewards, dones, extras = step(env, 0.5)
    assert obs.batch_size == torch.Size([4]) and list(obs.keys()) == ["policy"]
    assert obs["policy"].shape == (4, 2) and obs["policy"].dtype == torch.float32
    assert rewards.shape == (4,) and rewards.dtype == torch.float32 and rewards.tolist() == [0.5] * 4
    assert dones.shape == (4,) and dones.dtype == torch.long
    assert extras["time_outs"].shape == extras["terminated"].shape == (4,)
    assert extras["time_outs"].dtype == extras["terminated"].dtype == torch.bool
    assert env.episode_length_buf.dtype == torch.long
    assert {obs.device, rewards.device, dones.device, extras["final_obs"].device} == {torch.device("cpu")}
    assert env.cfg["env"] == "FastPPOCounter-v0" and env.cfg["num_envs"] == 4 and env.cfg["seed"] == 0


def test_time_limit_none_and_from_a_wrapper_and_from_make():
    assert GymnasiumVecEnv("FastPPOCounterNoLimit-v0").max_episode_length == NO_TIME_LIMIT
    assert GymnasiumVecEnv(lambda: gymnasium.wrappers.TimeLimit(Counter(), 7)).max_episode_length == 7
    assert GymnasiumVecEnv("FastPPOCounter-v0", max_episode_steps=5).max_episode_length == 5
    limit = gymnasium.wrappers.TimeLimit
    assert GymnasiumVecEnv(lambda: limit(limit(Counter(), 5), 50)).max_episode_length == 5
    without = GymnasiumVecEnv("FastPPOCounter-v0", max_episode_steps=-1)  # Gymnasium's way to switch it off
    assert without.max_episode_length == NO_TIME_LIMIT and without.cfg["max_episode_steps"] is None
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    asynchronous = gymnasium.make_vec(
        "FastPPOCounter-v0", num_envs=1, vectorization_mode="async", vector_kwargs=vector_kwargs
    )
    env = GymnasiumVecEnv(asynchronous)
    assert env.max_episode_length == LIMIT
    env.close()
    torch.randint_like(torch.zeros(2, dtype=torch.long), high=NO_TIME_LIMIT)  # what rsl_rl's random start does


def test_seeds_of_numpy():
    first, second = (GymnasiumVecEnv("Pendulum-v1", 2, seed=seed) for seed in (3, np.int64(3)))
    assert torch.equal(first.get_observations()["policy"], second.get_observations()["policy"])


def test_actions_are_clipped_for_the_environment_only():
    env = GymnasiumVecEnv(Counter, num_envs=3)
    actions = torch.tensor([[-5.0], [0.25], [float("inf")]])
    before = actions.clone()
    _, rewards, _, _ = env.step(actions)
    assert rewards.tolist() == [-1.0, 0.25, 2.0]
    assert torch.equal(actions, before)


def test_bounds_differ_by_dimension_and_actions_are_reshaped():
    low = np.array([[-1.0, -2.0], [-3.0, -4.0]], dtype=np.float32)
    space = spaces.Box(low, -low, dtype=np.float32)
    env = GymnasiumVecEnv(Counter, action_space=space)
    assert env.num_actions == 4
    env.step(torch.tensor([[-9.0, -9.0, 9.0, 0.5]]))
    assert env.env.envs[0].unwrapped.last_action.tolist() == [[-1.0, -2.0], [3.0, 0.5]]


@pytest.mark.parametrize(
    ("low", "high", "bounds"),
    [
        (-1.0, 2.0, ([-1.0, -1.0], [2.0, 2.0])),
        ([-np.inf, -1.0], [np.inf, np.inf], ([-np.inf, -1.0], [np.inf, np.inf])),
        (-np.inf, np.inf, None),
    ],
)
def test_action_bounds_are_those_of_the_space(low, high, bounds):
    low, high = (np.broadcast_to(np.float32(side), 2) for side in (low, high))
    env = GymnasiumVecEnv(Counter, action_space=spaces.Box(low, high, dtype=np.float32))
    found = env.action_bounds
    assert (found and tuple(side.tolist() for side in found)) == bounds
    assert found is None or {side.dtype for side in found} == {torch.float32}


def test_an_action_that_cannot_move_has_bounds_that_meet():
    low, high = GymnasiumVecEnv(Counter, action_space=spaces.Box(0.1, 0.1, (1,), np.float64)).action_bounds
    assert low.item() == high.item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("form", ["jit", "onnx"])
def test_an_exported_policy_stays_in_the_action_space(tmp_path, dtype, shape, form):
    """Rounded to float32, 0.1 and 0.7 would lie beyond a float64 space."""
    space = spaces.Box(np.full(shape, -0.7, dtype), np.full(shape, 0.1, dtype), dtype=dtype)
    env = GymnasiumVecEnv(Counter, num_envs=2, action_space=space)
    runner = OnPolicyRunner(env, train_config(Settings(), ["policy"]), None, "cpu")
    with torch.no_grad():
        list(runner.alg.get_policy().mlp.parameters())[-1].copy_(torch.tensor([-5.0, 0.0, 5.0]))
    if form == "jit":
        export_policy_to_jit(runner, tmp_path)
        policy = torch.jit.load(tmp_path / "policy.pt")
    else:
        reference = pytest.importorskip("onnx.reference")
        export_policy_to_onnx(runner, tmp_path)
        evaluator = reference.ReferenceEvaluator(str(tmp_path / "policy.onnx"))

        def policy(obs):
            return torch.from_numpy(evaluator.run(None, {"obs": obs.numpy()})[0])

    strict = Counter(action_space=space)
    obs, _ = strict.reset()
    with torch.inference_mode():
        action = policy(torch.tensor(obs, dtype=torch.float32)[None])[0].numpy().reshape(shape)
    strict.step(action)
    np.testing.assert_allclose(action.reshape(-1)[[0, 2]], [-0.7, 0.1], rtol=1e-6)


def test_nan_action_is_named():
    env = GymnasiumVecEnv(Counter, num_envs=3)
    with pytest.raises(NonFiniteActionError, match=r"NaN or infinite in 1 of 3 environments .* number 1"):
        env.step(torch.tensor([[0.0], [float("nan")], [0.0]]))


def test_infinite_action_without_a_bound_is_named():
    env = GymnasiumVecEnv(Counter, action_space=spaces.Box(-np.inf, np.inf, (1,), np.float32))
    with pytest.raises(NonFiniteActionError):
        env.step(torch.tensor([[float("-inf")]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_observation_that_made_the_actions_nan_is_named(bad):
    class Breaks(DictObservation):
        def _obs(self):
            obs = super()._obs()
            obs["matrix"][1, 2] = bad if self.steps == 2 else 0.0
            return obs

    lengths = iter([1, 100, 100])
    env = GymnasiumVecEnv(lambda: Breaks(next(lengths)), num_envs=3)
    nan = torch.full((3, 1), float("nan"))
    step(env)
    with pytest.raises(NonFiniteActionError, match="the policy has diverged"):
        env.step(nan)
    step(env)
    with pytest.raises(NonFiniteActionError, match=r"the observation 'matrix' of environment 1, .* is NaN or infinite"):
        env.step(nan)


@pytest.mark.parametrize("vector_class", [None, SyncVectorEnv, AsyncVectorEnv])
def test_rewards_may_be_arrays_of_one_number(vector_class):
    if vector_class is None:
        env = GymnasiumVecEnv(RewardInAnArray, num_envs=2)
    else:
        env = GymnasiumVecEnv(vector_class([RewardInAnArray] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    _, rewards, _, _ = step(env, 0.5)
    assert rewards.tolist() == [0.5, 0.5]
    env.close()


def test_wrong_shape_of_actions_is_named():
    env = GymnasiumVecEnv(Counter, num_envs=3)
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*have \(3,\)"):
        env.step(torch.zeros(3))


def test_dict_observation_gives_a_group_a_key():
    env = GymnasiumVecEnv(DictObservation, num_envs=2, length=2)
    shapes = {name: tuple(value.shape) for name, value in env.get_observations().items()}
    assert shapes == {"vector": (2, 2), "matrix": (2, 6), "channel_first": (2, 3, 8, 9), "channel_last": (2, 216)}
    step(env)
    obs, _, _, extras = step(env)
    for name, shape in shapes.items():
        assert obs[name].dtype == torch.float32
        assert torch.equal(obs[name], torch.zeros(shape))
        assert torch.equal(extras["final_obs"][name], torch.full(shape, 2.0))


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(3), spaces.MultiBinary(2), spaces.Box(0, 5, (2,), np.int64), spaces.Dict(a=spaces.Box(0, 1))],
)
def test_action_spaces_without_real_numbers_are_refused(space):
    with pytest.raises(ValueError, match="Box with a float dtype"):
        GymnasiumVecEnv(Counter, action_space=space)


def test_an_action_space_without_dimensions_is_refused():
    with pytest.raises(ValueError, match="no dimension to act in"):
        GymnasiumVecEnv(Counter, action_space=spaces.Box(-1, 1, (0,)))


def test_groups_that_are_not_called_by_strings_are_refused():
    def make() -> gymnasium.Env:
        env = Counter()
        env.observation_space = spaces.Dict({1: spaces.Box(0, 1)})
        return env

    with pytest.raises(ValueError, match="the observation 1 has a key of type int"):
        GymnasiumVecEnv(make)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple([spaces.Box(0, 1)])]
)
def test_observation_spaces_that_are_no_boxes_are_refused(space):
    def make() -> gymnasium.Env:
        env = Counter()
        env.observation_space = space
        return env

    with pytest.raises(ValueError, match="FlattenObservation"):
        GymnasiumVecEnv(make)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused_with_the_mend(mode):
    vector_env = SyncVectorEnv([Counter], autoreset_mode=mode)
    with pytest.raises(ValueError, match=rf"{mode.name}.*AutoresetMode\.SAME_STEP.*wrappers=\[\.\.\.\]"):
        GymnasiumVecEnv(vector_env)


def test_a_vector_env_that_is_refused_remains_the_callers():
    vector_env = SyncVectorEnv([Counter], autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        GymnasiumVecEnv(vector_env)
    assert not vector_env.closed
    fails = SyncVectorEnv([FailsToReset], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(OSError, match="no assets"):
        GymnasiumVecEnv(fails)
    assert not fails.closed


class FailsToReset(Counter):
    closed = 0

    def reset(self, *, seed=None, options=None):
        raise OSError("no assets")

    def close(self):
        FailsToReset.closed += 1


@pytest.mark.parametrize(
    ("kwargs", "error"), [({}, OSError), ({"device": "no_such_device"}, RuntimeError), ({"seed": 0.5}, TypeError)]
)
def test_what_was_made_here_is_closed_on_every_error(kwargs, error, monkeypatch):
    monkeypatch.setattr(FailsToReset, "closed", 0)
    with pytest.raises(error):
        GymnasiumVecEnv(FailsToReset, num_envs=2, **kwargs)
    assert FailsToReset.closed == 2


@pytest.mark.parametrize("mode", ["vector_entry_point", gymnasium.VectorizeMode.VECTOR_ENTRY_POINT])
def test_a_tasks_own_vector_env_is_refused_with_the_mend(mode):
    with pytest.raises(ValueError, match=r'neither an autoreset mode nor wrappers; use "sync".*make_vec'):
        GymnasiumVecEnv("CartPole-v1", vectorization_mode=mode)


@pytest.mark.parametrize("vector_class", [SyncVectorEnv, AsyncVectorEnv])
def test_vector_env_is_taken_as_it_is(vector_class):
    vector_env = vector_class([lambda: Counter(2)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymnasiumVecEnv(vector_env)
    assert env.env is vector_env and env.num_envs == 3
    step(env)
    obs, _, dones, extras = step(env)
    assert (steps_of(obs), steps_of(extras["final_obs"]), dones.tolist()) == ([0] * 3, [2] * 3, [1] * 3)
    env.close()


def test_arguments_that_contradict_each_other_are_refused():
    vector_env = SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="num_envs=3, but the VectorEnv has 2"):
        GymnasiumVecEnv(vector_env, num_envs=3)
    with pytest.raises(TypeError, match="length"):
        GymnasiumVecEnv(vector_env, length=3)
    with pytest.raises(ValueError, match="at least 1"):
        GymnasiumVecEnv(Counter, num_envs=0)
    with pytest.raises(TypeError, match="callable"):
        GymnasiumVecEnv(Counter())
    with pytest.raises(TypeError, match=r"must return a gymnasium\.Env"):
        GymnasiumVecEnv(lambda: 3)


def rollout(seed: int | None) -> torch.Tensor:
    env = GymnasiumVecEnv(Random, num_envs=2, seed=seed, length=2)
    frames = [env.get_observations()["policy"]]
    for _ in range(5):  # over several resets
        obs, _, _, extras = step(env)
        frames += [obs["policy"], extras["final_obs"]["policy"]]
    return torch.stack(frames)


def test_seed_makes_runs_equal_and_environments_different():
    assert torch.equal(rollout(3), rollout(3))
    assert not torch.equal(rollout(3), rollout(4))
    assert not torch.equal(rollout(None), rollout(None))
    assert not torch.equal(rollout(3)[:, 0], rollout(3)[:, 1])


def make_sync(copy: bool) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Counter(3)] * 2, copy=copy, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("make", [lambda: make_sync(True), lambda: make_sync(False), ReusesItsBuffers])
def test_returned_tensors_are_never_written_again(make):
    env = GymnasiumVecEnv(make())
    observed = env.get_observations()
    returned, snapshots = [observed["policy"]], [observed["policy"].clone()]
    for value in range(7):
        obs, rewards, dones, extras = step(env, value / 10)
        tensors = [
            obs["policy"],
            rewards,
            dones,
            extras["time_outs"],
            extras["terminated"],
            extras["final_obs"]["policy"],
            env.get_observations()["policy"],
            env.episode_length_buf,
        ]
        returned += tensors
        snapshots += [tensor.clone() for tensor in tensors]
    assert all(torch.equal(tensor, snapshot) for tensor, snapshot in zip(returned, snapshots, strict=True))
    storages = [tensor.untyped_storage().data_ptr() for tensor in returned]
    assert len(set(storages)) == len(storages)


def test_get_observations_does_not_hand_out_the_own_state():
    env = GymnasiumVecEnv(Counter)
    env.get_observations()["policy"].fill_(99.0)
    assert steps_of(env.get_observations()) == [0]


def test_reset_begins_new_episodes():
    env = GymnasiumVecEnv(Counter, num_envs=2)
    step(env)
    obs, extras = env.reset(seed=1)
    assert steps_of(obs) == [0, 0] and extras == {} and env.episode_length_buf.tolist() == [0, 0]


def test_missing_final_observation_is_named():
    class ForgetsFinalObservation(SyncVectorEnv):
        def step(self, actions):
            *result, infos = super().step(actions)
            infos.pop("final_obs", None)
            return *result, infos

    env = GymnasiumVecEnv(ForgetsFinalObservation([lambda: Counter(1)], autoreset_mode=AutoresetMode.SAME_STEP))
    with pytest.raises(RuntimeError, match="final_obs"):
        step(env)


def test_a_wrapper_that_makes_infos_a_list_is_named():
    vector_env = SyncVectorEnv([lambda: Counter(1)], autoreset_mode=AutoresetMode.SAME_STEP)
    env = GymnasiumVecEnv(DictInfoToList(vector_env))
    with pytest.raises(RuntimeError, match=r"infos that are a list.*DictInfoToList"):
        step(env)


def test_rnd_of_rsl_rl_finds_what_it_reads():
    assert GymnasiumVecEnv(Counter).unwrapped.step_dt == 1.0


def test_mujoco_task_solves_its_own_limit():
    env = GymnasiumVecEnv("InvertedPendulum-v5", num_envs=2, seed=0)
    assert env.max_episode_length == 1000
    ended = torch.zeros(2, dtype=torch.bool)
    for _ in range(200):  # with a constant push the pole falls at once, which is no time-out
        _, rewards, dones, extras = step(env, 3.0)
        ended |= dones.bool()
        assert not extras["time_outs"].any()
    assert ended.all()
    assert torch.isfinite(rewards).all()
    env.close()
