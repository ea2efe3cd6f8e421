"""Pictures of a result. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pyfast_ppo.bench.results import made_with
from pyfast_ppo.bench.tables import duration
from pyfast_ppo.pictures import GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#24292f"
_STYLES = {  # contender: colour, width, marker
    "rsl_rl": ("#cf222e", 2.2, "o"),
    "torch.compile": ("#d97706", 2.2, "s"),
    "torch.compile, CUDA graph": ("#b45309", 1.8, "s"),
    "skrl": ("#8250df", 1.2, "v"),
    "rl_games": ("#7d4e1e", 1.2, "^"),
    "TorchRL": ("#57606a", 1.2, "D"),
    "Stable-Baselines3": ("#bf3989", 1.2, "P"),
    "ppo_loss + backward": ("#54aeff", 1.6, "o"),
    "ppo_loss_and_grad": ("#0550ae", 2.8, "o"),
    "ppo_loss_and_grad, CUDA graph, cuda": ("#1a7f37", 2.8, "o"),
    "ppo_loss_and_grad, CUDA graph, triton": ("#2da44e", 1.8, "s"),
}
_LINE_COLORS = {
    "matrix products": "#0550ae",
    "bias and activation": "#54aeff",
    "loss, KL, metrics": "#cf222e",
    "gradients, optimizer": "#d97706",
    "mini-batches": "#8250df",
    "sampling, storing": "#1a7f37",
    "returns": "#7ee787",
    "between operations": "#8c959f",
}
_ARITHMETIC, _REDUCTION, _MOVE, _FUSED = "#54aeff", "#d97706", "#8c959f", "#1a7f37"
_KINDS = {
    **dict.fromkeys(("sum", "mean"), ("sums", _REDUCTION)),
    **dict.fromkeys(("eq", "ge", "gt", "le", "lt", "where", "masked_fill_", "logical_and_"), ("masks", _MOVE)),
    "ppo_loss": ("the kernel of pyfast_ppo", _FUSED),
}
_PARTS = {"act": "#54aeff", "process_env_step": "#a5d6ff", "compute_returns": "#1a7f37", "update": "#0550ae"}
_PART_LABELS = {"process_env_step": "store the step"}


def draw_loss(document: dict) -> bytes | None:
    """Time against N and against A, with the bandwidth floor; None: there is nothing to be drawn."""
    rows = [
        row
        for row in document["subjects"].get("loss", {}).get("rows", [])
        if row["case"]["old_std"] == "[N, A]" and row["case"]["input sets"] > 1
    ]
    panels = [(x, fixed, sweep) for x, fixed in (("N", "A"), ("A", "N")) if len(sweep := _sweep(rows, x, fixed)) > 1]
    if not panels:
        return None
    figure = _figure((10.5, 4.6))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (x, _, sweep) in zip(grid, panels, strict=True):
        _draw_sweep(axes, sweep, x)
    bottom = grid[0].get_ylim()[0]
    for axes, (x, fixed, sweep) in zip(grid, panels, strict=True):
        at, floor = [row["case"][x] for row in sweep], [row["floor"]["median_s"] for row in sweep]
        axes.fill_between(at, floor, bottom, color=GREY, alpha=0.5, linewidth=0)
        axes.set_xlabel(("rows N" if x == "N" else "actions A") + f"   ({fixed} = {sweep[0]['case'][fixed]:,})")
    grid[0].set_ylim(bottom=bottom)
    grid[0].set_ylabel("time of the loss and all its gradients")
    figure.suptitle(f"One mini-batch, {made_with(document, 'loss')}", x=0.01, ha="left", fontsize=11, color=_INK)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return _png(figure)


def _sweep(rows: list[dict], x: str, fixed: str) -> list[dict]:
    """The rows with the most common value of ``fixed``, by ``x``."""
    values = [row["case"][fixed] for row in rows]
    common = max(set(values), key=lambda v: (len({r["case"][x] for r in rows if r["case"][fixed] == v}), v), default=0)
    return sorted((row for row in rows if row["case"][fixed] == common), key=lambda row: row["case"][x])


def _draw_sweep(axes: Axes, sweep: list[dict], x: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    at = [row["case"][x] for row in sweep]
    floor = [row["floor"]["median_s"] for row in sweep]
    names = {name: None for row in sweep for name in row["contenders"]}
    last = sweep[-1]["contenders"]
    for name in sorted(names, key=lambda name: -last.get(name, {"median_s": 0.0})["median_s"]):
        points = [(row["case"][x], row["contenders"][name]) for row in sweep if name in row["contenders"]]
        color, width, marker = _STYLES.get(name, (_INK, 1.2, "x"))
        place = [p for p, _ in points]
        if width > 2.0:  # of the others the spread would only hide the lines
            low, high = [e["p10_s"] for _, e in points], [e["p90_s"] for _, e in points]
            axes.fill_between(place, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(
            place,
            [e["median_s"] for _, e in points],
            color=color,
            linewidth=width,
            marker=marker,
            markersize=3.5 + width / 2,
            label=name,
        )
    axes.plot(
        at, floor, color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), label="bandwidth floor:\na copy of as many bytes"
    )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(at, [f"{value:,}" for value in at])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.grid(color=GREY, linewidth=0.6)
    axes.margins(x=0.04)
    axes.set_axisbelow(True)


def draw_iteration(document: dict) -> bytes | None:
    """Where an iteration's time goes, a bar for each contender and a panel for each size; None: nothing there."""
    return _draw_panels(document, "update", "part", _draw_parts, "One iteration", height=1.9, columns=len(_PARTS))


