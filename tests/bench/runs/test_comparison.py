"""What is taken from the records of runs."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_records import record
from runs.comparison import (
    compare_over_tasks,
    compare_returns,
    compare_times,
    curves,
    final_return,
    mean_returns,
)


def short(episodes: list[int], mean_return: list[float | None]) -> dict[str, list]:
    return {"episodes": episodes, "mean_return": mean_return}


def test_mean_returns_weigh_episodes_alike() -> None:
    of_four = short([1, 3, 0, 2], [10.0, 2.0, None, 5.0])
    assert mean_returns(of_four, np.array([0, 2, 4])).tolist() == [4.0, 5.0]
    np.testing.assert_array_equal(mean_returns(of_four, np.arange(5)), [10.0, 2.0, np.nan, 5.0])


def test_final_return_is_that_of_the_last_tenth_in_which_an_episode_ended() -> None:
    assert final_return(short([1] * 20, [0.0] * 18 + [3.0, 5.0])) == 4.0
    assert final_return(short([1] * 18 + [0, 0], [0.0] * 17 + [6.0, None, None])) == 3.0


def test_curves_leave_out_bins_that_a_run_knows_nothing_of() -> None:
    shares, returns = curves([short([0, 1, 1, 1], [None, 1, 2, 3]), short([1, 1, 0, 1], [4, 5, None, 6])], bins=4)
    assert shares.tolist() == [0.375, 0.875]
    assert returns.tolist() == [[1.0, 3.0], [5.0, 6.0]]


def test_equal_arms_are_not_told_apart_and_unequal_ones_are() -> None:
    stock = [record(seed) for seed in range(8)]
    alike = compare_returns({"stock": stock, "fused": [record(seed) for seed in range(10, 18)]})
    assert alike["fused_minus_stock"]["low"] < 0.0 < alike["fused_minus_stock"]["high"]
    assert alike["permutation_p_value"] > 0.05
    better = compare_returns({"stock": stock, "fused": [record(seed, height=130.0) for seed in range(10, 18)]})
    assert better["fused_minus_stock"]["low"] > 20.0
    assert better["probability_that_fused_is_better"]["low"] == 1.0
    assert better["permutation_p_value"] < 0.01


def test_scores_over_tasks_do_not_hang_on_their_scales() -> None:
    small = {
        "stock": [record(seed, height=100.0) for seed in range(8)],
        "fused": [record(seed, height=110.0) for seed in range(10, 18)],
    }
    large = {
        arm: [{**r, "mean_return": [50.0 * m for m in r["mean_return"]]} for r in records]
        for arm, records in small.items()
    }
    one, two = compare_over_tasks([small, small]), compare_over_tasks([small, large])
    assert one["fused_minus_stock"] == pytest.approx(two["fused_minus_stock"])
    # 10 of about 105, and the noise of runs
    assert 0.05 < one["fused_minus_stock"]["estimate"] < 0.2


def test_times_are_compared_within_pairs() -> None:
    # a machine that is twice as slow for every other pair
    stock = [record(seed, update_ms=40.0 * (1 + seed % 2)) for seed in range(8)]
    fused = [record(seed + 10, update_ms=20.0 * (1 + seed % 2)) for seed in range(8)]
    faster = compare_times({"stock": stock, "fused": fused})["update"]["times_faster"]
    assert 1.9 < faster["low"] < faster["estimate"] < faster["high"] < 2.1
