"""Isaac Lab's own train command, with the wrapper and the algorithm from its command line."""

from __future__ import annotations

import contextlib
import sys
import tempfile

from cartpole import cartpole_usd, report

TASK = "Local-Cartpole-Direct"
seen: dict[str, object] = {}


def register() -> None:
    """The callback: a task whose assets need no network, and then the one that users name."""
    import gymnasium
    from isaaclab_rl.entrypoints.backends import play_rsl_rl
    from isaaclab_tasks.core.cartpole.cartpole_direct_env_cfg import CartpoleEnvCfg

    from pyfast_ppo.isaaclab import install_wrapper

    class LocalCfg(CartpoleEnvCfg):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.scene.cartpole.spawn.usd_path = cartpole_usd()
            self.scene.ground = None

    kwargs = dict(gymnasium.spec("Isaac-Cartpole-Direct").kwargs)
    gymnasium.register(
        id=TASK,
        entry_point=gymnasium.spec("Isaac-Cartpole-Direct").entry_point,
        disable_env_checker=True,
        kwargs=kwargs | {"env_cfg_entry_point": LocalCfg},
    )
    install_wrapper()
    seen["play"] = play_rsl_rl.RslRlVecEnvWrapper.__module__


def main() -> None:
    from isaaclab_rl.entrypoints.dispatch import run_train_cli
    from rsl_rl.runners import OnPolicyRunner

    construct = OnPolicyRunner.__init__

    def recorded(self: OnPolicyRunner, env: object, *args: object, **kwargs: object) -> None:
        construct(self, env, *args, **kwargs)
        seen["wrapper"] = f"{type(env).__module__}.{type(env).__name__}"
        seen["algorithm"] = f"{type(self.alg).__module__}.{type(self.alg).__name__}"
        seen["bounds"] = [bound.tolist() for bound in env.action_bounds]

    OnPolicyRunner.__init__ = recorded
    sys.modules["cli"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as logs, contextlib.chdir(logs):
        code = run_train_cli(
            [
                *("--rl_library", "rsl_rl", "--task", TASK, "--num_envs", "8", "--max_iterations", "2"),
                *("--device", "cpu", "agent.device=cpu"),
                *("--external_callback", "cli.register"),
                "agent.algorithm.class_name=pyfast_ppo.rsl_rl:FusedPPO",
                "agent.clip_actions=[-1.5,2.0]",
            ]
        )
    report({"code": code, **seen})


if __name__ == "__main__":
    main()
