"""Runs of the stock and of FusedPPO, compared in return and in time. A record is what training.RunRecord takes down.

Everything here is a function of what the result files hold, with a fixed seed: the same file gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from runs.statistics import (
    Interval,
    improvement_interval,
    interquartile_mean,
    iqm_difference_interval,
    iqm_interval,
    permutation_p_value,
)

ARMS = ("stock", "fused")
Record = Mapping[str, list]
Arms = Mapping[str, Sequence[Record]]
"""Records by arm, those of a pair at the same place."""

_FINAL = 10  # the last return is that of the last of so many parts of a run


def random_numbers() -> np.random.Generator:
    """For the bootstrap."""
    return np.random.default_rng(0)


def bin_edges(length: int, bins: int) -> np.ndarray:
    """Where bins of about the same length begin, and the end of the last, ``[bins + 1]``."""
    return np.linspace(0, length, min(bins, length) + 1).round().astype(int)


def mean_returns(record: Record, edges: np.ndarray) -> np.ndarray:
    """Mean return of the episodes that ended between two ``edges``, ``[bins]``; NaN where none did."""
    episodes = np.array(record["episodes"], dtype=float)
    sums = np.array([mean or 0.0 for mean in record["mean_return"]]) * episodes
    counts = np.add.reduceat(episodes, edges[:-1])
    return np.where(counts > 0, np.add.reduceat(sums, edges[:-1]), np.nan) / np.maximum(counts, 1.0)


def final_return(record: Record) -> float:
    """Mean return of the episodes that ended in the last tenth of the run; of the tenth before, if none did."""
    means = mean_returns(record, bin_edges(len(record["episodes"]), _FINAL))
    return float(means[np.isfinite(means)][-1])


def final_returns(records: Sequence[Record]) -> np.ndarray:
    """Of each run, ``[runs]``."""
    return np.array([final_return(record) for record in records])


def curves(records: Sequence[Record], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the bins as shares of the run, ``[points]``, and mean returns ``[runs, points]``.

    Bins in which a run has no episode that ended are left out.
    """
    edges = bin_edges(len(records[0]["episodes"]), bins)
    returns = np.stack([mean_returns(record, edges) for record in records])
    known = np.isfinite(returns).all(0)
    return ((edges[:-1] + edges[1:]) / 2 / edges[-1])[known], returns[:, known]


def compare_returns(arms: Arms) -> dict:
    """Final returns of both arms, their difference, and whether it is more than chance."""
    rng = random_numbers()
    stock, fused = (final_returns(arms[arm]) for arm in ARMS)
    return {
        "final_return_stock": as_json(iqm_interval([stock], rng)),
        "final_return_fused": as_json(iqm_interval([fused], rng)),
        "mean_and_std_stock": [float(stock.mean()), float(stock.std(ddof=1))],
        "mean_and_std_fused": [float(fused.mean()), float(fused.std(ddof=1))],
        "fused_minus_stock": as_json(iqm_difference_interval([fused], [stock], rng)),
        "probability_that_fused_is_better": as_json(improvement_interval([fused], [stock], rng)),
        "permutation_p_value": permutation_p_value([fused], [stock], rng),
    }


def compare_over_tasks(tasks: Sequence[Arms]) -> dict:
    """The same over several tasks, each of them a stratum.

    Scores are 0 at the mean return of the first episodes and 1 at the interquartile mean of the final returns, of both
    arms taken together: a scale that does not favour either.
    """
    rng = random_numbers()
    scores: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    for arms in tasks:
        records = [record for arm in ARMS for record in arms[arm]]
        first = curves(records, _FINAL)[1][:, 0].mean()
        unit = interquartile_mean(final_returns(records)) - first
        for arm in ARMS:
            scores[arm].append((final_returns(arms[arm]) - first) / unit)
    return {
        "score_stock": as_json(iqm_interval(scores["stock"], rng)),
        "score_fused": as_json(iqm_interval(scores["fused"], rng)),
        "fused_minus_stock": as_json(iqm_difference_interval(scores["fused"], scores["stock"], rng)),
        "probability_that_fused_is_better": as_json(improvement_interval(scores["fused"], scores["stock"], rng)),
        "permutation_p_value": permutation_p_value(scores["fused"], scores["stock"], rng),
    }


def compare_times(arms: Arms) -> dict:
    """Milliseconds of an iteration by its parts, and how much faster FusedPPO is, pair by pair.

    A run's time is the median over its iterations. An iteration is collecting (acting, the environments, returns) and
    ``update()``.
    """
    rng = random_numbers()
    report: dict = {}
    for part in ("collect", "update", "iteration"):
        stock, fused = (np.array([_median_ms(record, part) for record in arms[arm]]) for arm in ARMS)
        report[part] = {
            "ms_stock": as_json(iqm_interval([stock], rng)),
            "ms_fused": as_json(iqm_interval([fused], rng)),
            "times_faster": as_json(iqm_interval([np.log(stock / fused)], rng).map(np.exp)),
        }
    return report


def iteration_ms(record: Record) -> np.ndarray:
    """Collecting and update, one entry per entry of the record."""
    return np.array(record["collect_ms"]) + np.array(record["update_ms"])


def as_json(interval: Interval) -> dict[str, float]:
    """Of single numbers."""
    return {name: float(value) for name, value in asdict(interval).items()}


def _median_ms(record: Record, part: str) -> float:
    return float(np.median(iteration_ms(record) if part == "iteration" else record[f"{part}_ms"]))
