"""Show by numbers which KL estimators are exact, and what the adaptive learning rate does with each."""

from __future__ import annotations

import argparse
import csv
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pyfast_ppo.cli.arguments import seed
from pyfast_ppo.cli.console import Console
from pyfast_ppo.cli.files import make_directory
from pyfast_ppo.files import write_atomically
from pyfast_ppo.pictures import GREY, STYLE

if TYPE_CHECKING:
    from pyfast_ppo import kl_study as study

ESTIMATORS = "estimators.csv"
RULES = "learning_rate.csv"
FIGURE = "kl-study.png"
DESIRED_KL = 0.01  # rsl_rl's usual one
_SHOWN_DRIFTS = (0.01, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--out", metavar="DIR", default="logs/kl-study", help="where the files go (logs/kl-study)")
    parser.add_argument("--seed", type=seed, metavar="N", default=0, help="seed of everything random (0)")
    parser.add_argument("--quick", action="store_true", help="fewer drifts, coarser integrals, fewer updates")


def run(args: argparse.Namespace) -> int:
    """Compute, print, write. Returns 0.

    Raises:
        UserError: The directory cannot be written to.
    """
    from pyfast_ppo import kl_study as study  # torch: only when it is used

    out = Path(args.out)
    make_directory(out, "--out")
    console = Console()
    per_decade, node_count, updates = (1, 5_001, 10) if args.quick else (4, 20_001, 60)
    drifts = [10.0 ** (k / per_decade) for k in range(-4 * per_decade, per_decade + 1)]
    findings = study.study_estimators(drifts, args.seed, node_count)
    for drift in _SHOWN_DRIFTS:
        _print_estimators(console, [finding for finding in findings if math.isclose(finding.drift, drift)])
    console.say("r is clamped to e^±20, as in pyfast_ppo.kl. inf: the spread without that clamp.\n")
    rules = [study.study_rule(rule, args.seed, updates) for rule in study.rules(DESIRED_KL)]
    _print_rules(console, rules)
    _write_table(out / ESTIMATORS, findings)
    _write_table(out / RULES, rules)
    written = [ESTIMATORS, RULES]
    if console.can_draw():
        draw(out / FIGURE, findings)
        written.append(FIGURE)
    console.say(f"Written to {out}: {', '.join(written)}")
    return 0


def _write_table(path: Path, rows: list[study.Finding] | list[study.RuleFinding]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    write_atomically(path, text.getvalue().encode())


# --- terminal ---------------------------------------------------------------------------------------------------------


def _print_estimators(console: Console, findings: list[study.Finding]) -> None:
    """One line per estimator: its columns for each path."""
    from pyfast_ppo.kl_study import PATHS

    console.say(f"At KL(old‖new) = {findings[0].drift:g} nats: biases relative to the exact value and gradient")
    console.say(f"{'':<51}" + "".join(f"  {path:^31}" for path in PATHS))
    columns = f"  {'value':>8}{'spread':>8}{'gradient':>10}{'cos':>5}"
    console.say(f"{'estimator':<31}{'samples':<8}{'gradient of':<12}" + columns * len(PATHS))
    lines: dict[tuple[str, str, str], str] = {}
    for f in findings:
        key = (f.estimator, f.samples, f.gradient_of)
        text = f"  {_bias(f.value_bias):>8}{f.spread:>8.2g}{_bias(f.gradient_bias):>10}{f.gradient_cosine:>5.2f}"
        lines[key] = lines.get(key, "") + text
    for (name, samples, gradient_of), text in lines.items():
        console.say(f"{name:<31}{samples:<8}{gradient_of:<12}{text}")
    console.say()


def _bias(value: float) -> str:
    """Percent. 1e-8 is no bias that anyone could see: the integral's rounding, or the clamp of r on its far tail."""
    if abs(value) < 1e-8:
        return "exact"
    return f"{100.0 * value:+.2g}%" if abs(value) < 0.1 else f"{100.0 * value:+.0f}%"


def _print_rules(console: Console, rules: list[study.RuleFinding]) -> None:
    console.say("The learning rate's rules: exact KL(old‖new) at the end of an update")
    columns = f"{'desired':>8}{'KL mean':>10}{'spread':>10}{'max':>10}{'mean lr':>10}{'reward':>9}"
    console.say(f"{'rule':<20}{'fed with':<22}{columns}")
    for r in rules:
        console.say(
            f"{r.rule:<20}{r.fed:<22}{r.desired_kl:>8.3g}{r.end_kl:>10.4f}{r.end_kl_spread:>10.4f}{r.end_kl_max:>10.4f}"
            f"{r.learning_rate:>10.1e}{r.reward:>9.3f}"
        )
    console.say()


# --- figure -----------------------------------------------------------------------------------------------------------

_STYLES = {  # estimator: label, colour, line
    "k1 as it is": ("k1", "#1f6feb", "-"),
    "k3 as it is": ("k3", "#1a7f37", "-"),
    "k2 as it is": ("k2", "#d97706", "-"),
    "k3 of the ratio clipped at 0.2": ("k3 of the clipped ratio", "#cf222e", "-"),
    "k3 clamped to ±10": ("k3 clamped to ±10", "#8250df", "--"),
    "k3 plus ℓ ∇log π": ("k3 plus ℓ ∇log π (gradient)", "#7d4e1e", "-."),
    "closed form with ε = 1e-5": ("closed form with ε = 1e-5", "#57606a", ":"),
}


def draw(path: Path, findings: list[study.Finding]) -> None:
    """Draw value, gradient and spread against drift, for samples of the old policy, one column per path."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pyfast_ppo import kl_study as study

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 9), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(3, len(study.PATHS), sharex=True, sharey="row")
        for column, name in enumerate(study.PATHS):
            _draw_path(grid[:, column], [f for f in findings if f.path == name and f.gradient_of == "KL(old‖new)"])
            grid[0, column].set_title(name)
            grid[2, column].set_xlabel("drift: exact KL(old‖new) [nats]")
        labels = ("mean estimate / exact KL", "relative error of the mean gradient", "spread of one sample / KL")
        for axes, label in zip(grid[:, 0], labels, strict=True):
            axes.set_ylabel(label)
        limit = study.exact_value(study.Policy(0.0, 0.5 * math.log(2.0)), "old_new")
        grid[2, 1].axvline(limit, color="#1a7f37", linewidth=1, linestyle=":")
        grid[2, 1].annotate(
            "k3: infinite\nfrom here", (limit, 0.97), (4, 0), ("data", "axes fraction"), "offset points", va="top"
        )
        handles, labels = grid[1, 0].get_legend_handles_labels()
        extra = [line for line in grid[0, 0].get_lines() if line.get_label().startswith("k3, mean")]
        labels += [line.get_label() for line in extra]
        figure.legend([*handles, *extra], labels, loc="outside lower center", ncols=4, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110)
    write_atomically(path, image.getvalue())


def _draw_path(cells, findings: list[study.Finding]) -> None:
    value, gradient, spread = cells
    for name, (label, color, line) in _STYLES.items():
        rows = [f for f in findings if f.estimator == name]
        x = [f.drift for f in rows]
        style = {"color": color, "linestyle": line, "linewidth": 1.8, "label": label}
        if name != "k3 plus ℓ ∇log π":  # its value is that of k3
            value.plot(x, [f.mean / f.exact_value for f in rows], **style)
        gradient.plot(x, [f.gradient_bias for f in rows], **style)
        if name in ("k1 as it is", "k2 as it is", "k3 as it is"):
            finite = [f for f in rows if math.isfinite(f.spread)]
            spread.plot([f.drift for f in finite], [f.spread / f.exact_value for f in finite], **style)
        if name == "k3 as it is":
            style |= {"linestyle": "none", "marker": "o", "markersize": 3.5, "label": "k3, mean of 24,576 samples"}
            value.plot(x, [f.mini_batch_mean / f.exact_value for f in rows], **style)
    value.set(xscale="log", yscale="log", ylim=(1e-3, 30))
    gradient.set(xscale="log", ylim=(0, 100))
    gradient.set_yscale("symlog", linthresh=0.01)
    spread.set(xscale="log", yscale="log")
    for axes in cells:
        axes.grid(color=GREY, linewidth=0.6)
        axes.set_axisbelow(True)
