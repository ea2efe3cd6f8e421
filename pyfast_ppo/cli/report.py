"""What is left of a run: the table at its end and the picture of its learning curve."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pyfast_ppo.cli.console import Console, clock, number
from pyfast_ppo.cli.history import Record
from pyfast_ppo.cli.train_config import Settings
from pyfast_ppo.files import write_atomically
from pyfast_ppo.pictures import GREY, STYLE

_BLUE, _GREEN = "#1f6feb", "#1a7f37"


def draw_learning_curve(path: Path, settings: Settings, records: list[Record], threshold: float | None) -> None:
    """Draw mean reward against environment steps, with the line above which the task counts as solved."""
    points = [(record.env_steps, record.mean_reward) for record in records if record.mean_reward is not None]
    with matplotlib.rc_context({**STYLE, "font.size": 11}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot([x for x, _ in points], [y for _, y in points], color=_BLUE, linewidth=2)
        if threshold is not None:
            axes.axhline(threshold, color=_GREEN, linewidth=1.2, linestyle="--")
            axes.annotate(
                f"solved: {threshold:g}",
                (0, threshold),
                xycoords=("axes fraction", "data"),
                xytext=(6, 4),
                textcoords="offset points",
                color=_GREEN,
            )
            axes.margins(y=0.1)
        axes.set_title(f"{settings.env}, {settings.algorithm} PPO, seed {settings.seed}", loc="left")
        axes.set_xlabel("environment steps")
        axes.set_ylabel("mean reward of the last 100 episodes")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(color=GREY, linewidth=0.6)
        axes.set_axisbelow(True)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def print_summary(
    console: Console,
    settings: Settings,
    records: list[Record],
    threshold: float | None,
    paths: dict[str, Path],
) -> None:
    """Print the table at the end of a run. ``paths``: what was left, by its name."""
    last = records[-1]
    rewards = [record.mean_reward for record in records if record.mean_reward is not None]
    best = max(rewards, default=None)
    rows = {
        "task": settings.env,
        "algorithm": settings.algorithm,
        "iterations": f"{last.iteration + 1} of {settings.iterations}",
        "environment steps": f"{last.env_steps:,}",
        "wall time": clock(last.wall_s),
        "  collecting": clock(sum(record.collect_s for record in records)),
        "  learning": clock(sum(record.learn_s for record in records)),
        "final mean reward": number(last.mean_reward, ".1f"),
        "best mean reward": number(best, ".1f"),
        "solved": _solved(last.mean_reward, threshold),
        **{name: str(path) for name, path in paths.items()},
    }
    width = max(map(len, rows))
    rule = "-" * (width + 2 + max(map(len, rows.values())))
    console.say(rule)
    for name, text in rows.items():
        console.say(f"{name:<{width}}  {text}")
    console.say(rule)


def _solved(mean_reward: float | None, threshold: float | None) -> str:
    if threshold is None:
        return "the task names no threshold"
    verdict = "yes" if mean_reward is not None and mean_reward >= threshold else "no"
    return f"{verdict} (threshold {threshold:g})"
