"""The soak's analysis: silent on what is flat, and not on a leak, a slowdown, or runs that cannot tell."""

from __future__ import annotations

import ctypes
import gc
import json
import sys

import pytest
import soak
import torch
from made_up_records import LOOKS, record
from runs import results, training
from runs.swing_up import CartPoleSwingUp
from runs.training import SWING_UP, Spec
from soak import condensed, findings, stability

from pyfast_ppo.rsl_rl import FusedPPO

ITERATIONS = 2000


def arms(change=lambda fused: None) -> dict[str, list[dict]]:
    """Five made-up pairs; ``change`` alters the records of FusedPPO."""
    runs = {"stock": [record(s, ITERATIONS) for s in range(5)], "fused": [record(s, ITERATIONS) for s in range(5, 10)]}
    for fused in runs["fused"]:
        change(fused)
    return {arm: [condensed(r) for r in records] for arm, records in runs.items()}


def leaking(name: str, per_iteration: float):
    def leak(fused: dict[str, list]) -> None:
        fused[name] = [n + int(per_iteration * ITERATIONS / LOOKS * i) for i, n in enumerate(fused[name])]

    return leak


def slowed(name: str, share: float):
    """The times grow in a line by ``share``."""

    def slow(fused: dict[str, list]) -> None:
        fused[name] = [ms * (1.0 + share * i / ITERATIONS) for i, ms in enumerate(fused[name])]

    return slow


def test_nothing_is_said_where_all_is_flat() -> None:
    assert findings(stability(arms(), ITERATIONS)) == []


@pytest.mark.parametrize(
    ("name", "per_iteration"),
    [("heap_bytes", 100.0), ("python_blocks", 0.5), ("tensors_alive", 0.1), ("resident_bytes", 1000.0)],
)
def test_a_small_leak_is_found(name: str, per_iteration: float) -> None:
    (sentence,) = findings(stability(arms(leaking(name, per_iteration)), ITERATIONS))
    assert sentence.startswith(f"{name} grows by ")
    report = stability(arms(leaking(name, per_iteration)), ITERATIONS)
    growth = report["fused"]["growth_per_iteration"][name]
    assert growth["low"] < per_iteration < growth["high"] or growth["estimate"] == pytest.approx(per_iteration)
    assert findings({**report, "fused": report["stock"]}) == []


@pytest.mark.parametrize("name", ["iteration_cpu_ms", "learn_cpu_ms"])
def test_a_slowdown_is_found(name: str) -> None:
    (sentence,) = findings(stability(arms(slowed(name, 0.1)), ITERATIONS))
    assert sentence.startswith(f"{name} in the last quarter is 1.0")


def test_that_of_the_machine_is_not() -> None:
    slow_machine = arms()
    for of_arm in slow_machine.values():
        for records in of_arm:
            for name in ("iteration_cpu_ms", "learn_cpu_ms"):
                records[name] = [ms * (1.0 + 0.005 * i) for i, ms in enumerate(records[name])]
    report = stability(slow_machine, ITERATIONS)
    assert report["fused"]["last_by_first_quarter"]["learn_cpu_ms"]["low"] > 1.2
    assert findings(report) == []


@pytest.mark.parametrize(("share", "told"), [(0.05, 0), (0.4, 1)])
def test_runs_that_cannot_tell_say_so(share: float, told: int) -> None:
    """Five runs, each of which becomes faster or slower by its own share, and none of them on average."""
    unsteady = arms()
    for fused, of_all in zip(unsteady["fused"], (-1.0, -0.5, 0.0, 0.5, 1.0), strict=True):
        times = fused["learn_cpu_ms"]
        fused["learn_cpu_ms"] = [ms * (1.0 + of_all * share * (i / len(times) - 0.5)) for i, ms in enumerate(times)]
    said = findings(stability(unsteady, ITERATIONS))
    assert len(said) == told
    beginning = "cannot tell whether learn_cpu_ms becomes slower: the last quarter is 0.7"
    assert all(sentence.startswith(beginning) for sentence in said)


def test_growth_that_is_left_open_is_said() -> None:
    report = stability(arms(), ITERATIONS)
    report["fused"]["growth_per_iteration"]["heap_bytes"] = {"estimate": 10.0, "low": -80.0, "high": 100.0}
    assert findings(report) == ["cannot tell whether heap_bytes grows: -80 to 100 per iteration"]


