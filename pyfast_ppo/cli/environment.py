"""Make a task of Gymnasium from its name, or say in one sentence why not."""

from __future__ import annotations

import os
import sys

import gymnasium
import mujoco

from pyfast_ppo._check_env.groups import groups_of
from pyfast_ppo._check_env.observations import flat_images
from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.cli.train_config import Settings
from pyfast_ppo.gymnasium import GymnasiumVecEnv
from pyfast_ppo.vec_env import near_matches


def make_env(settings: Settings) -> GymnasiumVecEnv:
    """Make the environments of a run.

    Raises:
        UserError: There is no such task, it needs a package that is missing, or its spaces do not fit.
    """
    mujoco.set_mju_user_warning(_WarnOnce())
    module = settings.env.rpartition(":")[0]
    if module and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it
    known = dict(gymnasium.registry)
    try:
        return GymnasiumVecEnv(settings.env, settings.num_envs, device=settings.device, seed=settings.seed)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{settings.env} needs a package that is missing: {error}") from error
    except gymnasium.error.Error as error:
        # of a module, those that its import has just registered
        tasks = [f"{module}:{task}" for task in gymnasium.registry if task not in known] if module else known
        raise UserError(f"there is no Gymnasium task {settings.env!r}{near_matches(settings.env, tasks)}.") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"{settings.env} cannot be trained: {error}") from error


def vector_groups(env: GymnasiumVecEnv) -> list[str]:
    """Names of the observation groups, all of which actor and critic read.

    Raises:
        UserError: One of them is an image.
    """
    if found := images(env):
        raise UserError(
            f"the observation {found[0]!r} is an image, and this command trains MLPs; use rsl_rl's OnPolicyRunner with"
            " a CNNModel and pyfast_ppo.gymnasium:GymnasiumVecEnv, and put the image's channels first."
        )
    return list(map(str, env.get_observations().keys()))


def images(env: GymnasiumVecEnv) -> list[str]:
    """Names of the observation groups that are images, also of those that are handed out flat."""
    groups = groups_of(env.get_observations())
    flat = flat_images(env, groups)
    return [name for name, values in groups.items() if values.dim() != 2 or name in flat]


class _WarnOnce:
    """Shows each of MuJoCo's warnings once, where MuJoCo would repeat it for every environment and log it to a file."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, message: str) -> None:
        # Gymnasium's own models use deprecated attributes; that is not the user's to mend
        if message not in self._seen and "deprecated" not in message:
            self._seen.add(message)
            print(f"mujoco: {message}", file=sys.stderr)
