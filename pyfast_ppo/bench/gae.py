"""Generalised advantage estimation with normalisation: pyfast_ppo against rsl_rl's loop over the steps, and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import pyfast_ppo
from pyfast_ppo.bench import results, rivals
from pyfast_ppo.bench.counts import count
from pyfast_ppo.bench.harness import Contender, Options, able, copy_of, interleave, num_input_sets, size_of
from pyfast_ppo.bench.loss import gpu_backends
from pyfast_ppo.bench.stock import GAMMA, LAM, stock_gae

BASELINE, COMPILED, OURS = "rsl_rl", "torch.compile", "gae"
_CPU_SETS = 8


class Case(NamedTuple):
    """Steps T, environments E."""

    num_steps: int
    num_envs: int

    def __str__(self) -> str:
        return f"T = {self.num_steps}, E = {self.num_envs:,}"


class Rollout(NamedTuple):
    """As rsl_rl stores it."""

    rewards: Tensor  # [T, E, 1]
    values: Tensor  # [T, E, 1]
    dones: Tensor  # [T, E, 1], bytes
    last_values: Tensor  # [E, 1]


def cases(device: str, quick: bool) -> list[Case]:
    """Isaac Lab's, and a larger one. The quick one is Cartpole's: the compiler can take its work to the update."""
    return [Case(16, 4096)] if quick else [Case(24, 4096), Case(16, 4096), Case(64, 8192)]


def make_rollout(case: Case, seed: int, device: str) -> Rollout:
    """Random numbers; one step in fifty ends an episode."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, case.num_steps, case.num_envs, 1, generator=g)
    dones = (torch.rand(case.num_steps, case.num_envs, 1, generator=g) < 0.02).byte()
    last_values = torch.randn(case.num_envs, 1, generator=g)
    return Rollout(*(t.to(device) for t in (rewards, values, dones, last_values)))


def fused(
    rewards: Tensor, values: Tensor, dones: Tensor, last_values: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages, normalised, and returns."""
    return pyfast_ppo.gae(rewards, values, dones, last_values, GAMMA, LAM, normalize=True, backend=backend)


def measure(case: Case, options: Options) -> list[dict]:
    """One row."""
    first = make_rollout(case, 0, options.device)
    moved = size_of(*first, first.rewards, first.rewards)  # the last two are written
    num_sets = num_input_sets(moved, options.device, on_cpu=_CPU_SETS)
    rollouts = [first, *(make_rollout(case, seed, options.device) for seed in range(1, num_sets))]
    for ours, stock in zip(fused(*first), stock_gae(*first), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    others = rivals.gaes(rollouts)
    kept, skipped = able(contenders(rollouts, options, others.calls))
    timings = interleave(kept | {"floor": copy_of(moved, num_sets, options.device)}, num_sets, options)
    floor = timings.pop("floor")
    counts = {name: count(partial(c.call, 0), options.device) for name, c in kept.items() if not c.captured}
    described = {"T": case.num_steps, "E": case.num_envs}
    return [
        results.make_row(
            described,
            BASELINE,
            [name for name in timings if name.startswith(OURS)],
            timings,
            counts=counts,
            skipped=others.skipped | skipped,
            moved=moved,
            floor=floor,
        )
    ]


def contenders(
    rollouts: list[Rollout], options: Options, others: dict[str, Callable[[int], object]]
) -> dict[str, Contender]:
    """By name."""

    def with_rollout(function: Callable[..., object], **arguments: object) -> Callable[[int], object]:
        return lambda i: function(*rollouts[i % len(rollouts)], **arguments)

    found = {BASELINE: Contender(with_rollout(stock_gae), optional=False)}
    compiled = with_rollout(torch.compile(stock_gae, dynamic=False))
    found[COMPILED] = Contender(compiled)
    if options.device == "cuda":
        found[f"{COMPILED}, CUDA graph"] = Contender(compiled, captured=True)
    found |= {name: Contender(call) for name, call in others.items()}
    found[OURS] = Contender(with_rollout(fused), optional=False)
    if options.device == "cuda":
        for name in gpu_backends():
            found[f"{OURS}, CUDA graph, {name}"] = Contender(with_rollout(fused, backend=name), captured=True)
    return found
