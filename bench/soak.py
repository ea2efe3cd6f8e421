"""Two thousand iterations: does memory stay, does the speed, and is the learning curve the stock's?

python bench/soak.py                       # five seeds of both arms; Ctrl-C and start again at will
python bench/soak.py --save NAME           # also writes bench/results/NAME/soak.json and docs/soak.png
python bench/soak.py --plot NAME           # only draws docs/soak.png, from that file

Cart-poles that are to be swung up (runs/swing_up.py), a small network, one thread a run; the arms of a seed run at the
same time on two cores, and change cores from seed to seed.

- memory: slopes of what malloc and Python have given out, of the number of tensors that Python knows of, and of the
  resident memory, which malloc's keeping of freed memory moves, too (Linux). In the second half of a run: before that
  Python's collector has not been everywhere yet, for which TensorDict leaves a cycle each time that it is indexed
- speed: the processor's time of an iteration in the last quarter by that in the first, and of computing returns and
  update(). It is the least of each twenty iterations in a row, and the median of those: what the program takes when
  nobody is in its way. The stock's ratio, at the same time, tells a slowing machine from a slowing algorithm

For each a mean over the runs, with Student's 95% interval. Exit status 1, with a sentence, if one is not flat, or if
its interval is too wide to tell. Returns are compared as in learning.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from runs import results
from runs.comparison import (
    ARMS,
    Arms,
    Record,
    as_json,
    bin_edges,
    compare_returns,
    compare_times,
    final_returns,
)
from runs.pairs import Pair, exit_status, gather, run_pairs, shared_config
from runs.statistics import mean_interval
from runs.training import SWING_UP, Spec

from pyfast_ppo.pictures import GREY

SUBJECT = "soak"
NUM_ENVS = 128
WARM_UP = 0.5  # share of a run, for slopes
MOST_GROWTH = {  # per iteration
    "heap_bytes": 64.0,  # less than the smallest tensor takes
    "python_blocks": 0.1,
    "tensors_alive": 0.01,
    "resident_bytes": 512.0,  # a fiftieth of a page would do; malloc does not
}
MOST_SLOWING = 1.02  # last quarter by first, by that of the stock
MOST_OPEN = 1.1  # an interval that reaches beyond does not tell whether it slows
_ENTRIES = 100  # of a condensed record, and looks at the memory in a run
_BINS = 50  # points of a curve
_CPU_TIMES = ("iteration_cpu_ms", "learn_cpu_ms")


# --- analysis ---------------------------------------------------------------------------------------------------------


def condensed(record: Record, entries: int = _ENTRIES) -> dict[str, list]:
    """A record with fewer entries: sums of episodes, means of returns, medians of times, least processor's times."""
    edges = bin_edges(len(record["episodes"]), entries)
    parts = [slice(begin, end) for begin, end in itertools.pairwise(edges)]
    episodes = [np.array(record["episodes"][part]) for part in parts]
    returns = [np.array([mean or 0.0 for mean in record["mean_return"][part]]) for part in parts]
    return {
        "episodes": [int(count.sum()) for count in episodes],
        "mean_return": [
            float(count @ mean / count.sum()) if count.sum() else None
            for count, mean in zip(episodes, returns, strict=True)
        ],
        **{name: [float(np.median(record[name][part])) for part in parts] for name in ("collect_ms", "update_ms")},
        **{name: [float(min(record[name][part])) for part in parts] for name in _CPU_TIMES},
        **{name: record[name] for name in MOST_GROWTH},
    }


def stability(arms: Arms, iterations: int) -> dict:
    """Slopes of memory and drifts of times, for both arms. ``iterations``: of a run.

    Intervals are of the spread between runs: what is measured within one run hangs together.
    """
    report: dict = {}
    for arm in ARMS:
        growth = {name: _mean([_slope(r[name], iterations) for r in arms[arm]]) for name in MOST_GROWTH}
        drift = {name: _ratio([_drift(r[name]) for r in arms[arm]]) for name in _CPU_TIMES}
        at_the_end = {name: [r[name][-1] for r in arms[arm]] for name in MOST_GROWTH}
        report[arm] = {"growth_per_iteration": growth, "last_by_first_quarter": drift, "at_the_end": at_the_end}
    pairs = list(zip(arms["stock"], arms["fused"], strict=True))
    report["drift_fused_by_stock"] = {
        name: _ratio([_drift(fused[name]) - _drift(stock[name]) for stock, fused in pairs]) for name in _CPU_TIMES
    }
    return report


