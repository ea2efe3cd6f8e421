"""What the wrappers of simulators share: the clip of actions, observation spaces, checks of ``obs_groups``, tasks.

``E`` environments, ``A`` action dimensions. Nothing here starts a simulator, and Gymnasium is imported only where a
space is built: mjlab has spaces of its own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeGuard

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import gymnasium
    from tensordict import TensorDict

Bounds = tuple[Tensor, Tensor]
"""Lowest and highest action that is executed, float32 ``[A]`` each."""

Limit = float | Sequence[float] | np.ndarray | Tensor
"""One number for all joints, or one per joint ``[A]``."""

ClipActions = float | tuple[Limit, Limit] | None
"""``None``: no clip; ``c``: to [-c, c]; ``(low, high)``: each one number or one per joint."""


# --- actions ----------------------------------------------------------------------------------------------------------


def action_bounds(space: Any, clip_actions: ClipActions, device: torch.device | str = "cpu") -> Bounds | None:
    """The range that actions are clipped to on their way into the environment.

    It is the intersection of ``clip_actions`` and the declared space: a clip never widens what the environment allows,
    nor does the rounding to float32.

    Args:
        space: The action space of one environment: a float ``Box`` of Gymnasium or mjlab with A elements.
        clip_actions: ``None``: no clip. A number c: [-c, c]. A pair (low, high): each a number or one per joint
            (sequence, array or tensor of length A); infinite where a side has no limit.
        device: Where the bounds live.

    Returns:
        (low, high), float32 ``[A]``; None without a clip.

    Raises:
        TypeError: ``space`` is not a float Box, or ``clip_actions`` neither a number nor a pair of them.
        ValueError: ``clip_actions`` has the wrong length, is NaN, has a low above its high, or does not meet the space;
            ``space`` has no dimension.
    """
    declared_low, declared_high = _declared_range(space)  # float64 [A]
    if clip_actions is None:
        return None
    low, high = clip_range(clip_actions, len(declared_low))  # float64 [A]
    low, high = np.maximum(low, declared_low), np.minimum(high, declared_high)
    if (low > high).any():
        joint = int(np.argmax(low > high))
        raise ValueError(
            f"clip_actions={clip_shown(clip_actions)} does not meet the declared action space"
            f" [{declared_low[joint]:g}, {declared_high[joint]:g}] of joint {joint}; choose a range that overlaps it."
        )
    with np.errstate(over="ignore"):  # to infinity, which is beyond the space again
        low, high = low.astype(np.float32), high.astype(np.float32)
    # the clip is rounded as torch.clamp rounds it, but not out of a float64 space
    low = np.where(low < declared_low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > declared_high, np.nextafter(high, np.float32(-np.inf)), high)
    low = np.minimum(low, high)  # a space so narrow that it holds no float32 number
    return torch.tensor(low, device=device), torch.tensor(high, device=device)


def clip_range(
    clip_actions: float | tuple[Limit, Limit], num_actions: int, name: str = "clip_actions"
) -> tuple[np.ndarray, np.ndarray]:
    """A clip as (low, high), float64 ``[A]`` each.

    Args:
        clip_actions: As in :func:`action_bounds`, but not None.
        num_actions: Number of action dimensions, A.
        name: What an error calls the argument.

    Raises:
        TypeError, ValueError: As in :func:`action_bounds`.
    """
    if _is_number(clip_actions):
        value = float(clip_actions)
        if value < 0.0:
            raise ValueError(f"{name} must not be negative, got {value:g}: it stands for [-c, c].")
        sides: tuple[Limit, ...] = (-value, value)
    elif isinstance(clip_actions, Sequence | np.ndarray | Tensor) and not isinstance(clip_actions, str):
        sides = tuple(clip_actions)
        if len(sides) != 2:
            raise ValueError(
                f"{name} must be a number or a pair (low, high), got {len(sides)} entries; for one range per joint"
                " give (lows, highs)."
            )
    else:
        raise TypeError(f"{name} must be a number or a pair (low, high), got {type(clip_actions).__name__}.")
    low, high = (_limit(side, f"{name}: {end}", num_actions) for side, end in zip(sides, ("low", "high"), strict=True))
    if (low > high).any():
        joint = int(np.argmax(low > high))
        raise ValueError(
            f"{name} has a low above its high at joint {joint}: {low[joint]:g} > {high[joint]:g}; the pair is"
            " (low, high)."
        )
    return low, high


def clip(actions: Tensor, bounds: Bounds) -> Tensor:
    """A clipped copy of ``actions``, ``[E, A]``, of the same dtype, also in which it is within the bounds.

    ``bounds`` come from :func:`action_bounds`.
    """
    low, high = bounds
    if actions.dim() != 2 or actions.shape[1] != len(low):  # bounds would broadcast [E, 1] to [E, A] without a word
        raise ValueError(f"actions must have the shape [E, {len(low)}], but have {list(actions.shape)}.")
    if actions.dtype in (torch.float16, torch.bfloat16):
        eps = torch.finfo(actions.dtype).eps  # rounding moves a number by at most half of it, relatively
        low = torch.where(low.to(actions.dtype) < low, low + eps * low.abs(), low)
        high = torch.where(high.to(actions.dtype) > high, high - eps * high.abs(), high)
    return torch.clamp(actions, low.to(actions.dtype), high.to(actions.dtype))


def clipped_action_space(space: gymnasium.spaces.Box, bounds: Bounds) -> gymnasium.spaces.Box:
    """``space`` (a Box of Gymnasium, for one environment), cut to ``bounds``."""
    from gymnasium.spaces import Box

    low, high = (bound.cpu().numpy().reshape(space.shape).astype(space.dtype) for bound in bounds)
    # both lie outside a float64 space that holds no float32 number
    return Box(np.clip(low, space.low, space.high), np.clip(high, space.low, space.high), dtype=space.dtype)


_CUT = "_pyfast_ppo_cut_action_space"


def declared_action_space(env: Any) -> Any:
    """The action space of one environment as it was declared, before a wrapper of ours cut it to an earlier clip."""
    declared, cut = getattr(env, _CUT, (None, None))
    return env.single_action_space if cut is None or cut is not env.single_action_space else declared


def put_action_space(env: Any, declared: Any, cut: Any, batch_space: Callable[[Any, int], Any]) -> None:
    """Let the environment declare ``cut``, and know what it declared."""
    if cut is not env.single_action_space:
        env.single_action_space = cut
        env.action_space = batch_space(cut, env.num_envs)
        setattr(env, _CUT, (declared, cut))


def _declared_range(space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action that the space allows, float64 ``[A]``."""
    is_box = all(hasattr(space, name) for name in ("low", "high", "shape", "dtype"))
    if not is_box or not np.issubdtype(np.dtype(space.dtype), np.floating):
        raise TypeError(
            f"the action space is {space}, but PPO acts with real numbers: declare a Box of a float dtype, and turn"
            " the numbers into the environment's own actions inside of it."
        )
    shape = tuple(space.shape)
    if 0 in shape:
        raise ValueError(f"the action space is {space}, which has no dimension to act in.")
    # mjlab's are Python's numbers: 0.1 in a float32 space means the float32 number
    sides = (np.asarray(side, space.dtype).astype(np.float64) for side in (space.low, space.high))
    low, high = (np.broadcast_to(side, shape).reshape(-1) for side in sides)
    return low, high


