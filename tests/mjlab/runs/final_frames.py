"""Final observations against a world in which the episode goes on.

Two simulations take the same actions. In one of them environments 0 and 1 reach their time limit in the last step, in
the other only environment 1 does, so that what mjlab returns for environment 0 there is its true terminal frame.
"""

from __future__ import annotations

import sys
from copy import deepcopy

import torch
from common import CARTPOLE, RslRlVecEnvWrapper, StockWrapper, make_env, random_actions, report
from mjlab.envs import ManagerBasedRlEnvCfg

STEPS = 12


def edit(cfg: ManagerBasedRlEnvCfg) -> None:
    """No noise, which would differ; histories, delays of one step, and commands that change in each step."""
    for group in cfg.observations.values():
        group.enable_corruption = False
    if "twist" in cfg.commands:
        cfg.commands["twist"].rel_world_envs = 1.0  # turned from the world's frame into the robot's
        cfg.commands["twist"].rel_standing_envs = 0.0
        cfg.commands["twist"].rel_forward_envs = 0.0
    actor = cfg.observations["actor"]
    actor.terms = deepcopy(actor.terms)  # shared with the critic, whose frames shall not be delayed
    actor.history_length = 3
    for term in actor.terms.values():
        term.delay_min_lag = term.delay_max_lag = 1


def main() -> None:
    """Compare in the tasks of the command line."""
    result = {}
    for task in sys.argv[1:] or [CARTPOLE]:
        ours = RslRlVecEnvWrapper(make_env(task, edit=edit))
        other = StockWrapper(make_env(task, edit=edit))
        lengths = torch.zeros(ours.num_envs, dtype=torch.long)
        lengths[1] = ours.max_episode_length - STEPS
        other.episode_length_buf = lengths.clone()
        lengths[0] = lengths[1]
        ours.episode_length_buf = lengths
        with torch.inference_mode():
            for actions in random_actions(STEPS, ours):
                before = ours.get_observations().clone()
                obs, _, dones, extras = ours.step(actions)
                goes_on, _, other_dones, _ = other.step(actions)
        final = extras["final_obs"]
        names = sorted(final.keys())
        result[task] = {
            "dones": dones.tolist(),
            "other_dones": other_dones.tolist(),
            "groups": names,
            "is_terminal_frame": [torch.equal(final[name][0], goes_on[name][0]) for name in names],
            "is_next_episode": [torch.equal(final[name][0], obs[name][0]) for name in names],
            "is_frame_before": [torch.equal(final[name][0], before[name][0]) for name in names],
            "others_are_returned": [torch.equal(final[name][2:], obs[name][2:]) for name in names],
        }
    report(result)


if __name__ == "__main__":
    main()
