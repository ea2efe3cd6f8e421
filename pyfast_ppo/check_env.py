"""Look at a wrapped environment and a runner config for known faults, before hours of training.

docs/check_env.md explains each finding. rsl_rl, and the checks themselves, are imported when the check is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyfast_ppo._check_env.finding import Finding

if TYPE_CHECKING:
    from rsl_rl.env import VecEnv

__all__ = ["DEFAULT_STEPS", "Finding", "check_env"]

DEFAULT_STEPS = 32


def check_env(env: VecEnv, train_cfg: Any = None, *, steps: int = DEFAULT_STEPS) -> list[Finding]:
    """Step an environment with random actions and report each known fault; print nothing where all is well.

    The environment is reset at the end. Its own random generators and curricula have moved on by then; the random state
    of torch, NumPy and Python is as before, and so is ``train_cfg``. In the second half of the steps the check moves
    ``episode_length_buf`` to the limit now and then, so that it sees time-outs however long the episodes are.

    Args:
        env: A wrapped environment: of Isaac Lab, mjlab, ``pyfast_ppo.gymnasium.GymnasiumVecEnv``, or your own.
        train_cfg: The runner's config: a dict, a dataclass, or an object with ``to_dict()``. With it the check also
            looks at ``obs_groups``, and builds the algorithm to see whether the first mini-batch finds the policy that
            has acted.
        steps: Steps with actions from N(0, 1). A few more follow.

    Returns:
        The findings, each of which is also printed on a line of its own. ``str(finding)`` is that line.

    Raises:
        TypeError: ``env`` is no rsl_rl ``VecEnv``, or ``train_cfg`` no config.
        ValueError: ``steps`` is not positive.
    """
    findings = find_faults(env, train_cfg, steps)
    for finding in findings:
        print(finding)
    return findings


def find_faults(env: VecEnv, train_cfg: Any, steps: int) -> list[Finding]:
    """:func:`check_env` without its lines."""
    from pyfast_ppo._check_env.config import as_dict
    from pyfast_ppo._check_env.course import look_at

    _require_vec_env(env)
    cfg = as_dict(train_cfg)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return look_at(env, cfg, steps)


def _require_vec_env(env: Any) -> None:
    from rsl_rl.env import VecEnv

    if not isinstance(env, VecEnv):
        raise TypeError(
            f"env must be an rsl_rl VecEnv, but is {type(env).__name__}: wrap it in"
            " pyfast_ppo.gymnasium.GymnasiumVecEnv, in the RslRlVecEnvWrapper of pyfast_ppo.isaaclab or"
            " pyfast_ppo.mjlab, or derive your wrapper from rsl_rl.env.VecEnv."
        )
