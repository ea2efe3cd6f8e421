"""Timing that can be trusted on a shared machine: contenders take turns in one process, and medians are compared.

Method: contenders take turns of a few calls each, in an order that is reversed every other round (A B C, C B A, …).
Each call gets the next of several input sets. The first call of a turn finds caches full of another contender's data
and code; it is kept apart ("first call"), the median of the others is the round's time. The first rounds do not count.
Reported are the median and the spread (10th to 90th percentile) over rounds, and the median over rounds of the ratio of
two contenders' times.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch

import pyfast_ppo
from pyfast_ppo import backends

RESULTS = Path(__file__).parent / "results"


CALLS_PER_TURN = 6  # of which the first is kept apart


@dataclass
class Timing:
    """Seconds per call, one entry per round."""

    name: str
    seconds: list[float]
    first_call: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[round(share * (len(self.seconds) - 1))]

    def times_faster_than(self, other: Timing) -> float:
        """Median over rounds of the other's time by this one's."""
        return median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    contenders: dict[str, Callable[[int], object]],
    rounds: int,
    warmup: int = 3,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times each ``contender(i)``, i counting the calls of a turn; ``synchronize`` comes before reading the clock."""
    timings = {name: Timing(name, [], []) for name in contenders}
    names = list(contenders)
    for i in range(-warmup, rounds):
        for name in names if i % 2 else reversed(names):
            turn = []
            for call in range(CALLS_PER_TURN):
                start = time.perf_counter()
                contenders[name](call)
                if synchronize:
                    synchronize()
                turn.append(time.perf_counter() - start)
            if i >= 0:
                timings[name].first_call.append(turn[0])
                timings[name].seconds.append(median(turn[1:]))
    return timings


def captured(call: Callable[[int], object], num_calls: int) -> torch.cuda.CUDAGraph:
    """``call(0)`` … ``call(num_calls - 1)`` as one CUDA graph: what is timed is the GPU's work, not the launching."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in (0, 1, 2):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i)
    return graph


def interleave_graphs(
    contenders: dict[str, Callable[[int], object]], num_calls: int, rounds: int, replays: int
) -> dict[str, Timing]:
    """As ``interleave`` on a GPU: a turn is ``replays`` replays of ``num_calls`` captured calls, between two events.

    "First call" is the host's time for one call that is not captured, launches and all.
    """
    graphs = {name: captured(call, num_calls) for name, call in contenders.items()}
    timings = {name: Timing(name, [], []) for name in contenders}
    names = list(contenders)
    for i in range(-2, rounds):
        for name in names if i % 2 else reversed(names):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graphs[name].replay()
            start.record()
            for _ in range(replays):
                graphs[name].replay()
            end.record()
            end.synchronize()
            host = time.perf_counter()
            contenders[name](0)
            torch.cuda.synchronize()
            host = time.perf_counter() - host
            if i >= 0:
                timings[name].seconds.append(1e-3 * start.elapsed_time(end) / (replays * num_calls))
                timings[name].first_call.append(host)
    return timings


def gpu_backends() -> list[str]:
    """Those of which ``backend=None`` takes the first; their figures say whether it is the fastest."""
    return [s.name for s in backends.status() if s.available and s.name in ("cuda", "triton")]


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyfast_ppo": pyfast_ppo.__version__,
        "commit": _commit(),
        "backends": "; ".join(f"{s.name}: {s.detail}" for s in backends.status() if s.available),
    }


def write_results(subject: str, rows: Sequence[dict], directory: Path) -> Path:
    """One JSON file per subject, with the machine beside the figures."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{subject}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1) + "\n")
    return path


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Rows with the same cells; columns as wide as they have to be."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    print("  ".join(c.rjust(widths[c]) for c in columns))
    for row in rows:
        print("  ".join(row[c].rjust(widths[c]) for c in columns))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    try:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
