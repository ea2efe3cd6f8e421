"""What the simulators' wrappers share: the clip of actions, observation spaces, the check of obs_groups, tasks."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from tensordict import TensorDict

from pyfast_ppo.vec_env import (
    action_bounds,
    check_obs_groups,
    clip,
    clip_range,
    clipped_action_space,
    declared_action_space,
    is_state,
    near_matches,
    put_action_space,
    single_observation_space,
    without_absent_options,
)

UNBOUNDED = spaces.Box(-np.inf, np.inf, (3,))
DECLARED = spaces.Box(np.array([-1.0, -0.5, -np.inf], np.float32), np.array([1.0, 2.0, 0.25], np.float32))


@dataclass
class MjlabBox:
    """As mjlab's spaces are: bounds may be numbers, the dtype is a string."""

    shape: tuple[int, ...]
    low: float | tuple[float, ...] = -math.inf
    high: float | tuple[float, ...] = math.inf
    dtype: str = "float32"


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip_actions", "low", "high"),
    [
        (1.0, [-1.0] * 3, [1.0] * 3),
        (2, [-2.0] * 3, [2.0] * 3),
        (0.0, [0.0] * 3, [0.0] * 3),
        (math.inf, [-math.inf] * 3, [math.inf] * 3),
        (np.float32(1.5), [-1.5] * 3, [1.5] * 3),
        (torch.tensor(1.5), [-1.5] * 3, [1.5] * 3),
        ((-0.5, 2.0), [-0.5] * 3, [2.0] * 3),
        ([-0.5, 2.0], [-0.5] * 3, [2.0] * 3),
        ((-math.inf, 2.0), [-math.inf] * 3, [2.0] * 3),
        ((-0.5, [1.0, 2.0, 3.0]), [-0.5] * 3, [1.0, 2.0, 3.0]),
        (([-3.0, -2.0, -1.0], torch.tensor([1.0, 2.0, 3.0])), [-3.0, -2.0, -1.0], [1.0, 2.0, 3.0]),
        (torch.tensor([[-3.0, -2.0, -1.0], [1.0, 2.0, 3.0]]), [-3.0, -2.0, -1.0], [1.0, 2.0, 3.0]),
        (np.array([[-3.0, -2.0, -1.0], [1.0, 2.0, 3.0]]), [-3.0, -2.0, -1.0], [1.0, 2.0, 3.0]),
        ((0.5, 0.5), [0.5] * 3, [0.5] * 3),
    ],
)
def test_bounds(clip_actions, low, high):
    bounds = action_bounds(UNBOUNDED, clip_actions)
    assert [bound.tolist() for bound in bounds] == [low, high]
    assert all(bound.dtype == torch.float32 and bound.shape == (3,) for bound in bounds)


def test_no_clip():
    assert action_bounds(DECLARED, None) is None


@pytest.mark.parametrize(
    ("clip_actions", "low", "high"),
    [
        (100.0, [-1.0, -0.5, -100.0], [1.0, 2.0, 0.25]),
        (0.75, [-0.75, -0.5, -0.75], [0.75, 0.75, 0.25]),
        ((-math.inf, math.inf), [-1.0, -0.5, -math.inf], [1.0, 2.0, 0.25]),
        (([-2.0, 0.0, 0.0], 1.5), [-1.0, 0.0, 0.0], [1.0, 1.5, 0.25]),
    ],
)
def test_a_declared_space_is_never_widened(clip_actions, low, high):
    bounds = action_bounds(DECLARED, clip_actions)
    assert [bound.tolist() for bound in bounds] == [low, high]

    space = clipped_action_space(DECLARED, bounds)
    assert space == spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    assert (space.low >= DECLARED.low).all() and (space.high <= DECLARED.high).all()
    batched = gymnasium.vector.utils.batch_space(space, 5)
    assert batched.shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip_actions", [1.0, 0.1, math.inf])