def test_a_machine_that_is_disturbed_for_a_while_is_no_slowdown() -> None:
    def disturb(fused: dict[str, list]) -> None:  # every other iteration of the second half
        for i in range(ITERATIONS // 2, ITERATIONS, 2):
            fused["learn_cpu_ms"][i] *= 3.0

    assert findings(stability(arms(disturb), ITERATIONS)) == []


def test_condensing_keeps_returns_and_takes_the_least_time_of_the_processor() -> None:
    memory = {"resident_bytes": [9], "heap_bytes": [8], "python_blocks": [7], "tensors_alive": [5]}
    short = {
        "episodes": [1, 3, 0, 0],
        "mean_return": [4.0, 8.0, None, None],
        "collect_ms": [1.0, 3.0, 5.0, 5.0],
        "update_ms": [2.0, 2.0, 4.0, 6.0],
        "iteration_cpu_ms": [3.0, 4.0, 6.0, 5.0],
        "learn_cpu_ms": [2.0, 1.0, 4.0, 3.0],
        **memory,
    }
    assert condensed(short, entries=2) == {
        "episodes": [4, 0],
        "mean_return": [7.0, None],
        "collect_ms": [2.0, 5.0],
        "update_ms": [2.0, 5.0],
        "iteration_cpu_ms": [3.0, 5.0],
        "learn_cpu_ms": [1.0, 3.0],
        **memory,
    }


class Clock:
    """In place of the module ``time``: ten milliseconds of the processor between two readings, and what is added."""

    def __init__(self) -> None:
        self.now = 0.0

    def process_time(self) -> float:
        self.now += 0.01
        return self.now


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read as on Linux")
def test_a_leak_and_a_slowdown_in_real_runs_are_found(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    iterations, kept, clock = 40, [], Clock()
    update = FusedPPO.update

    def faulty_update(self):
        kept.append(torch.ones(2**18))  # 1 MiB
        clock.now += 1e-3 * (len(kept) % iterations)
        return update(self)

    def run(arm: str, seed: int) -> dict:
        # what other tests have left is freed now, and goes back to the system: else the leak would fill it up at first
        gc.collect()
        gc.freeze()  # and what stays is not counted
        ctypes.CDLL(None).malloc_trim(0)
        return training.train(Spec(SWING_UP, arm, seed, 16, iterations, iterations // 5))

    request.addfinalizer(gc.unfreeze)
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(FusedPPO, "update", faulty_update)
    runs = {arm: [run(arm, seed) for seed in (1, 2, 3)] for arm in ("stock", "fused")}
    result = soak.soak_result(runs)
    told = [sentence.split()[0] for sentence in result["findings"]]
    assert {"heap_bytes", "tensors_alive", "resident_bytes", "iteration_cpu_ms", "learn_cpu_ms"} <= set(told)
    stable = {arm: result["stability"][arm]["growth_per_iteration"] for arm in ("stock", "fused")}
    assert stable["fused"]["tensors_alive"]["estimate"] == pytest.approx(1.0, abs=0.1)
    assert stable["fused"]["heap_bytes"]["estimate"] == pytest.approx(2**20, rel=0.1)
    assert stable["fused"]["resident_bytes"]["estimate"] == pytest.approx(2**20, rel=0.3)
    assert abs(stable["stock"]["tensors_alive"]["estimate"]) < soak.MOST_GROWTH["tensors_alive"]
    stock_drift = result["stability"]["stock"]["last_by_first_quarter"]
    assert stock_drift["learn_cpu_ms"]["estimate"] == pytest.approx(1.0)


def test_the_environment_ends_episodes_both_ways_and_hands_out_what_came_before() -> None:
    torch.manual_seed(0)
    env = CartPoleSwingUp(4)
    env._state = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [2.49, 5.0, 0.0, 0.0], [0.0, 0.0, 0.1, 0.0], [2.49, 5.0, 0.0, 0.0]]
    )
    env.episode_length_buf = torch.tensor([10, 10, 249, 249])
    obs, rewards, dones, extras = env.step(torch.zeros(4, 1))
    assert dones.tolist() == [0, 1, 1, 1]
    assert extras["terminated"].tolist() == [False, True, False, True]
    assert extras["time_outs"].tolist() == [False, False, True, False]
    assert env.episode_length_buf.tolist() == [11, 0, 0, 0]
    final = extras["final_obs"]["policy"]
    assert final[1, 0] > 2.5 and final[2, 3] > 0.9  # past the end of the track; still upright
    assert (obs["policy"][1:, 3] < -0.5).all()  # begun anew, hanging
    torch.testing.assert_close(obs["policy"][0], final[0])
    assert rewards[0] == 1.0
    torch.testing.assert_close(rewards[1], torch.tensor(0.1))


def test_a_pole_that_nobody_pushes_keeps_swinging_at_its_energy() -> None:
    torch.manual_seed(0)
    env = CartPoleSwingUp(1)
    env._state = torch.tensor([[0.0, 0.0, 2.0, 0.0]])
    cosines = []
    for _ in range(200):
        obs, _, _, _ = env.step(torch.zeros(1, 1))
        cosines.append(float(obs["policy"][0, 3]))
    assert max(cosines) == pytest.approx(torch.tensor(2.0).cos().item(), abs=0.1)
    assert min(cosines) == pytest.approx(-1.0, abs=0.05)


def test_the_result_that_is_kept_has_the_findings_of_this_script() -> None:
    kept = sorted((results.ROOT / "bench" / "results").glob("*/soak.json"))
    assert kept
    for path in kept:
        result = json.loads(path.read_bytes())
        assert result["findings"] == findings(result["stability"]), path
