"""The runner's config: as a dict, and the finding about its ``obs_groups``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo.vec_env import without_absent_options


def as_dict(train_cfg: Any) -> dict | None:
    """A copy of the config as a dict, without what mjlab's runner takes out of it."""
    if train_cfg is None:
        return None
    if isinstance(train_cfg, Mapping):
        return without_absent_options(copy.deepcopy(dict(train_cfg)))
    if isinstance(train_cfg, type):
        raise TypeError(f"train_cfg must be a config, but is the class {train_cfg.__name__}: make one, with ().")
    if callable(getattr(train_cfg, "to_dict", None)):
        return without_absent_options(copy.deepcopy(train_cfg.to_dict()))
    if dataclasses.is_dataclass(type(train_cfg)):
        return without_absent_options(dataclasses.asdict(train_cfg))
    raise TypeError(
        f"train_cfg must be a dict, a dataclass or have to_dict(), but is {type(train_cfg).__name__}: give what"
        " OnPolicyRunner takes."
    )


def initial_std(cfg: dict | None) -> float:
    """Of an untrained policy; rsl_rl's default is 1."""
    distribution = ((cfg or {}).get("actor") or {}).get("distribution_cfg") or {}
    std = distribution.get("init_std", 1.0)
    return float(std) if isinstance(std, int | float) and std > 0.0 else 1.0


def groups_read(cfg: dict | None) -> set[str] | None:
    """The observation groups that a network reads; None: not known."""
    sets = (cfg or {}).get("obs_groups")
    if not isinstance(sets, Mapping):
        return None
    return {group for groups in sets.values() if not isinstance(groups, str) for group in groups or ()}


def obs_groups(cfg: dict | None, obs: Any) -> Finding | None:
    if cfg is None or "obs_groups" not in cfg:
        return None
    available = list(obs.keys())
    fault = _fault_of_obs_groups(cfg, available)
    if fault is None:
        return None
    return Finding("obs-groups", fault, f"name groups that the environment returns: {', '.join(map(str, available))}.")


def _fault_of_obs_groups(cfg: dict, available: list[str]) -> str | None:
    sets = cfg["obs_groups"]
    if not isinstance(sets, Mapping):
        return f"obs_groups is {sets!r}, not a mapping of sets to lists of groups."
    for obs_set, groups in sets.items():
        if isinstance(groups, str) or not groups:
            return f"obs_groups[{obs_set!r}] is {groups!r}, not a list of groups."
        unknown = [repr(group) for group in groups if group not in available]
        if unknown:
            return f"obs_groups[{obs_set!r}] names {', '.join(unknown)}, which the environment does not return."
    for obs_set in ("actor", "critic"):
        # rsl_rl takes the group of that name, then "policy"
        if obs_set in cfg and obs_set not in sets and obs_set not in available and "policy" not in available:
            return f"obs_groups does not say what the {obs_set} reads."
    return None
