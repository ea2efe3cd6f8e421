"""What got slower between two results of one machine."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 0.10


@dataclass(frozen=True)
class Change:
    """One contender in one case, in both results. ``ratio``: new median by old median."""

    subject: str
    case: str
    contender: str
    ours: bool
    old_s: float
    new_s: float
    apart: bool  # the spreads, 10th to 90th percentile, do not overlap

    @property
    def ratio(self) -> float:
        """Above 1: slower."""
        return self.new_s / self.old_s

    def verdict(self, tolerance: float) -> str:
        """ "slower" and "faster" only where the medians differ by more than the tolerance and the spreads are apart."""
        if self.apart and self.ratio > 1.0 + tolerance:
            return "slower"
        if self.apart and self.ratio < 1.0 / (1.0 + tolerance):
            return "faster"
        return "same"


@dataclass(frozen=True)
class Comparison:
    """Entries of both results, and those that are in one only, as text."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]

    def slower(self, tolerance: float = TOLERANCE) -> list[Change]:
        """Contenders of ours that got slower; what other libraries do is not this one's fault."""
        return [change for change in self.changes if change.ours and change.verdict(tolerance) == "slower"]


def compare(old: dict, new: dict) -> Comparison:
    """Matches entries by subject, case and contender. ``old``, ``new``: documents as ``results.load`` gives them."""
    olds, news = _entries(old), _entries(new)
    changes = []
    for key in (key for key in olds if key in news):
        (a, _), (b, ours) = olds[key], news[key]
        apart = b["p10_s"] > a["p90_s"] or a["p10_s"] > b["p90_s"]
        changes.append(Change(*key, ours, a["median_s"], b["median_s"], apart))
    return Comparison(
        changes,
        only_old=[", ".join(key) for key in olds if key not in news],
        only_new=[", ".join(key) for key in news if key not in olds],
    )


def differences(old: dict, new: dict) -> list[str]:
    """What is not the same about the two machines, one line each."""
    keys = [key for key in {**old["machine"], **new["machine"]} if old["machine"].get(key) != new["machine"].get(key)]
    return [f"{key}: {old['machine'].get(key)} -> {new['machine'].get(key)}" for key in keys]


def _entries(document: dict) -> dict[tuple[str, str, str], tuple[dict, bool]]:
    found = {}
    for subject, entry in document["subjects"].items():
        for row in entry["rows"]:
            case = ", ".join(f"{key} {value}" for key, value in row["case"].items())
            for name, contender in row["contenders"].items():
                found[subject, case, name] = (contender, name in row["ours"])
    return found
