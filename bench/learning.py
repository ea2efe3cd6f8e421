"""Does it learn the same? rsl_rl's PPO against FusedPPO with its default arguments: return per step, and seconds.

python bench/learning.py --isaaclab-python PATH      # everything; Ctrl-C and start again at will
python bench/learning.py --tasks Hopper-v5           # one of the tasks below
python bench/learning.py ... --save NAME             # also writes bench/results/NAME/learning.json, docs/learning.png;
                                                     # tasks that are in the file and were not asked for stay
python bench/learning.py --plot NAME                 # only draws docs/learning.png, from that file

Both arms get the same environments, wrapper, config and seeds: those of ``pyfast-ppo train`` (``--algorithm stock`` and
``fused``); only the algorithm's class differs. The wrappers hand out the observation before a reset, from which
FusedPPO bootstraps time-outs; that is part of its defaults, and so of the comparison.

A run has one thread. The arms of a seed run at the same time on two cores, and change cores from seed to seed; times
are compared within these pairs. A task's return is the mean over the episodes that ended in the last tenth of a run;
see runs/comparison.py and runs/statistics.py for what is made of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from runs import results
from runs.comparison import ARMS, compare_over_tasks, compare_returns, compare_times
from runs.pairs import Pair, exit_status, gather, run_pairs, shared_config
from runs.training import Spec

from pyfast_ppo.pictures import GREY

SUBJECT = "learning"
_BINS = 16  # points of a curve


@dataclass(frozen=True)
class Budget:
    num_envs: int
    iterations: int


TASKS = {
    "Hopper-v5": Budget(num_envs=32, iterations=42),  # episodes end by falling
    "HalfCheetah-v5": Budget(num_envs=32, iterations=55),  # episodes end by the time limit alone, after 1000 steps
    "Isaac-Cartpole-Direct": Budget(num_envs=512, iterations=60),
}


def is_of_isaaclab(task: str) -> bool:
    return task.startswith("Isaac-")


def pairs_of(task: str, seeds: int, isaaclab_python: str | None) -> list[Pair]:
    python = isaaclab_python if is_of_isaaclab(task) and isaaclab_python else sys.executable
    budget = TASKS[task]
    return [Pair(Spec(task, ARMS[0], seed, budget.num_envs, budget.iterations), python) for seed in range(1, seeds + 1)]


def task_result(runs: Mapping[str, Sequence[Mapping]]) -> dict:
    """What the result file holds of a task; ``runs``: what train_once.py wrote, by arm."""
    first = runs[ARMS[0]][0]
    arms = {arm: [run["record"] for run in runs[arm]] for arm in ARMS}
    records = [record for arm in ARMS for record in arms[arm]]
    steps = first["steps_per_iteration"] * first["spec"]["iterations"] * len(records)
    return {
        "machine": results.machine(),
        "made_with": first["made_with"],
        **{name: first["spec"][name] for name in ("num_envs", "iterations")},
        "steps_per_iteration": first["steps_per_iteration"],
        "seeds": [run["spec"]["seed"] for run in runs[ARMS[0]]],
        "time_outs_per_1000_steps": 1e3 * sum(sum(record["time_outs"]) for record in records) / steps,
        "returns": compare_returns(arms),
        "times": compare_times(arms),
        "config": shared_config(first),
        "runs": {arm: [_kept(record) for record in arms[arm]] for arm in ARMS},
    }


def learning_result(tasks: Mapping[str, dict]) -> dict:
    """What the result file holds: each task, in the order of ``TASKS``, and all together."""
    in_order = {name: tasks[name] for name in sorted(tasks, key=list(TASKS).index)}
    return {
        "tasks": in_order,
        "over_all_tasks": compare_over_tasks([task["runs"] for task in in_order.values()]),
    }


def _kept(record: dict) -> dict:
    return {name: record[name] for name in ("episodes", "mean_return", "collect_ms", "update_ms")}


# --- terminal ---------------------------------------------------------------------------------------------------------


def print_report(result: dict) -> None:
    titles = ("stock", "fused", "fused - stock", "P(fused better)", "p", "update()", "iteration")
    print(f"{'final return':<24}" + "".join(f"{title:>26}" for title in titles))
    for name, task in result["tasks"].items():
        returns, times = task["returns"], task["times"]
        cells = [results.text(returns["final_return_stock"]), results.text(returns["final_return_fused"])]
        cells += _difference(returns)
        cells += [f"{results.text(times[part]['times_faster'])} x" for part in ("update", "iteration")]
        print(f"{name:<24}" + "".join(f"{cell:>26}" for cell in cells))
    over = result["over_all_tasks"]
    cells = [results.text(over["score_stock"]), results.text(over["score_fused"]), *_difference(over)]
    print(f"{'all tasks, normalised':<24}" + "".join(f"{cell:>26}" for cell in cells))
    print("Interquartile means over runs with 95% intervals of a stratified bootstrap; p: permutation test, two-sided.")


def _difference(returns: dict) -> list[str]:
    return [
        results.text(returns["fused_minus_stock"]),
        results.text(returns["probability_that_fused_is_better"]),
        f"{returns['permutation_p_value']:.2f}",
    ]


# --- figure -----------------------------------------------------------------------------------------------------------


def draw(path: Path, result: dict) -> None:
    """A column per task: return per step, return per second, and where the time goes."""
    tasks = result["tasks"]
    with results.figure(path, 1.0 + 3.6 * len(tasks), 9.0) as figure:
        grid = figure.subplots(3, len(tasks), squeeze=False, height_ratios=(3, 3, 1.2))
        for column, (name, task) in enumerate(tasks.items()):
            _draw_task(grid[:, column], name, task)
        for row, label in zip(grid, ("mean return of an episode", "mean return of an episode", ""), strict=True):
            row[0].set_ylabel(label)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        handles.append(grid[2, 0].patches[0])
        labels.append("collecting")
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _draw_task(cells: list[Axes], name: str, task: dict) -> None:
    per_step, per_second, parts = cells
    runs, returns = task["runs"], task["returns"]
    iterations, times = task["iterations"], task["times"]
    results.draw_returns(per_step, runs, dict.fromkeys(ARMS, iterations * task["steps_per_iteration"]), _BINS)
    # the machine's moods, which differ from pair to pair, are left out: the ratio is that within pairs
    stock = 1e-3 * iterations * times["iteration"]["ms_stock"]["estimate"]
    ends = {"stock": stock, "fused": stock / times["iteration"]["times_faster"]["estimate"]}
    results.draw_returns(per_second, runs, ends, _BINS)
    results.label(per_step, f"{name}, {len(task['seeds'])} seeds", "environment steps", "")
    results.label(per_second, "", "seconds of training", "")
    per_step.annotate(results.difference_text(returns), (0.98, 0.03), **results.NOTE)
    for place, arm in enumerate(reversed(ARMS)):
        collect, update = (times[part][f"ms_{arm}"]["estimate"] for part in ("collect", "update"))
        parts.barh(place, collect, color=GREY, height=0.6)
        parts.barh(place, update, left=collect, color=results.COLORS[arm], height=0.6)
        parts.annotate(f" update() {update:.0f} ms", (collect + update, place), va="center", fontsize=8)
    parts.set_yticks(range(len(ARMS)), [results.NAMES[arm] for arm in reversed(ARMS)])
    parts.set_xlabel("ms per iteration")
    parts.margins(x=0.3)
    faster = {part: results.text(times[part]["times_faster"]) for part in ("update", "iteration")}
    parts.set_title(f"times faster: update() {faster['update']}\niteration {faster['iteration']}", fontsize=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each arm on a task (8)")
    parser.add_argument("--isaaclab-python", metavar="PATH", help="interpreter that has Isaac Lab and pyfast_ppo")
    parser.add_argument("--work", metavar="DIR", default="logs/learning", help="a file per run (logs/learning)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/learning.json and docs/learning.png")
    parser.add_argument("--plot", metavar="NAME", help="draw docs/learning.png from bench/results/NAME/learning.json")
    args = parser.parse_args()
    if args.plot:
        return results.redraw(args.plot, SUBJECT, draw)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: the spread between runs is what is compared with")
    if not args.isaaclab_python and importlib.util.find_spec("isaaclab") is None:
        left_out = [task for task in args.tasks if is_of_isaaclab(task)]
        args.tasks = [task for task in args.tasks if task not in left_out]
        for task in left_out:
            print(f"{task} is left out: Isaac Lab is not installed here; say where with --isaaclab-python")
    if not args.tasks:
        return 1
    return exit_status(lambda: _learn(args))


def _learn(args: argparse.Namespace) -> int:
    work = Path(args.work)
    pairs = {task: pairs_of(task, args.seeds, args.isaaclab_python) for task in args.tasks}
    run_pairs([pair for of_task in pairs.values() for pair in of_task], work)
    tasks = {task: task_result(gather(of_task, work)) for task, of_task in pairs.items()}
    if args.save:
        tasks = {**results.read(args.save, SUBJECT).get("tasks", {}), **tasks}
    result = learning_result(tasks)
    print_report(result)
    results.keep(result, args.save, SUBJECT, work, draw)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
