"""What every iteration gave, kept as a CSV file beside the checkpoints."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pyfast_ppo.files import write_atomically


@dataclass(frozen=True)
class Record:
    """One iteration. ``None``: not known (no episode has ended yet; the stock algorithm reports no KL)."""

    iteration: int  # from 0, as in TensorBoard and in the names of the checkpoints
    env_steps: int  # since the beginning of the run, over all environments
    mean_reward: float | None  # of the last 100 episodes
    mean_episode_length: float | None
    kl: float | None
    learning_rate: float
    collect_s: float
    learn_s: float
    wall_s: float  # since the beginning of the run, without the time between a stop and its resume


_COLUMNS = [field.name for field in fields(Record)]
_INTEGERS = ("iteration", "env_steps")
_OPTIONAL = ("mean_reward", "mean_episode_length", "kl")


class History:
    """The records of a run, in memory and in the file."""

    def __init__(self, path: Path, before: int) -> None:
        """Keep the records of iterations below ``before``: those after the checkpoint will be made again."""
        self._path = path
        self.records = [record for record in _read(path) if record.iteration < before]
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(record) for record in self.records)
        write_atomically(path, text.getvalue().encode())

    def append(self, record: Record) -> None:
        """Add an iteration; it is in the file when this returns."""
        self.records.append(record)
        with open(self._path, "a", newline="") as file:
            csv.DictWriter(file, _COLUMNS).writerow(asdict(record))


def _read(path: Path) -> list[Record]:
    """Read the records; a line that a killed run left half written is passed over."""
    if not path.exists():
        return []
    records = []
    with open(path, newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                records.append(_record(row))
            except (KeyError, TypeError, ValueError):
                continue
    return records


def _record(row: dict[str, str]) -> Record:
    optional = {name: float(row[name]) if row[name] != "" else None for name in _OPTIONAL}
    integers = {name: int(row[name]) for name in _INTEGERS}
    others = {name: float(row[name]) for name in _COLUMNS if name not in {*_OPTIONAL, *_INTEGERS}}
    values: dict[str, Any] = {**integers, **optional, **others}
    return Record(**values)
