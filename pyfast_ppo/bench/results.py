"""The form in which results are kept: one JSON document per machine and date.

schema, date                        SCHEMA; YYYY-MM-DD
machine                             machine.machine()
method                              how it was measured, in words
subjects.<name>.commit              of the checkout, if it was one
subjects.<name>.seconds             of measuring that each case was given, about
subjects.<name>.rows[]
    case                            what tells this row from the others of its subject: N, A, size, part ...
    baseline                        the contender that "times_faster" compares with
    bytes                           what the operation must move; absent where that says nothing
    floor                           as a contender: a plain copy that moves as many bytes
    contenders.<name>
        median_s, p10_s, p90_s      seconds of one call
        seconds[]                   of each round; the same index is the same round in all contenders of a row
        first_call_s                median; see METHOD
        times_faster                than the baseline: median over rounds of the ratio
        gb_per_s                    bytes / median
        launches, syncs, peak_bytes one call; see METHOD
        moved_bytes                 of the tensors that its operations read and of those that they write, in a profile
    skipped.<name>                  why a contender is not there
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median

from pyfast_ppo.bench import machine as machines
from pyfast_ppo.bench.counts import Counts, Work
from pyfast_ppo.bench.harness import METHOD, Timing
from pyfast_ppo.files import write_atomically

SCHEMA = 1
_INSTRUCTIONS = {"avx2": "AVX2", "avx512": "AVX-512"}
_TIMES = ("median_s", "p10_s", "p90_s")


def new_document(device: str) -> dict:
    """A document without subjects."""
    return {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "machine": machines.machine(device),
        "method": METHOD,
        "subjects": {},
    }


def made_with(document: dict, subject: str) -> str:
    """What a subject was measured on and when, in words: the GPU, or the processor with its instructions; torch."""
    entry = document["subjects"][subject]
    about = entry.get("machine", document["machine"])
    hardware = about["gpu"] if about["device"] == "cuda" else f"{about['cpu']}, {about['threads']} threads"
    used = about["backends"].get("cpu", "") if about["device"] == "cpu" else ""
    instructions = "".join(f", {name}" for isa, name in _INSTRUCTIONS.items() if isa in used)
    return f"{hardware}{instructions}, torch {about['torch']}, {entry['date']}"


def add(document: dict, subject: str, rows: list[dict], seconds: float) -> None:
    """Adds rows of a subject, each of which was measured for about so many seconds."""
    entry = document["subjects"].setdefault(
        subject, {"date": date.today().isoformat(), "commit": machines.commit(), "seconds": seconds, "rows": []}
    )
    entry["rows"] += rows


def make_row(
    case: Mapping[str, str | int],
    baseline: str,
    ours: Iterable[str],
    timings: dict[str, Timing],
    *,
    counts: Mapping[str, Counts | Work] | None = None,
    skipped: dict[str, str] | None = None,
    notes: dict[str, str] | None = None,
    moved: int | None = None,
    floor: Timing | None = None,
) -> dict:
    """One row. ``moved``: bytes that the operation must read and write."""
    row: dict = {"case": case, "baseline": baseline, "ours": [name for name in ours if name in timings]}
    if moved is not None:
        row["bytes"] = moved
    if floor is not None:
        row["floor"] = _entry(floor, None, moved)
    row["contenders"] = {name: _entry(t, timings.get(baseline), moved) for name, t in timings.items()}
    for name, found in (counts or {}).items():
        row["contenders"][name] |= {key: value for key, value in asdict(found).items() if value is not None}
    return row | {"notes": notes or {}, "skipped": skipped or {}}


def _entry(timing: Timing, baseline: Timing | None, moved: int | None) -> dict:
    entry: dict = {"median_s": timing.median, "p10_s": timing.percentile(0.1), "p90_s": timing.percentile(0.9)}
    if timing.first_call:
        entry["first_call_s"] = median(timing.first_call)
    if baseline is not None and all(timing.seconds):  # a profile may have lines of nothing
        entry["times_faster"] = timing.times_faster_than(baseline)
    if moved is not None:
        entry["gb_per_s"] = moved / timing.median / 1e9
    entry = {key: _short(value) for key, value in entry.items()}
    return entry | {"seconds": [_short(s) for s in timing.seconds]}


def _short(value: float) -> float:
    """Four digits: more than a clock on a shared machine is good for."""
    return float(f"{value:.4g}")


def ratios(row: dict, faster: str, slower: str) -> list[float]:
    """How many times faster one contender was than another, in each round."""
    pair = [row["contenders"][name]["seconds"] for name in (slower, faster)]
    return [a / b for a, b in zip(*pair, strict=True)]


def dumps(document: dict) -> bytes:
    """As the file has it: each list of numbers in one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False)
    flat = re.sub(r"\[\s+([-+\d.e,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return flat.encode() + b"\n"


def load(path: Path) -> dict:
    """Reads a document.

    Raises:
        ValueError: The file is missing, or is no such document; the message says what is wrong with it.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    fault = fault_of(document)
    if fault is not None:
        raise ValueError(f"{path} is not a result of pyfast-ppo bench: {fault}")
    return document


def keep(document: dict, folder: Path, name: str) -> Path:
    """Writes the subjects of a document into the file of this machine and date, beside those that it has.

    ``name``: of the machine's folder; where it is an absolute path, that is the folder.
    A file of that name that was measured with other hardware or versions is left alone: the new one gets a number.
    """
    directory = folder / (name or machines.short_name(document["machine"]))
    directory.mkdir(parents=True, exist_ok=True)
    number, kept = 1, document
    while (path := directory / f"{document['date']}{f'-{number}' if number > 1 else ''}.json").exists():
        found = load(path)
        if found["machine"] == document["machine"]:
            kept = {**document, "subjects": {**found["subjects"], **document["subjects"]}}
            break
        number += 1
    write_atomically(path, dumps(kept))
    return path


def fault_of(document: object) -> str | None:
    """What is wrong with the form of a document, or None."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return f"it has no schema {SCHEMA}"
    missing = [key for key in ("date", "machine", "method", "subjects") if key not in document]
    if missing:
        return f"{missing[0]!r} is missing"
    for subject, entry in document["subjects"].items():
        absent = [key for key in ("date", "rows") if not entry.get(key)]
        if absent:
            return f"subject {subject!r} has no {absent[0]}"
        for i, row in enumerate(entry["rows"]):
            where = f"row {i} of {subject!r}"
            absent = [key for key in ("case", "baseline", "ours", "contenders") if not row.get(key)]
            if absent:
                return f"{where} has no {absent[0]}"
            for name, contender in row["contenders"].items():
                absent = [key for key in (*_TIMES, "seconds") if key not in contender]
                if absent:
                    return f"{where}: {name!r} has no {absent[0]}"
    return None