def soak_result(runs: Mapping[str, Sequence[Mapping]]) -> dict:
    """What the result file holds; ``runs``: what train_once.py wrote, by arm."""
    first = runs[ARMS[0]][0]
    arms = {arm: [condensed(run["record"]) for run in runs[arm]] for arm in ARMS}
    stable = stability(arms, first["spec"]["iterations"])
    return {
        "machine": results.machine(),
        "made_with": first["made_with"],
        **{name: first["spec"][name] for name in ("task", "num_envs", "iterations")},
        "steps_per_iteration": first["steps_per_iteration"],
        "seeds": [run["spec"]["seed"] for run in runs[ARMS[0]]],
        "findings": findings(stable),
        "stability": stable,
        "returns": compare_returns(arms),
        "times": compare_times(arms),
        "config": shared_config(first),
        "runs": arms,
    }


def findings(report: Mapping) -> list[str]:
    """A sentence for each thing that is not flat in FusedPPO, or of which the runs cannot tell.

    It is not flat if the whole interval is beyond what is tolerated. Whether memory grows by more than that must not
    be left open at all; of a slowdown, which is harder to measure, up to ``MOST_OPEN`` may be.
    """
    growth, drift = report["fused"]["growth_per_iteration"], report["drift_fused_by_stock"]
    told = []
    for name, most in MOST_GROWTH.items():
        if growth[name]["low"] > most:
            told.append(f"{name} grows by {results.text(growth[name])} per iteration")
        elif growth[name]["high"] > most:
            told.append(f"cannot tell whether {name} grows: {_range(growth[name])} per iteration")
    for name in _CPU_TIMES:
        if drift[name]["low"] > MOST_SLOWING:
            times = results.text(drift[name], ".4g")
            told.append(f"{name} in the last quarter is {times} times that in the first, by the stock's")
        elif drift[name]["high"] > MOST_OPEN:
            told.append(
                f"cannot tell whether {name} becomes slower: the last quarter is {_range(drift[name])} times the first,"
                " by the stock's"
            )
    return told


def _range(interval: Mapping[str, float]) -> str:
    return f"{interval['low']:.3g} to {interval['high']:.3g}"


def _slope(values: Sequence[float], iterations: int) -> float:
    """Of the least-squares line after the warm-up, per iteration; ``values`` are spread evenly over the run."""
    at = (np.arange(len(values)) + 1) * iterations / len(values)
    late = at > WARM_UP * iterations
    x, y = (centred - centred.mean() for centred in (at[late], np.array(values, dtype=float)[late]))
    return float(x @ y / (x @ x))


def _drift(times: Sequence[float]) -> float:
    """Logarithm of the median in the last quarter by that in the first."""
    quarter = len(times) // 4
    return math.log(np.median(times[-quarter:]) / np.median(times[:quarter]))


def _mean(values: Sequence[float]) -> dict[str, float]:
    return as_json(mean_interval(np.array(values)))


def _ratio(logarithms: Sequence[float]) -> dict[str, float]:
    return as_json(mean_interval(np.array(logarithms)).map(math.exp))


# --- terminal ---------------------------------------------------------------------------------------------------------


def print_report(result: dict) -> None:
    stable, returns = result["stability"], result["returns"]
    print(f"{'':<42}{'stock':>32}{'fused':>32}")
    for name in MOST_GROWTH:
        cells = [results.text(stable[arm]["growth_per_iteration"][name]) for arm in ARMS]
        print(f"{name + ', growth per iteration':<42}" + "".join(f"{cell:>32}" for cell in cells))
    for name in _CPU_TIMES:
        cells = [results.text(stable[arm]["last_by_first_quarter"][name], ".4g") for arm in ARMS]
        print(f"{name + ', last quarter by first':<42}" + "".join(f"{cell:>32}" for cell in cells))
        without = results.text(stable["drift_fused_by_stock"][name], ".4g")
        print(f"{'    fused by stock':<42}{'':>32}{without:>32}")
    print(f"{'final return, mean and std over runs':<42}" + "".join(f"{_spread(returns, arm):>32}" for arm in ARMS))
    print(
        f"{'final return, interquartile mean':<42}"
        + "".join(f"{results.text(returns[f'final_return_{arm}']):>32}" for arm in ARMS)
    )
    print(results.difference_text(returns))
    for sentence in result["findings"]:
        print(f"FINDING: {sentence}")


