"""The loss and its gradients of one mini-batch as what they are made of: each operation with its time, in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from pyfast_ppo.bench import loss, results
from pyfast_ppo.bench.counts import count
from pyfast_ppo.bench.harness import Options, Timing
from pyfast_ppo.bench.operations import Operation, Recorder
from pyfast_ppo.bench.stock import MiniBatch, make_mini_batch

_ROUNDS, _QUICK_ROUNDS, _WARMUP = 25, 5, 3


class Case(NamedTuple):
    """One mini-batch."""

    num_rows: int
    num_actions: int

    def __str__(self) -> str:
        return f"N = {self.num_rows:,}, A = {self.num_actions}"


def cases(device: str, quick: bool) -> list[Case]:
    """Anymal's."""
    return [Case(24_576, 12)]


def measure(case: Case, options: Options) -> list[dict]:
    """One row, whose contenders have ``operations``: [name, seconds] of each, medians."""
    batch = make_mini_batch(case.num_rows, case.num_actions, True, 0, options.device)
    calls = _calls(batch, options)
    runs: dict[str, list[list[Operation]]] = {name: [] for name in calls}
    for _ in range(_WARMUP + (_QUICK_ROUNDS if options.quick else _ROUNDS)):
        for name, call in calls.items():
            runs[name].append(_watched(call, options.device))
    kept = {name: found[_WARMUP:] for name, found in runs.items()}
    timings = {name: Timing([sum(o.seconds for o in run) for run in found]) for name, found in kept.items()}
    counts = {name: count(call, options.device) for name, call in calls.items()}
    row = results.make_row(
        {"N": case.num_rows, "A": case.num_actions}, loss.BASELINE, [loss.OURS], timings, counts=counts
    )
    for name, found in kept.items():
        in_order = zip(*found, strict=True)
        row["contenders"][name]["operations"] = [
            [same[0].name, float(f"{median(o.seconds for o in same):.3g}")] for same in in_order
        ]
    return [row]


def _calls(batch: MiniBatch, options: Options) -> dict[str, Callable[[], object]]:
    contenders = loss.contenders([batch], options, {})
    return {name: partial(contenders[name].call, 0) for name in (loss.BASELINE, loss.OURS)}


def _watched(call: Callable[[], object], device: str) -> list[Operation]:
    recorder = Recorder(device, hidden_dims=(), part="update")
    with recorder.recording():
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return recorder.operations
