"""The same actions in mjlab's wrapper and in ours: what differs, bit by bit, in all that there is to see.

Observations have noise, a noise model with a bias, random delays and histories. The state of the simulation, of the
random numbers and of the commands is compared, too, and what recorders are told.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import CARTPOLE, RslRlVecEnvWrapper, StockWrapper, make_env, random_actions, report
from mjlab.envs import ManagerBasedRlEnvCfg
from mjlab.managers.recorder_manager import RecorderTerm, RecorderTermCfg
from mjlab.managers.termination_manager import TerminationTermCfg
from mjlab.utils.noise import NoiseModelWithAdditiveBiasCfg, UniformNoiseCfg

STEPS = 30
LIMIT = 9  # steps
STATE = ("qpos", "qvel", "act", "ctrl", "qacc_warmstart", "xpos", "sensordata")


class Recorder(RecorderTerm):
    """Keeps what it is told, and when."""

    def __init__(self, cfg: RecorderTermCfg, env: Any) -> None:
        super().__init__(cfg, env)
        self.seen: list[dict[str, torch.Tensor]] = []

    def _keep(self, rows: torch.Tensor | None = None) -> None:
        self.seen.append(
            {
                "rows": torch.zeros(0) if rows is None else rows.clone(),
                "obs": self._env.obs_buf["actor"].clone(),
                "action": self._env.action_manager.action.clone(),
                "length": self._env.episode_length_buf.clone(),
            }
        )

    def record_pre_reset(self, env_ids: torch.Tensor) -> None:
        self._keep(env_ids)

    def record_post_reset(self, env_ids: torch.Tensor) -> None:
        self._keep(env_ids)

    def record_post_step(self) -> None:
        self._keep()


def at_set_lengths(env: Any) -> torch.Tensor:
    """Terminates environments 0, 3 and 4 after 6 steps, and environment 1 in the step of its time-out, bool [E]."""
    return env.episode_length_buf == torch.tensor([6, LIMIT, -1, 6, 6, -1])


def edit(cfg: ManagerBasedRlEnvCfg) -> None:
    """Short episodes with many ends, and every kind of state that observations can have."""
    cfg.episode_length_s = LIMIT * cfg.decimation * cfg.sim.mujoco.timestep
    cfg.terminations["at_set_lengths"] = TerminationTermCfg(func=at_set_lengths)
    cfg.recorders["recorder"] = RecorderTermCfg(func=Recorder)
    if "twist" in cfg.commands:
        cfg.commands["twist"].resampling_time_range = (0.04, 0.2)
    actor = cfg.observations["actor"]
    actor.history_length = 3
    for term in actor.terms.values():
        term.delay_max_lag = 2
        term.delay_update_period = 3
        term.delay_hold_prob = 0.2
    term.noise = NoiseModelWithAdditiveBiasCfg(
        noise_cfg=UniformNoiseCfg(n_min=-0.1, n_max=0.1), bias_noise_cfg=UniformNoiseCfg(n_min=-0.1, n_max=0.1)
    )


def roll(env: StockWrapper) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What can be seen in each step, and the extras."""
    base = env.unwrapped
    env.episode_length_buf = torch.arange(env.num_envs) % 4
    frames, all_extras = [], []
    with torch.inference_mode():
        for actions in random_actions(STEPS, env):
            obs, rewards, dones, extras = env.step(actions)
            commands = base.command_manager
            frames.append(
                {
                    "obs": obs.clone().to_dict(),
                    "rewards": rewards.clone(),
                    "dones": dones.clone(),
                    "log": dict(extras["log"]),
                    "lengths": env.episode_length_buf.clone(),
                    "state": {name: torch.from_numpy(getattr(base.sim.wp_data, name).numpy().copy()) for name in STATE},
                    "commands": {name: commands.get_command(name).clone() for name in commands.active_terms},
                    "random": torch.get_rng_state(),
                }
            )
            all_extras.append({name: value.clone() for name, value in extras.items() if name != "log"})
    recorder = base.recorder_manager.get_term("recorder")
    frames.append({"recorded": {str(index): seen for index, seen in enumerate(recorder.seen)}})
    return frames, all_extras


def differences(stock: Any, ours: Any, path: str) -> list[str]:
    """Where the two differ."""
    if isinstance(stock, dict):
        if list(stock) != list(ours):
            return [f"{path}: keys {list(stock)} and {list(ours)}"]
        return [line for key in stock for line in differences(stock[key], ours[key], f"{path}/{key}")]
    return [] if torch.equal(torch.as_tensor(stock), torch.as_tensor(ours)) else [path]


def main() -> None:
    """Compare in the tasks of the command line."""
    result = {}
    for task in sys.argv[1:] or [CARTPOLE]:
        stock, stock_extras = roll(StockWrapper(make_env(task, edit=edit)))
        ours, extras = roll(RslRlVecEnvWrapper(make_env(task, edit=edit)))
        result[task] = {
            "differences": [
                line
                for step, pair in enumerate(zip(stock, ours, strict=True))
                for line in differences(*pair, str(step))
            ],
            "dones": [frame["dones"].tolist() for frame in ours[:-1]],
            "terminated": [extra["terminated"].tolist() for extra in extras],
            "time_outs": [extra["time_outs"].tolist() for extra in extras],
            "stock_time_outs": [extra["time_outs"].tolist() for extra in stock_extras],
            "has_final_obs": ["final_obs" in extra for extra in extras],
            "log_keys": [len(frame["log"]) for frame in ours[:-1]],
            "recorded": len(ours[-1]["recorded"]),
        }
    report(result)


if __name__ == "__main__":
    main()
