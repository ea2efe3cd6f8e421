"""An iteration of PPO around the loss: act, compute_returns and update(), FusedPPO against rsl_rl and plain PyTorch.

The environment is synthetic (``synthetic.py``); its steps are not counted, and every contender gets the same
observations and rewards. On a GPU float32 matrices are multiplied in TF32, as in the training scripts of Isaac Lab and
mjlab. "rsl_rl compiled" is ``torch_compile_mode="default"``; "torch only" is ``torch_only.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from rsl_rl.runners import OnPolicyRunner

from pyfast_ppo.bench import results
from pyfast_ppo.bench.counts import Counts, count
from pyfast_ppo.bench.harness import Options, Timing, first_line
from pyfast_ppo.bench.sizes import SIZES, Size
from pyfast_ppo.bench.synthetic import make_runner
from pyfast_ppo.bench.torch_only import TorchOnlyPPO
from pyfast_ppo.precision import multiply_in_tf32
from pyfast_ppo.rsl_rl import FusedPPO

BASELINE, COMPILED, TORCH_ONLY, OURS = "rsl_rl", "rsl_rl compiled", "torch only", "FusedPPO"
PARTS = ("act", "process_env_step", "compute_returns", "update")  # of an iteration, in their order
ITERATION = "iteration"
_NEEDED = (BASELINE, OURS)
_MIN_ROUNDS, _MAX_ROUNDS = 3, 20

Around = Callable[[str, Callable[[], object]], object]  # runs a part of an iteration, and hands on what it returns


class TwoStreams(FusedPPO):
    """In its CUDA graphs the critic runs beside the actor; by autograd, with four launches more for the std's range."""

    _two_streams = True


def cases(device: str, quick: bool) -> list[str]:
    """Names of sizes; the large networks take minutes on a CPU, and are asked for by name there."""
    if quick:
        return ["cartpole"]
    return list(SIZES) if device == "cuda" else ["cartpole", "anymal_flat"]


def measure(case: str, options: Options) -> list[dict]:
    """One row for each part of an iteration, and one for the whole."""
    torch.compiler.reset()
    multiply_in_tf32()
    runners, skipped = _runners(SIZES[case], options)
    clocks: dict[str, dict[str, Timing]] = {part: {name: Timing() for name in runners} for part in (*PARTS, ITERATION)}
    rounds, done = _MAX_ROUNDS, -_warmup(options)
    while done < rounds:
        start = time.perf_counter()
        for name in list(runners) if done % 2 else list(reversed(runners)):
            try:
                seconds = _timed(runners[name], options.device)
            except Exception as error:
                if name in _NEEDED:
                    raise
                skipped[name] = first_line(error)
                del runners[name]
                continue
            if done >= 0:
                for part, taken in seconds.items():
                    clocks[part][name].seconds.append(taken)
        if done == -1:
            rounds = int(options.seconds / (time.perf_counter() - start))
            rounds = max(2 if options.quick else _MIN_ROUNDS, min(_MAX_ROUNDS, rounds))
            skipped |= {name: reason for name, runner in runners.items() if (reason := why_no_graph(runner.alg))}
            runners = {name: runner for name, runner in runners.items() if name not in skipped}
        done += 1
    counts = {name: _counted(runner, options.device) for name, runner in runners.items()}
    return [
        results.make_row(
            {"size": case, "part": part},
            BASELINE,
            [name for name in runners if name.startswith(OURS)],
            {name: timings[name] for name in runners},
            counts={name: found[part] for name, found in counts.items() if part in found},
            skipped=skipped,
        )
        for part, timings in clocks.items()
    ]


def why_no_graph(alg: object) -> str | None:
    """Why it does not run as CUDA graphs although it was asked to."""
    if not isinstance(alg, FusedPPO) or alg._captured is None:
        return None
    if alg._captured_rollout is None or alg._captured.reason or alg._captured_rollout.reason:
        rollout = alg._captured_rollout and alg._captured_rollout.reason
        return f"without a CUDA graph: {alg._captured.reason or rollout}"
    recorded = alg._captured.num_records and alg._captured_rollout.num_records
    return None if recorded else "its CUDA graphs were not recorded in the warm-up"


def _warmup(options: Options) -> int:
    return 4 if options.device == "cuda" else 1  # a CUDA graph is recorded in the third update


def _runners(size: Size, options: Options) -> tuple[dict[str, OnPolicyRunner], dict[str, str]]:
    """After one iteration, which compiles; and why one could not be."""
    fused = "pyfast_ppo.rsl_rl:FusedPPO"
    wanted: dict[str, tuple[str, str | None, dict]] = {
        BASELINE: ("PPO", None, {}),
        COMPILED: ("PPO", "default", {}),
        TORCH_ONLY: ("pyfast_ppo.bench.torch_only:TorchOnlyPPO", None, {}),
        OURS: (fused, None, {}),
    }
    if options.device == "cuda":
        wanted[f"{OURS}, CUDA graph"] = (fused, None, {"cuda_graph": True})
        wanted[f"{OURS}, two streams"] = (f"{__name__}:TwoStreams", None, {"cuda_graph": True})
    runners, skipped = {}, {}
    if options.quick:
        del wanted[COMPILED]
        skipped[COMPILED] = "compiles for too long to be --quick"
    for name, (algorithm, mode, arguments) in wanted.items():
        try:
            runner = make_runner(size, options.device, algorithm, mode, **arguments)
            iterate(runner, lambda part, work: work())
        except Exception as error:
            if name in _NEEDED:
                raise
            skipped[name] = first_line(error)
        else:
            runners[name] = runner
    return runners, skipped


def iterate(runner: OnPolicyRunner, around: Around) -> None:
    """One iteration, as the runner does it."""
    alg, env = runner.alg, runner.env
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(alg.storage.num_transitions_per_env):
            actions = around("act", partial(alg.act, obs))
            obs, *outcome = env.step(actions)
            around("process_env_step", partial(alg.process_env_step, obs, *outcome))
        around("compute_returns", partial(alg.compute_returns, obs))
    around("update", alg.update)


def _timed(runner: OnPolicyRunner, device: str) -> dict[str, float]:
    """Seconds of each part, with the device's work in them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = dict.fromkeys((*PARTS, ITERATION), 0.0)

    def around(part: str, work: Callable[[], object]) -> object:
        wait()
        start = time.perf_counter()
        out = work()
        wait()
        seconds[part] += time.perf_counter() - start
        return out

    iterate(runner, around)
    seconds[ITERATION] = sum(seconds.values())
    return seconds


def _counted(runner: OnPolicyRunner, device: str) -> dict[str, Counts]:
    """Launches and syncs of each part, summed over its calls, and the most memory that one of them held."""
    counts: dict[str, Counts] = {}
    has_graphs = isinstance(runner.alg, TorchOnlyPPO) or getattr(runner.alg, "_captured", None) is not None
    replays = device == "cuda" and has_graphs

    def around(part: str, work: Callable[[], object]) -> object:
        if part not in ("compute_returns", "update") and part in counts:
            return work()  # each step of a rollout is as the first
        out = []
        found = count(lambda: out.append(work()), device)
        counts[part] = replace(found, peak_bytes=None) if replays else found
        return out[0]

    iterate(runner, around)
    steps = runner.alg.storage.num_transitions_per_env
    for part in ("act", "process_env_step"):
        found = counts[part]
        counts[part] = replace(found, launches=found.launches * steps, syncs=found.syncs * steps)
    return counts
