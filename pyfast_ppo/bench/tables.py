"""Rows of a result as text: one block per case, one line per contender."""

from __future__ import annotations

_COLUMNS = ("", "median", "10th to 90th", "x faster", "GB/s", "launches", "syncs", "peak MB")


def blocks(rows: list[dict]) -> list[str]:
    """Lines of all rows of a subject; then in what contenders differ, and what was left out."""
    if all("line" in row["case"] for row in rows):
        return _profiles(rows)
    lines = []
    for row in rows:
        body = [_cells(name, entry) for name, entry in row["contenders"].items()]
        if "floor" in row:
            body.append(_cells("copy of as many bytes", row["floor"]))
        used = [i for i in range(len(_COLUMNS)) if i == 0 or any(cells[i] for cells in body)]
        table = [_COLUMNS, *body]
        widths = {i: max(len(cells[i]) for cells in table) for i in used}
        lines.append(described(row["case"]))
        for cells in table:
            padded = [cells[0].ljust(widths[0]), *(cells[i].rjust(widths[i]) for i in used[1:])]
            lines.append(("  " + "  ".join(padded)).rstrip())
        lines.append("")
    remarks = {f"{name}: {note}": None for row in rows for name, note in row["notes"].items()}
    remarks |= {f"Not measured: {name} ({reason})": None for row in rows for name, reason in row["skipped"].items()}
    return [*lines, *remarks, ""] if remarks else lines


def _profiles(rows: list[dict]) -> list[str]:
    """A table for each size, its lines below each other, contenders beside each other."""
    lines = []
    for size in dict.fromkeys(row["case"]["size"] for row in rows):
        of_size = [row for row in rows if row["case"]["size"] == size]
        names = list(of_size[0]["contenders"])
        header = ["", *(f"{name}: {column}" for name in names for column in ("ops", "syncs", "MB", "time")), "floor"]
        table = [header, *(_profile_cells(row) for row in of_size)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines.append(f"size {size}")
        for first, *others in table:
            padded = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
            lines.append(("  " + "  ".join(padded)).rstrip())
        lines.append("")
    return lines


def _profile_cells(row: dict) -> list[str]:
    cells = [row["case"]["line"]]
    for entry in row["contenders"].values():
        work = [f"{entry[key]:,}" if key in entry else "" for key in ("launches", "syncs")]
        moved = f"{entry['moved_bytes'] / 1e6:,.1f}" if "moved_bytes" in entry else ""
        cells += [*work, moved, duration(entry["median_s"])]
    return [*cells, duration(row["floor"]["median_s"]) if "floor" in row else ""]


def _cells(name: str, entry: dict) -> tuple[str, ...]:
    low, high = duration(entry["p10_s"]), duration(entry["p90_s"])
    return (
        name,
        duration(entry["median_s"]),
        f"{low} to {high}",
        f"{entry['times_faster']:.2f}" if "times_faster" in entry else "",
        f"{entry['gb_per_s']:.1f}" if "gb_per_s" in entry else "",
        f"{entry['launches']:,}" if "launches" in entry else "",
        f"{entry['syncs']:,}" if "syncs" in entry else "",
        f"{entry['peak_bytes'] / 1e6:.2f}" if "peak_bytes" in entry else "",
    )


def summary(row: dict) -> str:
    """A row in one line: the fastest of ours, and the others by how much slower they are."""
    entries = row["contenders"]
    best = min(row["ours"], key=lambda name: entries[name]["median_s"])
    text = f"{best} {duration(entries[best]['median_s'])}"
    others = [name for name in entries if name not in row["ours"]]
    shown = [name for name in others if name == row["baseline"] or "compile" in name or "torch" in name]
    return ", ".join([text, *(f"{entries[n]['median_s'] / entries[best]['median_s']:.1f}x {n}" for n in shown)])


def described(case: dict) -> str:
    """A case in one line."""
    return ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in case.items())


def duration(seconds: float) -> str:
    """Three digits, in a unit that fits."""
    unit, factor = ("s", 1.0) if seconds >= 1.0 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * factor
    return f"{value:.0f} {unit}" if value >= 100.0 else f"{value:.3g} {unit}"
