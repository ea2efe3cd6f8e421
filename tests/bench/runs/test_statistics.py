"""The statistics of training runs, against known distributions."""

from __future__ import annotations

import numpy as np
import pytest
from runs import statistics as run_statistics
from runs.statistics import (
    improvement_interval,
    interquartile_mean,
    iqm_difference_interval,
    iqm_interval,
    mean_interval,
    permutation_p_value,
    student_quantile,
)

TRIALS = 400


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_statistics, "DRAWS", 600)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, -100.0])) == 2.0
    assert interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])) == 4.5
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0  # too few to leave one out
    two = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [400.0, 40.0]])
    assert interquartile_mean(two).tolist() == [2.5, 25.0]


@pytest.mark.parametrize(("runs", "least", "most"), [(10, 0.85, 0.95), (40, 0.91, 0.98)])
def test_interval_holds_the_true_interquartile_mean(runs: int, least: float, most: float) -> None:
    random = rng()
    held = 0
    for _ in range(TRIALS):
        interval = iqm_interval([random.normal(3.0, 2.0, runs)], random)
        held += interval.low <= 3.0 <= interval.high
    assert least <= held / TRIALS <= most


def test_interval_of_a_difference_holds_the_true_one_over_tasks_of_different_spread() -> None:
    random = rng(1)
    held = 0
    for _ in range(TRIALS):
        ours = [random.normal(1.5, 1.0, 20), random.normal(1.5, 0.2, 20)]
        theirs = [random.normal(1.0, 1.0, 20), random.normal(1.0, 0.2, 20)]
        interval = iqm_difference_interval(ours, theirs, random)
        held += interval.low <= 0.5 <= interval.high
    assert 0.91 <= held / TRIALS <= 0.98


def test_runs_are_drawn_within_their_task_only() -> None:
    interval = iqm_interval([np.full(6, 0.0), np.full(6, 8.0)], rng())
    assert (interval.estimate, interval.low, interval.high) == (4.0, 4.0, 4.0)


def test_points_of_a_curve_have_an_interval_each() -> None:
    runs = rng().normal(0.0, 1.0, (10, 7)) + np.arange(7)
    interval = iqm_interval([runs], rng())
    assert interval.estimate.shape == interval.low.shape == interval.high.shape == (7,)
    assert (interval.low < interval.estimate).all() and (interval.estimate < interval.high).all()
    np.testing.assert_array_equal(interval.estimate, interquartile_mean(runs))


def test_probability_of_improvement() -> None:
    low, high = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    assert improvement_interval([high], [low], rng()).estimate == 1.0
    assert improvement_interval([low], [high], rng()).high == 0.0
    assert improvement_interval([low], [low], rng()).estimate == 0.5  # ties count half
    assert improvement_interval([high, low], [low, high], rng()).estimate == 0.5  # the mean over tasks
    assert improvement_interval([np.array([1.0, 3.0])], [np.array([2.0])], rng()).estimate == 0.5


def test_permutation_test_keeps_its_level_and_finds_a_difference() -> None:
    random = rng(2)
    false_alarms = sum(
        permutation_p_value([random.standard_cauchy(6)], [random.standard_cauchy(6)], random) <= 0.05
        for _ in range(TRIALS)
    )
    assert false_alarms / TRIALS <= 0.08  # four standard errors above 0.05 would be 0.094
    assert permutation_p_value([random.normal(3.0, 1.0, 8)], [random.normal(0.0, 1.0, 8)], random) < 0.01
    same = random.normal(0.0, 1.0, 5)
    assert permutation_p_value([same], [same], random) == 1.0


def test_permutation_test_deals_out_within_tasks() -> None:
    # between the tasks is a difference that labels must not carry over
    ours = [np.array([0.0, 0.1, 0.2, 0.3, 0.4]), np.array([1000.0, 1000.1, 1000.2, 1000.3, 1000.4])]
    theirs = [task + 1.0 for task in ours]
    assert permutation_p_value(ours, theirs, rng()) < 0.01


def test_students_interval() -> None:
    # the usual table
    for degrees, quantile in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (100, 1.98397)):
        assert student_quantile(degrees) == pytest.approx(quantile, rel=1e-5)
    random = rng(3)
    intervals = [mean_interval(random.normal(1.0, 5.0, 5)) for _ in range(TRIALS)]
    assert 0.92 <= np.mean([interval.low <= 1.0 <= interval.high for interval in intervals]) <= 0.98
    assert mean_interval(np.array([1.0])).low == -np.inf


def test_the_same_seed_gives_the_same_numbers() -> None:
    ours, theirs = [rng(4).normal(0.0, 1.0, 8)], [rng(5).normal(0.0, 1.0, 8)]
    for function in (iqm_difference_interval, improvement_interval, permutation_p_value):
        assert function(ours, theirs, rng(6)) == function(ours, theirs, rng(6))
