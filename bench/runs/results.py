"""Result files, and the figures that are drawn from them."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pyfast_ppo.bench.machine import cpu_name
from pyfast_ppo.files import write_atomically
from pyfast_ppo.pictures import GREY, STYLE
from runs.comparison import ARMS, Arms, curves, random_numbers
from runs.statistics import iqm_interval

ROOT = Path(__file__).parents[2]
COLORS = {"stock": "#cf222e", "fused": "#1f6feb"}
NAMES = {"stock": "rsl_rl's PPO", "fused": "FusedPPO"}
DARK = "#57606a"


NOTE = {"xycoords": "axes fraction", "ha": "right", "va": "bottom", "fontsize": 8, "color": DARK}
"""Of ``Axes.annotate``, in the corner of a panel."""


def results_path(machine: str, subject: str) -> Path:
    return ROOT / "bench" / "results" / machine / f"{subject}.json"


def figure_path(subject: str) -> Path:
    return ROOT / "docs" / f"{subject}.png"


def machine() -> dict[str, str | int]:
    """What the figures were measured on, and when."""
    return {"date": date.today().isoformat(), "cpu": f"{cpu_name()}, {os.cpu_count()} cores", "threads_per_run": 1}


def write(path: Path, result: dict) -> None:
    """JSON with a line for each list or object that holds no other; numbers to six digits."""
    text = json.dumps(_rounded(result), indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}", lambda found: re.sub(r"\s+", " ", found[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode() + b"\n")


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@contextmanager
def figure(path: Path, width: float, height: float):
    """A figure in the repository's style; written when the block ends."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        for axes in drawn.axes:
            axes.grid(color=GREY, linewidth=0.6)
            axes.set_axisbelow(True)
        image = io.BytesIO()
        drawn.savefig(image, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())


def draw_returns(axes: Axes, arms: Arms, ends: Mapping[str, float], bins: int) -> None:
    """Interquartile means over runs, with their intervals. ``ends``: where an arm's runs end on the x axis."""
    for arm in ARMS:
        shares, returns = curves(arms[arm], bins)
        band = iqm_interval([returns], random_numbers())
        x = ends[arm] * shares
        axes.fill_between(x, band.low, band.high, color=COLORS[arm], alpha=0.18, linewidth=0)
        axes.plot(x, band.estimate, color=COLORS[arm], linewidth=1.8, label=NAMES[arm])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and the names of the axes."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def text(interval: dict[str, float], digits: str = ".3g") -> str:
    """An interval as "estimate [low, high]"."""
    return f"{interval['estimate']:{digits}} [{interval['low']:{digits}}, {interval['high']:{digits}}]"


def difference_text(returns: dict) -> str:
    """Three lines on the final returns."""
    return (
        f"fused - stock: {text(returns['fused_minus_stock'])}\n"
        f"P(fused better): {text(returns['probability_that_fused_is_better'])}\n"
        f"permutation test: p = {returns['permutation_p_value']:.2f}"
    )


def keep(result: dict, name: str | None, subject: str, work: Path, draw: Callable[[Path, dict], None]) -> None:
    """Write the result and its figure: into the repository under the machine's ``name``, or into the work folder."""
    data = results_path(name, subject) if name else work / f"{subject}.json"
    picture = figure_path(subject) if name else work / f"{subject}.png"
    write(data, result)
    draw(picture, json.loads(data.read_bytes()))
    print(f"written: {data}, {picture}")


def read(name: str, subject: str) -> dict:
    """The result file of the machine ``name``; empty if there is none."""
    data = results_path(name, subject)
    return json.loads(data.read_bytes()) if data.exists() else {}


def redraw(name: str, subject: str, draw: Callable[[Path, dict], None]) -> int:
    """Draw the figure again from the result file of the machine ``name``; an exit status."""
    result = read(name, subject)
    if not result:
        print(f"{results_path(name, subject)} does not exist", file=sys.stderr)
        return 1
    draw(figure_path(subject), result)
    print(f"written: {figure_path(subject)}")
    return 0
