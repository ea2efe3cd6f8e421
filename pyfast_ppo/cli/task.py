"""What is trained: environments, the configuration of rsl_rl's runner, and what is known of the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rsl_rl.env import VecEnv

from pyfast_ppo.cli.simulators import make_simulated
from pyfast_ppo.cli.train_config import ALGORITHMS, Settings, train_config


@dataclass(frozen=True)
class Task:
    """A task that can be trained."""

    env: VecEnv
    config: dict  # of OnPolicyRunner
    threshold: float | None  # mean reward from which on it counts as solved
    reseed: Callable[[int], object]  # begins anew with other random numbers
    divergence: tuple[type[Exception], ...]  # what is raised where numbers are not finite any more
    random_first_lengths: (
        bool  # episodes of the first iterations end at different times, as simulators' scripts have it
    )

    def close(self) -> None:
        """Close the environments."""
        self.env.close()


def make_task(settings: Settings) -> Task:
    """Make the task of a run.

    Raises:
        UserError: There is no such task, or it cannot be trained.
    """
    from pyfast_ppo.rsl_rl import NonFiniteError

    if settings.simulated:
        env, config = make_simulated(settings.env, settings.num_envs, settings.device, settings.seed)
        config["algorithm"]["class_name"] = ALGORITHMS[settings.algorithm]
        config["logger"] = "tensorboard"  # the command leaves its files in the run's directory, and only there
        random_first_lengths = config.get("init_at_random_ep_len", True)  # Isaac Lab's config says it
        return Task(env, config, None, lambda seed: env.reset(), (NonFiniteError,), random_first_lengths)
    from pyfast_ppo.cli.environment import make_env, vector_groups
    from pyfast_ppo.gymnasium import NonFiniteActionError

    env = make_env(settings)
    config = train_config(settings, vector_groups(env))
    spec = env.env.spec
    threshold = None if spec is None else spec.reward_threshold
    divergence = (NonFiniteActionError, NonFiniteError)
    return Task(env, config, threshold, lambda seed: env.reset(seed=seed), divergence, False)