def _limit(side: Any, name: str, num_actions: int) -> np.ndarray:
    """One side of the clip, float64 ``[A]``."""
    try:
        values = np.asarray(side.detach().cpu() if isinstance(side, Tensor) else side, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or one per joint, got {side!r}.") from None
    if values.ndim > 1 or (values.ndim == 1 and len(values) != num_actions):
        raise ValueError(
            f"{name} must be one number or {num_actions}, one per joint, but has the shape {list(values.shape)}."
        )
    if np.isnan(values).any():
        raise ValueError(f"{name} is NaN; use an infinite number where there is no limit.")
    return np.broadcast_to(values, (num_actions,))


def _is_number(value: Any) -> TypeGuard[SupportsFloat]:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def clip_shown(clip_actions: ClipActions | Limit) -> str:
    """``clip_actions`` in a message, on one line: tensors as lists."""
    if isinstance(clip_actions, Tensor | np.ndarray):
        return str(clip_actions.tolist())
    if isinstance(clip_actions, Sequence):
        return f"({', '.join(clip_shown(side) for side in clip_actions)})"
    return str(clip_actions)


# --- observations -----------------------------------------------------------------------------------------------------


def single_observation_space(
    obs: TensorDict | Mapping[str, Any], declared: gymnasium.Space | None = None
) -> gymnasium.spaces.Dict:
    """The space of one environment that matches observations as they were returned.

    Args:
        obs: Groups ``[E, ...]``; a group may be a dict of tensors again.
        declared: The space that the environment declares for one environment. A group keeps its space from here, with
            its bounds, where shape and dtype agree.
    """
    from gymnasium.spaces import Dict

    known = declared.spaces if isinstance(declared, Dict) else {}
    return Dict({name: _group_space(group, known.get(name)) for name, group in obs.items()})


def check_obs_groups(obs_groups: Mapping[str, Iterable[str]], obs: TensorDict | Mapping[str, Any]) -> None:
    """Check that the groups which a runner config names are among those that the environment returns.

    Args:
        obs_groups: As in a runner config: ``{"actor": ["policy"], "critic": ["policy", "privileged"]}``.
        obs: Observations of the environment.

    Raises:
        TypeError: ``obs_groups`` is not a mapping to lists of names.
        ValueError: A group is not returned.
    """
    if not isinstance(obs_groups, Mapping):
        raise TypeError(f"obs_groups must map a set to its groups, got {type(obs_groups).__name__}.")
    available = list(obs.keys())
    for obs_set, groups in obs_groups.items():
        if isinstance(groups, str) or not isinstance(groups, Iterable):
            raise TypeError(f"obs_groups[{obs_set!r}] must be a list of names, got {groups!r}.")
        missing = [group for group in groups if group not in available]
        if missing:
            raise ValueError(
                f"obs_groups[{obs_set!r}] names {', '.join(map(repr, missing))}, which the environment does not return;"
                f" available: {', '.join(map(repr, available))}."
            )


def _group_space(group: Any, declared: Any) -> gymnasium.Space:
    from gymnasium.spaces import Box

    if not isinstance(group, Tensor):
        return single_observation_space(group, declared)
    shape, dtype = tuple(group.shape[1:]), _numpy_dtype(group.dtype)
    if isinstance(declared, Box) and declared.shape == shape and declared.dtype == dtype:
        return declared
    limits: tuple[float, float] = (-np.inf, np.inf)
    if dtype == np.bool_:
        limits = (0, 1)
    elif np.issubdtype(dtype, np.integer):
        limits = (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return Box(*limits, shape, dtype)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    # NumPy has no bfloat16
    return np.dtype(np.float32) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype


# --- state ------------------------------------------------------------------------------------------------------------

_LARGEST_STATE = 2**20


def is_state(value: Tensor | np.ndarray, num_envs: int) -> bool:
    """Whether a tensor or array may change from step to step.

    One of more elements, and without a dimension of size E, is taken for data: a motion library, a terrain. A buffer of
    that kind (``[4 * E, 65536]``) that does change is missed.
    """
    return math.prod(value.shape) <= _LARGEST_STATE or num_envs in value.shape


# --- tasks ------------------------------------------------------------------------------------------------------------


def near_matches(name: str, names: Iterable[str]) -> str:
    """The end of a message that a task is not there: those with a name like it, in whatever case; or nothing."""
    by_lower_case = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0.6)
    return f"; near it: {', '.join(by_lower_case[found] for found in near)}" if near else ""


def without_absent_options(config: dict[str, Any]) -> dict[str, Any]:
    """A runner config of mjlab without the options of other kinds of networks. It is changed.

    mjlab's dataclass has them all; its runner takes these out, rsl_rl's own would hand them to a network.
    """
    for network in (config[name] for name in ("actor", "critic") if isinstance(config.get(name), dict)):
        absent = [option for option in ("cnn_cfg", "distribution_cfg") if network.get(option) is None]
        if "rnn_type" in network and network["rnn_type"] is None:  # else the sizes are those of rsl_rl's RNNModel
            absent += ["rnn_type", "rnn_hidden_dim", "rnn_num_layers"]
        for option in absent:
            network.pop(option, None)
    return config
