"""Make a task of Gymnasium from its name, or say in one sentence why not."""

from __future__ import annotations

import sys

import gymnasium
import mujoco

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
    try:
        return GymnasiumVecEnv(settings.env, settings.num_envs, device=settings.device, seed=settings.seed)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{settings.env} needs a package that is missing: {error}") from error
    except gymnasium.error.Error as error:
        raise UserError(
            f"there is no Gymnasium task {settings.env!r}{near_matches(settings.env, gymnasium.registry)}."
        ) from error
    except (ImportError, ValueError) as error:
        raise UserError(f"{settings.env} cannot be trained: {error}") from error


def vector_groups(env: GymnasiumVecEnv) -> list[str]:
    """Names of the observation groups, all of which actor and critic read.

    Raises:
        UserError: One of them is an image.
    """
    obs = env.get_observations()
    images = [name for name, values in obs.items() if values.dim() != 2]
    if images:
        raise UserError(
            f"the observation {images[0]!r} is an image, and this command trains MLPs; use rsl_rl's OnPolicyRunner with"
            " a CNNModel and pyfast_ppo.gymnasium:GymnasiumVecEnv."
        )
    return list(map(str, obs.keys()))


class _WarnOnce:
    """Shows each of MuJoCo's warnings once, where MuJoCo would repeat it for every environment and log it to a file."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, message: str) -> None:
        # Gymnasium's own models use deprecated attributes; that is not the user's to mend
        if message not in self._seen and "deprecated" not in message:
            self._seen.add(message)
            print(f"mujoco: {message}", file=sys.stderr)