def test_rounding_does_not_widen_a_float64_space(clip_actions, dtype):
    declared = spaces.Box(-0.1, 0.1, (2,), np.float64)  # float32(0.1) > 0.1
    bounds = action_bounds(declared, clip_actions)
    space = clipped_action_space(declared, bounds)
    executed = clip(torch.tensor([[-9.0, 9.0], [9.0, -9.0]], dtype=dtype), bounds)
    assert space.dtype == np.float64 and executed.dtype == dtype
    for action in executed.double().numpy():
        assert declared.contains(action) and space.contains(action)
        np.testing.assert_allclose(np.abs(action), 0.1, rtol=2 * max(torch.finfo(dtype).eps, 1e-7))


def test_an_action_that_cannot_move_keeps_its_space():
    declared = spaces.Box(0.1, 0.1, (1,), np.float64)
    bounds = action_bounds(declared, 1.0)
    assert bounds[0].item() == bounds[1].item() == pytest.approx(0.1)
    assert clipped_action_space(declared, bounds) == declared


def test_bounds_beyond_float32_stay_within_the_space():
    low, high = action_bounds(spaces.Box(-1e300, 1e300, (1,), np.float64), math.inf)
    assert high.item() == -low.item() == torch.finfo(torch.float32).max


def test_spaces_with_more_dimensions_are_flat_in_the_bounds():
    declared = spaces.Box(np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32), 5.0)
    bounds = action_bounds(declared, 2.5)
    assert bounds[0].tolist() == [-1.0, -2.0, -2.5, -2.5]
    assert clipped_action_space(declared, bounds).low.tolist() == [[-1.0, -2.0], [-2.5, -2.5]]


@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        (MjlabBox((2,)), [-3.0, -3.0], [3.0, 3.0]),
        (MjlabBox((2,), low=-1.0), [-1.0, -1.0], [3.0, 3.0]),
        (MjlabBox((2,), low=(-1.0, -5.0), high=(0.5, 0.25)), [-1.0, -3.0], [0.5, 0.25]),
        (MjlabBox((2,), low=-0.1, high=0.1), [float(np.float32(-0.1))] * 2, [float(np.float32(0.1))] * 2),
    ],
)
def test_spaces_of_mjlab(space, low, high):
    bounds = action_bounds(space, 3.0)
    assert [bound.tolist() for bound in bounds] == [low, high]


@pytest.mark.parametrize("clip_actions", [None, 1.0])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete([2] * 3),
        spaces.MultiBinary(3),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Dict({"a": UNBOUNDED}),
        MjlabBox((3,), dtype="int32"),
    ],
)
def test_spaces_that_are_not_of_real_numbers_are_refused(space, clip_actions):
    with pytest.raises(TypeError, match=r"action space is .* declare a Box of a float dtype"):
        action_bounds(space, clip_actions)


@pytest.mark.parametrize("clip_actions", [None, 1.0])
def test_a_space_without_dimensions_is_refused(clip_actions):
    with pytest.raises(ValueError, match="no dimension to act in"):
        action_bounds(spaces.Box(-1.0, 1.0, (0,)), clip_actions)


def test_what_was_declared_is_known_until_another_space_is():
    env = SimpleNamespace(single_action_space=DECLARED, num_envs=2)
    for clip_actions in (0.1, 0.7):
        cut = clipped_action_space(DECLARED, action_bounds(declared_action_space(env), clip_actions))
        put_action_space(env, declared_action_space(env), cut, batch_space)
        assert env.action_space == batch_space(cut, 2)
        assert declared_action_space(env) is DECLARED
    env.single_action_space = UNBOUNDED
    assert declared_action_space(env) is UNBOUNDED


