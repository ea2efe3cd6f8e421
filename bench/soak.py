"""Two thousand iterations: does memory stay, does the speed, and is the learning curve the stock's?

python bench/soak.py                       # five seeds of both arms; Ctrl-C and start again at will
python bench/soak.py --save NAME           # also writes bench/results/NAME/soak.json and docs/soak.png
python bench/soak.py --plot NAME           # only draws docs/soak.png, from that file

Cart-poles that are to be swung up (runs/swing_up.py), a small network, one thread a run; the arms of a seed run at the
same time on two cores, and change cores from seed to seed. After a warm-up of a fifth of the run:

- memory: slope of the resident memory (Linux), and of the number of tensors that Python holds
- speed: time in the last quarter by that in the first, of the iteration and of update(). It is the least of each twenty
  iterations in a row, and the median of those: what the program takes when nobody disturbs it. The stock's ratio, from
  the other core at the same time, tells a slowing machine from a slowing algorithm

For each a mean over the runs, with Student's 95% interval. Exit status 1, with a sentence, if one is not flat.
Returns are compared as in learning.py.
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
    iteration_ms,
)
from runs.pairs import Pair, exit_status, gather, run_pairs, shared_config
from runs.statistics import mean_interval
from runs.training import SWING_UP, Spec

SUBJECT = "soak"
NUM_ENVS = 128
WARM_UP = 0.2  # share of a run
MOST_BYTES = 64.0  # per iteration: less than the smallest tensor takes
MOST_TENSORS = 0.01  # per iteration
MOST_SLOWING = 1.02  # last quarter by first, by that of the stock
_ENTRIES = 100  # of a condensed record
_TENSOR_COUNTS = 20  # in a run
_BINS = 50  # points of a curve
_PARTS = ("iteration", "update")
_DRIFT = "iteration_last_by_first_quarter"


# --- analysis ---------------------------------------------------------------------------------------------------------


def condensed(record: Record, entries: int = _ENTRIES) -> dict[str, list]:
    """A record with fewer entries: sums of episodes, means of returns, medians and least of times, least memory.

    The least memory, because what is held for a moment and given back is no leak.
    """
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
        "least_iteration_ms": [float(iteration_ms(record)[part].min()) for part in parts],
        "least_update_ms": [float(min(record["update_ms"][part])) for part in parts],
        "resident_bytes": [min(record["resident_bytes"][part]) for part in parts],
        "tensors_alive": record["tensors_alive"],
    }


def stability(arms: Arms, iterations: int) -> dict:
    """Slopes of memory and drifts of times, for both arms. ``iterations``: of a run.

    Intervals are of the spread between runs: what is measured within one run hangs together.
    """
    report: dict = {}
    for arm in ARMS:
        report[arm] = {
            "bytes_per_iteration": _mean([_slope(r["resident_bytes"], iterations) for r in arms[arm]]),
            "tensors_per_iteration": _mean([_slope(r["tensors_alive"], iterations) for r in arms[arm]]),
            "resident_MiB_at_the_end": [r["resident_bytes"][-1] / 2**20 for r in arms[arm]],
            "tensors_alive_at_the_end": [r["tensors_alive"][-1] for r in arms[arm]],
            **{f"{part}_last_by_first_quarter": _ratio([_drift(r, part) for r in arms[arm]]) for part in _PARTS},
        }
    pairs = list(zip(arms["stock"], arms["fused"], strict=True))
    for part in _PARTS:
        report[f"{part}_drift_fused_by_stock"] = _ratio([_drift(f, part) - _drift(s, part) for s, f in pairs])
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
    """A sentence for each thing that is not flat in FusedPPO, beyond doubt and by more than is tolerated."""
    fused = report["fused"]
    limits = {
        "resident memory grows by {estimate:.0f} bytes per iteration": (fused["bytes_per_iteration"], MOST_BYTES),
        "tensors alive grow by {estimate:.3g} per iteration": (fused["tensors_per_iteration"], MOST_TENSORS),
        "iterations take {estimate:.3f} times as long in the last quarter, with the stock's drift taken out": (
            report["iteration_drift_fused_by_stock"],
            MOST_SLOWING,
        ),
        "updates take {estimate:.3f} times as long in the last quarter, with the stock's drift taken out": (
            report["update_drift_fused_by_stock"],
            MOST_SLOWING,
        ),
    }
    return [
        sentence.format(**interval) + " (95% interval {low:.4g} to {high:.4g})".format(**interval)
        for sentence, (interval, limit) in limits.items()
        if interval["low"] > limit
    ]


def _slope(values: Sequence[float], iterations: int) -> float:
    """Of the least-squares line after the warm-up, per iteration; ``values`` are spread evenly over the run."""
    at = (np.arange(len(values)) + 1) * iterations / len(values)
    late = at > WARM_UP * iterations
    x, y = (centred - centred.mean() for centred in (at[late], np.array(values, dtype=float)[late]))
    return float(x @ y / (x @ x))


def _drift(record: Record, part: str) -> float:
    """Logarithm of the undisturbed time in the last quarter by that in the first."""
    times = record[f"least_{part}_ms"]
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
    rows = {
        "resident memory, bytes per iteration": "bytes_per_iteration",
        "tensors alive, per iteration": "tensors_per_iteration",
        "iteration, last quarter by first": "iteration_last_by_first_quarter",
        "update(), last quarter by first": "update_last_by_first_quarter",
    }
    for title, key in rows.items():
        print(f"{title:<42}" + "".join(f"{results.text(stable[arm][key], '.4g'):>32}" for arm in ARMS))
    for part in _PARTS:
        print(
            f"{part + ', drift with the stock’s taken out':<42}{'':>32}"
            f"{results.text(stable[f'{part}_drift_fused_by_stock'], '.4g'):>32}"
        )
    print(f"{'final return, mean and std over runs':<42}" + "".join(f"{_spread(returns, arm):>32}" for arm in ARMS))
    print(
        f"{'final return, interquartile mean':<42}"
        + "".join(f"{results.text(returns[f'final_return_{arm}']):>32}" for arm in ARMS)
    )
    print(results.difference_text(returns))
    for sentence in result["findings"]:
        print(f"NOT FLAT: {sentence}")


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
        results.draw_return_per_step(learning, runs, iterations * result["steps_per_iteration"], _BINS)
        results.label(
            learning,
            f"{result['task']}, {len(result['seeds'])} seeds",
            "environment steps",
            "mean return of an episode",
        )
        learning.annotate(results.difference_text(result["returns"]), (0.98, 0.03), **results.NOTE)
        _draw_finals(finals, result)
        x = (np.arange(len(runs["fused"][0]["update_ms"])) + 1) * iterations / len(runs["fused"][0]["update_ms"])
        for arm in ARMS:
            for record in runs[arm]:
                resident = np.array(record["resident_bytes"]) / 2**20
                memory.plot(x, resident, color=results.COLORS[arm], linewidth=1.2, alpha=0.8)
                speed.plot(x, iteration_ms(record), color=results.COLORS[arm], linewidth=0.9, alpha=0.7)
        low, high = memory.get_ylim()
        memory.set_ylim(low - 5.0, high + 5.0)  # or a wavering of a few pages would look like a storm
        results.label(memory, "resident memory of each run", "iteration", "MiB")
        results.label(speed, "time of an iteration, each run", "iteration", "ms")
        stable = result["stability"]
        slopes = [f"{arm}: {results.text(stable[arm]['bytes_per_iteration'])} bytes per iteration" for arm in ARMS]
        memory.annotate("\n".join(slopes), (0.98, 0.03), **results.NOTE)
        drifts = [f"{arm}: last quarter by first {results.text(stable[arm][_DRIFT])}" for arm in ARMS]
        speed.annotate("\n".join(drifts), (0.98, 0.97), **{**results.NOTE, "va": "top"})
        speed.set_ylim(0, 1.35 * max(np.quantile(iteration_ms(r), 0.98) for arm in ARMS for r in runs[arm]))
        handles, labels = learning.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _draw_finals(axes: Axes, result: dict) -> None:
    """A dot for each run, its pair joined to it; mean and standard deviation beside."""
    finals = {arm: final_returns(result["runs"][arm]) for arm in ARMS}
    for pair in zip(*finals.values(), strict=True):
        axes.plot([0, 1], pair, color=results.GREY, linewidth=1, zorder=1)
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
    if args.seeds < 2 or args.iterations < 2 * _TENSOR_COUNTS:
        parser.error(f"--seeds must be at least 2, --iterations at least {2 * _TENSOR_COUNTS}")
    return exit_status(lambda: _soak(args))


def _soak(args: argparse.Namespace) -> int:
    work = Path(args.work)
    spec = Spec(SWING_UP, ARMS[0], 0, NUM_ENVS, args.iterations, args.iterations // _TENSOR_COUNTS)
    pairs = [Pair(replace(spec, seed=seed), sys.executable) for seed in range(1, args.seeds + 1)]
    run_pairs(pairs, work)
    result = soak_result(gather(pairs, work))
    print_report(result)
    results.keep(result, args.save, SUBJECT, work, draw)
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
