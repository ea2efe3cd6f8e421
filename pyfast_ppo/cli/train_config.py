"""Settings of a training run, and the rsl_rl configuration made from them."""

from __future__ import annotations

from dataclasses import dataclass, fields

ALGORITHMS = {"fused": "pyfast_ppo.rsl_rl:FusedPPO", "stock": "PPO"}
"""Name on the command line to rsl_rl's ``class_name``."""

STEPS_PER_ENV = 128


@dataclass(frozen=True)
class Settings:
    """What the user chooses. The defaults solve the default task; others need more (see ``default_iterations``)."""

    env: str = "InvertedPendulum-v5"
    simulated: bool = False  # a task of Isaac Lab or mjlab, not of Gymnasium
    algorithm: str = "fused"
    iterations: int = 60
    num_envs: int = 32
    seed: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be: the settings may come from a file."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind:
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {self.algorithm!r}: it must be one of {', '.join(ALGORITHMS)}")
        for name, lowest in (("iterations", 1), ("num_envs", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")


def default_iterations(env: str) -> int:
    """The default task learns within seconds; the others get a million steps at the default number of environments."""
    return Settings.iterations if env == Settings.env else 250


def train_config(settings: Settings, obs_groups: list[str]) -> dict:
    """Make the configuration of rsl_rl's ``OnPolicyRunner``, for rsl_rl 5.4 and 5.5.

    Args:
        settings: The user's choice.
        obs_groups: Groups of the environment's observation that actor and critic read.
    """
    network = {
        "class_name": "MLPModel",
        "hidden_dims": [64, 64],
        "activation": "tanh",
        "obs_normalization": True,
    }
    return {
        "seed": settings.seed,
        "num_steps_per_env": STEPS_PER_ENV,
        "save_interval": 25,
        "obs_groups": {"actor": obs_groups, "critic": obs_groups},
        "actor": {**network, "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0}},
        "critic": network,
        "algorithm": {
            "class_name": ALGORITHMS[settings.algorithm],
            "num_learning_epochs": 10,
            "num_mini_batches": 4,
            "learning_rate": 1e-3,
            "schedule": "adaptive",
            "desired_kl": 0.01,
            "gamma": 0.99,
            "lam": 0.95,
            "clip_param": 0.2,
            "entropy_coef": 0.0,
            "value_loss_coef": 1.0,
            # MuJoCo returns reach the hundreds; clipped to steps of 0.2, the critic could not follow them
            "use_clipped_value_loss": False,
            "max_grad_norm": 1.0,
            "rnd_cfg": None,
        },
    }