@pytest.mark.parametrize(
    ("clip_actions", "error", "message"),
    [
        (-1.0, ValueError, "clip_actions must not be negative, got -1"),
        (math.nan, ValueError, "clip_actions: low is NaN"),
        ((1.0, -1.0), ValueError, "clip_actions has a low above its high at joint 0: 1 > -1"),
        (([0.0, 0.0, 2.0], 1.0), ValueError, "low above its high at joint 2: 2 > 1"),
        ((-1.0, [1.0, math.nan, 1.0]), ValueError, "clip_actions: high is NaN"),
        ((-1.0, [1.0, 1.0]), ValueError, r"clip_actions: high must be one number or 3, .* shape \[2\]"),
        (([[-1.0] * 3], 1.0), ValueError, r"clip_actions: low must be one number or 3, .* shape \[1, 3\]"),
        ([-1.0, -1.0, 1.0], ValueError, r"a pair \(low, high\), got 3 entries"),
        (torch.ones(3), ValueError, r"a pair \(low, high\), got 3 entries"),
        (("a", 1.0), TypeError, "clip_actions: low must be a number or one per joint, got 'a'"),
        ((-1.0, None), ValueError, "clip_actions: high is NaN"),
        ("1.0", TypeError, "clip_actions must be a number or a pair .* got str"),
        (True, TypeError, "got bool"),
        ({"low": -1.0}, TypeError, "got dict"),
    ],
)
def test_wrong_clips(clip_actions, error, message):
    with pytest.raises(error, match=message):
        action_bounds(UNBOUNDED, clip_actions)


def test_a_clip_beside_the_declared_space():
    with pytest.raises(ValueError, match=r"clip_actions=\(3, \(4, 5, 6\)\) does not meet .* \[-1, 1\] of joint 0"):
        action_bounds(DECLARED, (3, [4, 5, 6]))


def test_the_error_names_the_argument_of_the_caller():
    with pytest.raises(ValueError, match="action_bounds has a low above its high"):
        clip_range((1.0, 0.0), 2, name="action_bounds")


# --- clip -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clip_returns_a_new_tensor(dtype):
    actions = torch.tensor([[-9.0, 0.25, 9.0], [0.0, -9.0, -9.0]], dtype=dtype)
    before = actions.clone()
    clipped = clip(actions, action_bounds(DECLARED, (-2.0, 1.5)))
    assert clipped.tolist() == [[-1.0, 0.25, 0.25], [0.0, -0.5, -2.0]]
    assert clipped.dtype == dtype
    assert torch.equal(actions, before)
    assert clip(clipped, action_bounds(UNBOUNDED, 100.0)).data_ptr() != clipped.data_ptr()


def test_one_number_clips_as_torch_does():
    actions = torch.randn(64, 3) * 3
    assert torch.equal(clip(actions, action_bounds(UNBOUNDED, 0.1)), torch.clamp(actions, -0.1, 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clip_does_not_round_out_of_the_bounds(dtype):
    values = torch.linspace(-3.0, 3.0, 1001)
    bounds = (values, values + 1e-2 + values.abs() / 50)
    sides = (clip(torch.full((1, 1001), far, dtype=dtype), bounds)[0] for far in (-math.inf, math.inf))
    for side in sides:
        assert (side >= bounds[0]).all() and (side <= bounds[1]).all()
    unbounded = (torch.tensor([-math.inf]), torch.tensor([math.inf]))
    assert clip(torch.tensor([[9.0]], dtype=dtype), unbounded).item() == 9.0


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (3,), (1, 4, 3)])
def test_clip_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"actions must have the shape \[E, 3\]"):
        clip(torch.zeros(shape), action_bounds(UNBOUNDED, 1.0))


# --- observations -----------------------------------------------------------------------------------------------------


def returned_groups(num_envs: int = 4) -> TensorDict:
    groups = {
        "policy": torch.zeros(num_envs, 5),
        "critic": torch.zeros(num_envs, 7, dtype=torch.bfloat16),
        "image": torch.zeros(num_envs, 3, 8, 9, dtype=torch.uint8),
        "contact": torch.zeros(num_envs, 2, dtype=torch.bool),
        "terms": {"height": torch.zeros(num_envs, 1, dtype=torch.float64), "count": torch.zeros(num_envs, 1).long()},
    }
    return TensorDict(groups, batch_size=[num_envs])


