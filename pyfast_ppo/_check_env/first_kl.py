"""One rollout as rsl_rl's runner does it: does the first mini-batch find the policy that has acted?"""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.utils import resolve_callable
from torch import Tensor

from pyfast_ppo._check_env.calls import EnvironmentRaised, call
from pyfast_ppo._check_env.finding import Finding
from pyfast_ppo._check_env.groups import changed
from pyfast_ppo.rsl_rl import FusedPPO
from pyfast_ppo.rsl_rl.policy import NORMALIZES_IN_UPDATE

_FIRST_KL = 1e-8
"""Nats. float32 gives 1e-12 or less between acting and updating, bfloat16 1e-7 or more."""


def first_kl(env: VecEnv, cfg: dict, steps: int) -> Finding | None:
    """Takes at most ``steps`` steps, two at least. ``cfg`` is changed."""
    try:
        num_steps = cfg["num_steps_per_env"] = min(cfg["num_steps_per_env"], max(steps, 2))
        obs = call(env, "get_observations")
        alg = _algorithm(env, cfg, obs)
        if getattr(alg.storage, "training_type", None) != "rl":
            return None
        return _compare_policies(alg, _moved_in_rollout(env, alg, obs, num_steps))
    except EnvironmentRaised:
        raise
    except Exception as error:  # anything may be wrong with a config
        return Finding(
            "train-config",
            f"train_cfg gives no algorithm that runs on this environment: {type(error).__name__}: {error}",
            "correct what the error names; OnPolicyRunner has to take the same dict (in Isaac Lab, after"
            " handle_deprecated_rsl_rl_cfg).",
        )


def _algorithm(env: VecEnv, cfg: dict, obs: Any) -> Any:
    cfg["multi_gpu"] = None
    cfg["torch_compile_mode"] = None  # it would take a minute, and changes no number that matters here
    # rsl_rl prints its networks and warns of what the check of obs_groups has looked at
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve_callable(cfg["algorithm"]["class_name"]).construct_algorithm(obs, env, cfg, str(env.device))


def _moved_in_rollout(env: VecEnv, alg: Any, obs: Any, num_steps: int) -> list[str]:
    """Collect a rollout. Returns the buffers of the actor that are not as they were before."""
    alg.train_mode()
    before = {name: values.clone() for name, values in alg.actor.named_buffers()}
    for _ in range(num_steps):
        obs, rewards, dones, extras = call(env, "step", alg.act(obs))
        alg.process_env_step(obs, rewards, dones, extras)
    return changed(dict(alg.actor.named_buffers()), before)


def _compare_policies(alg: Any, moved: list[str]) -> Finding | None:
    """``moved``: buffers of the actor that have changed during the rollout."""
    storage = alg.storage
    recurrent = alg.actor.is_recurrent or alg.critic.is_recurrent
    generate = storage.recurrent_mini_batch_generator if recurrent else storage.mini_batch_generator
    batch = next(iter(generate(min(alg.num_mini_batches, storage.num_envs), 1)))
    mixed = bool(getattr(alg, "use_mixed_precision", False))
    kl, rounding = _kl_to_stored(alg, batch, mixed)
    if kl <= rounding:
        return None
    is_note = False
    if moved:
        is_note = not NORMALIZES_IN_UPDATE
        if is_note and isinstance(alg, FusedPPO):  # its learning rate waits for the first step
            return None
        cause = f"{', '.join(sorted({name.partition('.')[0] for name in moved}))} moved while the rollout was collected"
        mend = (
            "update normalizers once per iteration, after the update, as rsl_rl 5.5 does; rsl_rl 5.4 does it in each"
            " step, where FusedPPO leaves its learning rate alone until the first step of the optimizer."
        )
    elif _is_random(alg, batch):
        cause = "the actor gives another output each time (dropout?)"
        mend = "take what is random out of the actor."
    elif mixed and _kl_to_stored(alg, batch, False)[0] <= rounding:
        is_note = True
        cause = "the update runs in mixed precision, the rollout does not"
        mend = (
            "none is needed with FusedPPO; rsl_rl's PPO takes this KL for a reason to raise the learning rate, so set"
            " use_mixed_precision=False there."
        )
    else:
        cause = "the actor is not the one that has acted, or not on these observations"
        mend = "find what differs between the observations, or the network, at acting and at updating."
    return Finding(
        "first-kl",
        f"before any step was taken, the policy of the first mini-batch is {kl:.1e} nats from the one that has acted,"
        f" where rounding would be {rounding:.0e}: {cause}.",
        mend,
        is_note,
    )


def _is_random(alg: Any, batch: Any) -> bool:
    means = []
    for _ in range(2):
        _act_as_in_update(alg, batch, mixed=False)
        means.append(alg.actor.output_mean)
    first, second = means
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-5)  # GPUs do not always add in the same order


def _act_as_in_update(alg: Any, batch: Any, mixed: bool) -> Tensor:
    """Leaves its distribution in the actor, and returns the log-probabilities of the stored actions, float64."""
    with torch.autocast(device_type=torch.device(alg.device).type, dtype=torch.bfloat16, enabled=mixed):
        alg.actor(batch.observations, masks=batch.masks, hidden_state=batch.hidden_states[0], stochastic_output=True)
        return alg.actor.get_output_log_prob(batch.actions).double()


def _kl_to_stored(alg: Any, batch: Any, mixed: bool) -> tuple[float, float]:
    """Nats between the stored policy and the one that an update would see, and how many of them may be rounding."""
    log_prob = _act_as_in_update(alg, batch, mixed)
    old = tuple(values.double() for values in batch.old_distribution_params)
    new = tuple(values.double() for values in alg.actor.output_distribution_params)
    kl = float(alg.actor.get_kl_divergence(old, new).mean())
    # A stored log-probability that is not of the stored action, as from clipped actions
    log_ratio = log_prob.reshape(-1) - batch.old_actions_log_prob.double().reshape(-1)
    kl = max(kl, float(0.5 * log_ratio.square().mean()))
    mean, std = alg.actor.output_mean.double(), alg.actor.output_std.double()
    # Large observations that are not normalized give large means, which round more coarsely
    rounding = _FIRST_KL + float((0.5 * (1e-5 * mean / std).square()).sum(-1).mean())
    return kl, rounding
