"""The loss and all its gradients, from the networks' outputs on: pyfast_ppo, rsl_rl, and other libraries.

rsl_rl's ``torch_compile_mode`` compiles its networks and leaves the loss as it is, so there is no contender of that
name here; "torch.compile" is the same formula compiled, with the shapes known to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import pyfast_ppo
from pyfast_ppo import backends
from pyfast_ppo.bench import results, rivals
from pyfast_ppo.bench.counts import count
from pyfast_ppo.bench.harness import Contender, Options, able, copy_of, interleave, num_input_sets, size_of
from pyfast_ppo.bench.stock import COEFFICIENTS, MiniBatch, in_another_order, make_mini_batch, stock_loss

BASELINE, COMPILED, OURS, AUTOGRAD = "rsl_rl", "torch.compile", "ppo_loss_and_grad", "ppo_loss + backward"


class Case(NamedTuple):
    """``num_sets`` input sets in turn: one stays in the caches, as a mini-batch that was just gathered; four do not."""

    num_rows: int
    num_actions: int
    old_std_per_row: bool = True
    num_sets: int = 4

    def __str__(self) -> str:
        old_std = "[N, A]" if self.old_std_per_row else "[A]"
        return f"N = {self.num_rows:,}, A = {self.num_actions}, old_std {old_std}, input sets {self.num_sets}"


_MINI_BATCH, _ACTIONS = 24_576, 12  # Anymal's
_QUICK = [Case(4_096, 12), Case(_MINI_BATCH, 12), Case(_MINI_BATCH, 37)]


def cases(device: str, quick: bool) -> list[Case]:
    """N at 12 actions, A at 24,576 rows; then what the caches and a shared old_std make of it."""
    if quick:
        return _QUICK
    numbers = [1_024, 4_096, _MINI_BATCH, 98_304] + ([393_216, 1_048_576] if device == "cuda" else [])
    against_n = [Case(n, _ACTIONS) for n in numbers]
    against_a = [Case(_MINI_BATCH, a) for a in (1, 4, 19, 37, 64)]
    others = [Case(_MINI_BATCH, 12, False), Case(98_304, 29), Case(98_304, 29, False)]
    if device == "cuda":
        return against_n + against_a + others + [Case(1_048_576, 32), Case(1_048_576, 32, False)]
    return against_n + against_a + others + [Case(_MINI_BATCH, 12, True, 1), Case(_MINI_BATCH, 12, False, 1)]


def measure(case: Case, options: Options) -> list[dict]:
    """One row."""
    batches = _input_sets(case, options.device)
    check_agreement(batches[0])
    torch.compiler.reset()  # else the compiler takes a second shape for a reason to generalise
    others = rivals.losses(batches)
    kept, skipped = able(contenders(batches, options, others.calls))
    moved = size_of(*batches[0], *batches[0].leaves)
    timings = interleave(kept | {"floor": copy_of(moved, len(batches), options.device)}, len(batches), options)
    floor = timings.pop("floor")
    counts = {name: count(partial(c.call, 0), options.device) for name, c in kept.items() if not c.captured}
    described = {"N": case.num_rows, "A": case.num_actions, "old_std": "[N, A]" if case.old_std_per_row else "[A]"}
    described["input sets"] = len(batches)
    return [
        results.make_row(
            described,
            BASELINE,
            [name for name in timings if name.startswith("ppo_loss")],
            timings,
            counts=counts,
            skipped=others.skipped | skipped,
            notes=others.notes,
            moved=moved,
            floor=floor,
        )
    ]


def contenders(
    batches: list[MiniBatch], options: Options, others: dict[str, Callable[[int], object]]
) -> dict[str, Contender]:
    """By name; each computes the loss and the gradients of mean, std (or its logarithm) and values."""
    compiled = torch.compile(stock_loss, dynamic=False)
    on_gpu = options.device == "cuda"

    def of(batch_of: int) -> MiniBatch:
        return batches[batch_of % len(batches)]

    def with_gradients(loss_of: Callable[..., Any]) -> Callable[[int], object]:
        def call(i: int) -> object:
            out = loss_of(*of(i))
            return out, torch.autograd.grad(out[0], of(i).leaves)

        return call

    def and_grad(backend: str | None) -> Callable[[int], object]:
        return lambda i: pyfast_ppo.ppo_loss_and_grad(*of(i), **COEFFICIENTS, backend=backend)

    found = {BASELINE: Contender(with_gradients(stock_loss), optional=False)}
    found[COMPILED] = Contender(with_gradients(compiled))
    if on_gpu:
        found[f"{COMPILED}, CUDA graph"] = Contender(with_gradients(compiled), captured=True)
    found |= {name: Contender(call) for name, call in others.items()}
    found[AUTOGRAD] = Contender(
        with_gradients(lambda *args: pyfast_ppo.ppo_loss(*args, **COEFFICIENTS)), optional=False
    )
    found[OURS] = Contender(and_grad(None), optional=False)
    if on_gpu:
        for name in gpu_backends():
            found[f"{OURS}, CUDA graph, {name}"] = Contender(and_grad(name), captured=True)
    return found


def gpu_backends() -> list[str]:
    """Those of which ``backend=None`` takes the first; their figures say whether it is the fastest."""
    return [s.name for s in backends.status() if s.available and s.name in ("cuda", "triton")]


def check_agreement(batch: MiniBatch) -> None:
    """A benchmark of two different things would be worthless."""
    stock = stock_loss(*batch)
    stock_grads = torch.autograd.grad(stock.loss, batch.leaves)
    out, grads = pyfast_ppo.ppo_loss_and_grad(*batch, **COEFFICIENTS)
    torch.testing.assert_close(out.loss, stock.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.kl, stock.kl, rtol=1e-3, atol=1e-6)
    for name, ours, theirs in zip(("mean", "std", "values"), grads, stock_grads, strict=True):
        if (ours - theirs).norm() > 1e-5 * theirs.norm():
            raise RuntimeError(f"ppo_loss_and_grad and rsl_rl's formula have different gradients of {name}")


def _input_sets(case: Case, device: str) -> list[MiniBatch]:
    batch = make_mini_batch(case.num_rows, case.num_actions, case.old_std_per_row, 0, device)
    num_sets = num_input_sets(size_of(*batch, *batch.leaves), device, on_cpu=case.num_sets)
    return [batch, *(in_another_order(batch) for _ in range(num_sets - 1))]