def test_spaces_match_the_returned_groups():
    obs = returned_groups()
    single = single_observation_space(obs)
    assert list(single) == sorted(obs.keys())
    assert {name: space.shape for name, space in single.items() if name != "terms"} == {
        "policy": (5,),
        "critic": (7,),
        "image": (3, 8, 9),
        "contact": (2,),
    }
    assert single["terms"]["height"] == spaces.Box(-np.inf, np.inf, (1,), np.float64)
    assert single["image"] == spaces.Box(0, 255, (3, 8, 9), np.uint8)
    assert single["terms"]["count"].dtype == np.int64

    arrays = {name: obs[name].float().numpy() if name == "critic" else obs[name].numpy() for name in obs.keys()}  # noqa: SIM118
    arrays["terms"] = {name: value.numpy() for name, value in obs["terms"].items()}
    assert batch_space(single, 4).contains(arrays)


def test_declared_bounds_are_kept_where_they_fit():
    declared = spaces.Dict(
        {
            "policy": spaces.Box(-1.0, 1.0, (5,)),
            "critic": spaces.Box(-1.0, 1.0, (6,)),  # wrong shape
            "image": spaces.Box(0.0, 1.0, (3, 8, 9), np.float32),  # wrong dtype
            "gone": spaces.Box(-1.0, 1.0, (2,)),
        }
    )
    single = single_observation_space(returned_groups(), declared)
    assert single["policy"] == declared["policy"]
    assert single["critic"] == spaces.Box(-np.inf, np.inf, (7,))
    assert single["image"] == spaces.Box(0, 255, (3, 8, 9), np.uint8)
    assert "gone" not in single.spaces
    assert single_observation_space({"policy": torch.zeros(4, 5)}, spaces.Box(-1.0, 1.0, (5,)))["policy"].shape == (5,)


def test_obs_groups_that_are_there():
    check_obs_groups({"actor": ["policy"], "critic": ["policy", "critic"], "rnd_state": ()}, returned_groups())


@pytest.mark.parametrize(
    ("obs_groups", "error", "message"),
    [
        (
            {"actor": ["policy"], "critic": ["policy", "privileged", "map"]},
            ValueError,
            r"obs_groups\['critic'\] names 'privileged', 'map', which .* available: 'policy', 'critic', 'image'",
        ),
        ({"actor": "policy"}, TypeError, r"obs_groups\['actor'\] must be a list of names, got 'policy'"),
        ({"actor": 3}, TypeError, "must be a list of names, got 3"),
        (["policy"], TypeError, "obs_groups must map a set to its groups, got list"),
    ],
)
def test_wrong_obs_groups(obs_groups, error, message):
    with pytest.raises(error, match=message):
        check_obs_groups(obs_groups, returned_groups())


def test_what_may_be_state() -> None:
    assert is_state(torch.zeros(2**20), 7)
    assert not is_state(torch.zeros(2**20 + 1), 7)
    assert is_state(torch.zeros(2**20, 7), 7)


def test_names_that_are_near() -> None:
    names = ["Isaac-Cartpole-Direct", "Isaac-Ant", "Mjlab-Go1"]
    assert near_matches("isaac-cartpole-direkt", names) == "; near it: Isaac-Cartpole-Direct"
    assert near_matches("Hopper", names) == ""


def test_options_that_are_not_used_are_taken_out() -> None:
    """And no others, whatever their value is."""
    rnn = {"rnn_type": "lstm", "rnn_hidden_dim": 256, "rnn_num_layers": 1}
    critic = {**rnn, "rnn_type": None, "cnn_cfg": None, "distribution_cfg": None, "activation": None}
    config = {"actor": {**rnn, "cnn_cfg": {}}, "critic": critic, "seed": None}
    assert without_absent_options(config) == {
        "actor": {**rnn, "cnn_cfg": {}},
        "critic": {"activation": None},
        "seed": None,
    }
    by_default = {"actor": {"class_name": "RNNModel", "rnn_hidden_dim": 64}}
    assert without_absent_options(copy.deepcopy(by_default)) == by_default