def draw_profile(document: dict) -> bytes | None:
    """What an iteration's time is spent on, stock, fused and floor, a panel for each size; None: nothing there."""
    return _draw_panels(document, "profile", "line", _draw_lines, "What the time is spent on", height=1.6, columns=4)


def _draw_panels(
    document: dict,
    subject: str,
    key: str,
    draw_panel: Callable[[Axes, dict[str, dict]], None],
    title: str,
    *,
    height: float,
    columns: int,
) -> bytes | None:
    """A panel for each size, which gets its rows by ``key`` of their case. ``columns``: of the legend."""
    rows = document["subjects"].get(subject, {}).get("rows", [])
    sizes = {row["case"]["size"]: None for row in rows}
    if not sizes:
        return None
    figure = _figure((10.5, 1.1 + height * len(sizes)))
    for axes, size in zip(figure.subplots(len(sizes), 1, squeeze=False)[:, 0], sizes, strict=True):
        draw_panel(axes, {row["case"][key]: row for row in rows if row["case"]["size"] == size})
        axes.set_title(size.replace("_", " "), loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("ms of one iteration, without the environment's steps")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(f"{title}, {made_with(document, subject)}", x=0.01, ha="left", fontsize=11, color=_INK)
    return _png(figure)


def _draw_parts(axes: Axes, by_part: dict[str, dict]) -> None:
    whole = by_part["iteration"]
    texts = {
        name: duration(entry["median_s"]) + ("" if name == whole["baseline"] else f"   {entry['times_faster']:.2f}x")
        for name, entry in whole["contenders"].items()
    }
    bars = [
        (_PART_LABELS.get(part, part), color, [e["median_s"] for e in by_part[part]["contenders"].values()])
        for part, color in _PARTS.items()
    ]
    _draw_bars(axes, bars, texts, room=1.18)


def _draw_lines(axes: Axes, by_line: dict[str, dict]) -> None:
    whole = by_line["iteration"]
    texts = {
        name: f"{duration(entry['median_s'])}, {entry['launches']:,} operations"
        for name, entry in whole["contenders"].items()
    }
    texts["floor"] = duration(whole["floor"]["median_s"])
    bars = [
        (line, color, [e["median_s"] for e in (*row["contenders"].values(), row.get("floor", {"median_s": 0.0}))])
        for line, color in _LINE_COLORS.items()
        for row in [by_line[line]]
    ]
    _draw_bars(axes, bars, texts, room=1.4)


def _draw_bars(
    axes: Axes, bars: Sequence[tuple[str, str, Sequence[float]]], texts: Mapping[str, str], room: float
) -> None:
    """One bar for each name in ``texts``, made of (label, color, seconds of each name), with its text behind it."""
    names = list(texts)
    left = [0.0] * len(names)
    for label, color, seconds in bars:
        widths = [1e3 * s for s in seconds]
        axes.barh(names, widths, left=left, color=color, height=0.72, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, name in enumerate(names):
        axes.text(left[at], at, f"  {texts[name]}", va="center", fontsize=9, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0.0, room * max(left))
    axes.grid(axis="x", color=GREY, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)


def draw_timeline(document: dict) -> bytes | None:
    """Loss and gradients of a mini-batch, one operation after the other, stock above and fused below; or None."""
    rows = document["subjects"].get("timeline", {}).get("rows", [])
    if not rows:
        return None
    row = rows[0]
    names = list(row["contenders"])
    figure = _figure((10.5, 2.9))
    axes = figure.subplots()
    labelled: set[str] = set()
    longest = 0.0
    for at, name in enumerate(names):
        left = 0.0
        for operation, seconds in row["contenders"][name]["operations"]:
            kind, color = _KINDS.get(operation, ("arithmetic", _ARITHMETIC))
            label = None if kind in labelled else kind
            labelled.add(kind)
            axes.barh(
                at, 1e3 * seconds, left=left, color=color, height=0.6, edgecolor="white", linewidth=0.7, label=label
            )
            left += 1e3 * seconds
        number = len(row["contenders"][name]["operations"])
        text = f"{number} operations" if number > 1 else "one pass"
        axes.text(left, at, f"  {text}: {duration(1e-3 * left)}", va="center", fontsize=10, color=_INK)
        longest = max(longest, left)
    axes.set_yticks(range(len(names)), ["rsl_rl", "pyfast_ppo"])
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.3 * longest)
    axes.set_xlabel("ms")
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    case = f"{row['case']['N']:,} rows, {row['case']['A']} actions"
    title = f"Log-probabilities, ratio, surrogate, value loss, entropy, KL and their gradients: {case}"
    figure.suptitle(f"{title}\n{made_with(document, 'timeline')}", x=0.01, ha="left", fontsize=11, color=_INK)
    return _png(figure)


FIGURES = {"loss": draw_loss, "iteration": draw_iteration, "profile": draw_profile, "timeline": draw_timeline}


def draw(document: dict) -> dict[str, bytes]:
    """Each picture that there is something for, by its name, as PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        images = {name: function(document) for name, function in FIGURES.items()}
    return {name: image for name, image in images.items() if image is not None}


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
