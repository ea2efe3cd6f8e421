"""Statistics for a handful of training runs, in NumPy: interquartile means, bootstrap intervals, permutation tests.

The interquartile mean, the stratified bootstrap and the probability of improvement are those of Agarwal et al. 2021,
"Deep Reinforcement Learning at the Edge of the Statistical Precipice" (the library rliable). Scores are a list with one
array ``[runs, ...]`` per task: the strata. Tasks of different scales have to be normalised before they are put into one
list.

Percentile intervals of ten runs are somewhat too narrow: a 95% interval of the interquartile mean holds the true value
in about nine of ten cases (tests/bench/runs/test_statistics.py). The permutation test keeps its level at any number of
runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Sequence[np.ndarray]
"""``[runs, ...]`` for each task."""

LEVEL = 0.95
DRAWS = 5000


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of confidence; arrays, where the scores had further dimensions."""

    estimate: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float

    def map(self, function: Callable) -> Interval:
        """The interval of an increasing function of what was estimated."""
        return Interval(function(self.estimate), function(self.low), function(self.high))


def interquartile_mean(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean along ``axis`` without the lowest and the highest quarter, each rounded down to whole runs."""
    count = scores.shape[axis]
    cut = count // 4
    return np.take(np.sort(scores, axis), np.arange(cut, count - cut), axis).mean(axis)


def iqm_interval(tasks: Scores, rng: np.random.Generator) -> Interval:
    """The interquartile mean over the runs of all tasks."""
    return _interval(_iqm_of_all, tasks, _resampled(tasks, rng))


def iqm_difference_interval(ours: Scores, theirs: Scores, rng: np.random.Generator) -> Interval:
    """The interquartile mean of ``ours`` minus that of ``theirs``."""
    estimate = _iqm_of_all(_as_one_draw(ours)) - _iqm_of_all(_as_one_draw(theirs))
    draws = _iqm_of_all(_resampled(ours, rng)) - _iqm_of_all(_resampled(theirs, rng))
    return _percentiles(estimate[0], draws)


def improvement_interval(ours: Scores, theirs: Scores, rng: np.random.Generator) -> Interval:
    """Probability that a run of ``ours`` beats one of ``theirs``, ties counting half; the mean over tasks."""
    estimate = _improvement(_as_one_draw(ours), _as_one_draw(theirs))
    return _percentiles(estimate[0], _improvement(_resampled(ours, rng), _resampled(theirs, rng)))


def permutation_p_value(ours: Scores, theirs: Scores, rng: np.random.Generator) -> float:
    """How often a difference of interquartile means is at least this large when labels are dealt out at random.

    Two-sided. Labels are exchanged within each task, so under the hypothesis of no difference the level is exact.
    """
    observed = abs(float((_iqm_of_all(_as_one_draw(ours)) - _iqm_of_all(_as_one_draw(theirs)))[0]))
    dealt_ours, dealt_theirs = [], []
    for a, b in zip(ours, theirs, strict=True):
        order = rng.permuted(np.tile(np.arange(len(a) + len(b)), (DRAWS, 1)), axis=1)  # [draws, runs]
        dealt = np.concatenate([a, b])[order]
        dealt_ours.append(dealt[:, : len(a)])
        dealt_theirs.append(dealt[:, len(a) :])
    differences = np.abs(_iqm_of_all(dealt_ours) - _iqm_of_all(dealt_theirs))
    at_least = np.count_nonzero(differences >= observed * (1.0 - 1e-12))  # the same deal, summed in another order
    return (1 + at_least) / (1 + DRAWS)


def mean_interval(values: np.ndarray) -> Interval:
    """Mean and Student's interval of independent, roughly normal ``values``, ``[n]``; infinite for one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = student_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def student_quantile(degrees: int) -> float:
    """Where Student's distribution has ``LEVEL`` of its mass between minus and plus this, by Simpson's rule."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        x = np.linspace(0.0, middle, 2001)
        density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
        mass = middle / 6000 * (density[0] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum() + density[-1])
        low, high = (middle, high) if mass < LEVEL / 2 else (low, middle)
    return (low + high) / 2


# A list of draws has one array [draws, runs, ...] per task.


def _as_one_draw(tasks: Scores) -> list[np.ndarray]:
    return [scores[None] for scores in tasks]


def _resampled(tasks: Scores, rng: np.random.Generator) -> list[np.ndarray]:
    """Runs drawn with replacement, as many as there are, within each task; a run's points stay together."""
    return [scores[rng.integers(len(scores), size=(DRAWS, len(scores)))] for scores in tasks]


def _iqm_of_all(draws: Scores) -> np.ndarray:
    return interquartile_mean(np.concatenate(draws, axis=1), axis=1)


def _improvement(ours: Scores, theirs: Scores) -> np.ndarray:
    per_task = [
        (np.sign(a[:, :, None] - b[:, None, :]).mean((1, 2)) + 1) / 2 for a, b in zip(ours, theirs, strict=True)
    ]
    return np.mean(per_task, axis=0)


def _interval(statistic: Callable[[Scores], np.ndarray], tasks: Scores, draws: Scores) -> Interval:
    return _percentiles(statistic(_as_one_draw(tasks))[0], statistic(draws))


def _percentiles(estimate: np.ndarray, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Interval(estimate, low, high)