def _spread(returns: dict, arm: str) -> str:
    mean, std = returns[f"mean_and_std_{arm}"]
    return f"{mean:.4g} ± {std:.2g}"


# --- figure -----------------------------------------------------------------------------------------------------------


def draw(path: Path, result: dict) -> None:
    """Learning curves, final returns, memory and the time of an iteration."""
    runs, iterations = result["runs"], result["iterations"]
    with results.figure(path, 11.0, 7.2) as figure:
        grid = figure.subplots(2, 2)
        (learning, finals), (memory, speed) = grid
        results.draw_returns(learning, runs, dict.fromkeys(ARMS, iterations * result["steps_per_iteration"]), _BINS)
        results.label(
            learning,
            f"{result['task']}, {len(result['seeds'])} seeds",
            "environment steps",
            "mean return of an episode",
        )
        learning.annotate(results.difference_text(result["returns"]), (0.98, 0.03), **results.NOTE)
        _draw_finals(finals, result)
        x = (np.arange(_ENTRIES) + 1) * iterations / _ENTRIES
        for arm in ARMS:
            for record in runs[arm]:
                style = {"color": results.COLORS[arm], "linewidth": 1.2, "alpha": 0.7}
                memory.plot(x, np.array(record["heap_bytes"]) / 2**20, **style)
                speed.plot(x, record["iteration_cpu_ms"], **style)
        low, high = memory.get_ylim()
        memory.set_ylim(low - 2.0, high + 2.0)  # or a wavering of a few pages would look like a storm
        results.label(memory, "memory that malloc has given out, each run", "iteration", "MiB")
        results.label(speed, "processor's time of an iteration, each run", "iteration", "ms, least of twenty")
        stable = {arm: result["stability"][arm] for arm in ARMS}
        slopes = [f"{arm}: {results.text(stable[arm]['growth_per_iteration']['heap_bytes'])}" for arm in ARMS]
        memory.annotate("\n".join(["bytes per iteration", *slopes]), (0.98, 0.03), **results.NOTE)
        drifts = [f"{arm}: {results.text(stable[arm]['last_by_first_quarter'][_CPU_TIMES[0]])}" for arm in ARMS]
        speed.annotate("\n".join(["last quarter by first", *drifts]), (0.98, 0.03), **results.NOTE)
        speed.set_ylim(bottom=0)
        handles, labels = learning.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _draw_finals(axes: Axes, result: dict) -> None:
    """A dot for each run, its pair joined to it; mean and standard deviation beside."""
    finals = {arm: final_returns(result["runs"][arm]) for arm in ARMS}
    for pair in zip(*finals.values(), strict=True):
        axes.plot([0, 1], pair, color=GREY, linewidth=1, zorder=1)
    for place, arm in enumerate(ARMS):
        color = results.COLORS[arm]
        axes.plot([place] * len(finals[arm]), finals[arm], "o", color=color, markersize=5)
        mean, std = result["returns"][f"mean_and_std_{arm}"]
        beside = place + (0.16 if place else -0.16)
        axes.errorbar(beside, mean, yerr=std, fmt="s", color=color, capsize=4, markersize=6)
    axes.set_xticks(range(len(ARMS)), [results.NAMES[arm] for arm in ARMS])
    axes.set_xlim(-0.6, 1.6)
    results.label(axes, "final return of each run; mean ± standard deviation", "", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000, help="of a run (2000)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (5)")
    parser.add_argument("--work", metavar="DIR", default="logs/soak", help="a file per run (logs/soak)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/soak.json and docs/soak.png")
    parser.add_argument("--plot", metavar="NAME", help="draw docs/soak.png from bench/results/NAME/soak.json")
    args = parser.parse_args()
    if args.plot:
        return results.redraw(args.plot, SUBJECT, draw)
    if args.seeds < 2 or args.iterations < _ENTRIES:
        parser.error(f"--seeds must be at least 2, --iterations at least {_ENTRIES}")
    return exit_status(lambda: _soak(args))


def _soak(args: argparse.Namespace) -> int:
    work = Path(args.work)
    spec = Spec(SWING_UP, ARMS[0], 0, NUM_ENVS, args.iterations, args.iterations // _ENTRIES)
    pairs = [Pair(replace(spec, seed=seed), sys.executable) for seed in range(1, args.seeds + 1)]
    run_pairs(pairs, work)
    result = soak_result(gather(pairs, work))
    print_report(result)
    results.keep(result, args.save, SUBJECT, work, draw)
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
