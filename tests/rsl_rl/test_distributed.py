"""Two processes that average their gradients: gloo, on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
TIMEOUT = 240.0  # seconds


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the two processes saved."""
    folder = tmp_path_factory.mktemp("distributed")
    commands = [[sys.executable, str(WORKER), str(rank), str(folder)] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def trained(state: dict) -> dict:
    """Without RND's target network, which stays as it is: rsl_rl sends it to the other ranks since 5.5 only."""
    return {name: t for name, t in state.items() if not name.startswith("rnd_state_dict.target.")}


RUNS = ["stock", "fused", "default", "another rate in the first", "proportional", "rsl_rl_4", "early_stop", "penalty"]


@pytest.mark.parametrize("run", RUNS)
def test_the_ranks_end_with_the_same_parameters_and_learning_rate(
    run: str, ranks: list[dict], state_distance: Callable
) -> None:
    """Bit for bit, although each has experience of its own."""
    first, second = (rank[run] for rank in ranks)
    assert state_distance(trained(first["before"]), trained(second["before"])) > 0.1
    assert state_distance(trained(first["state"]), trained(first["before"])) > 0.01
    assert state_distance(trained(first["state"]), trained(second["state"])) == 0.0
    assert first["rates"] == second["rates"]
    assert len(set(first["rates"])) > 2
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize(("run", "key"), [("early_stop", "skipped_steps"), ("penalty", "kl_coef")])
def test_the_ranks_react_alike_to_the_kl(run: str, key: str, ranks: list[dict]) -> None:
    """Each has a KL of its own; what follows from the KL is decided by the mean."""
    first, second = ([losses[key] for losses in rank[run]["losses"]] for rank in ranks)
    assert first == second
    assert len(set(first)) > 1
    kls = [[losses["max_kl"] for losses in rank[run]["losses"]] for rank in ranks]
    assert kls[0] != kls[1]


def test_graphs_reduce_over_the_ranks(ranks: list[dict], state_distance: Callable) -> None:
    """The reductions are recorded with the rest; a replay gives the same bits."""
    for rank in ranks:
        replayed, plain = rank["cuda_graph=True"], rank["cuda_graph=False"]
        assert replayed["records"] == [replayed["steps"] + 1, 1]
        assert state_distance(replayed["state"], plain["state"]) == 0.0
        assert replayed["losses"] == plain["losses"]
    states = [trained(rank["cuda_graph=True"]["state"]) for rank in ranks]
    assert state_distance(*states) == 0.0


def test_they_end_where_ppo_ends(ranks: list[dict], state_distance: Callable) -> None:
    """To rounding, as in test_parity.py. PPO sends the learning rate to the other ranks in float32."""
    for rank in ranks:
        assert rank["fused"]["rates"] == pytest.approx(rank["stock"]["rates"], rel=1e-6)
        assert rank["nudged"]["rates"] == rank["stock"]["rates"]
        yardstick = state_distance(rank["nudged"]["state"], rank["stock"]["state"])
        print(f"one ulp {yardstick:.1e}, {state_distance(rank['fused']['state'], rank['stock']['state']):.1e}")
        assert yardstick < 1e-3
        assert state_distance(rank["fused"]["state"], rank["stock"]["state"]) <= 10.0 * max(yardstick, 1e-6)


def without_counts(state: dict) -> dict:
    """Two processes that see the same count twice as much."""
    return {name: t for name, t in state.items() if not name.endswith("count")}


@pytest.mark.parametrize("run", ["halves", "halves, per mini-batch"])
def test_two_halves_are_one_whole(run: str, ranks: list[dict], state_distance: Callable) -> None:
    """Two processes with half of the environments each end as one that has all, to rounding; advantages are normalised
    by the statistics of all."""
    for rank in ranks:
        whole, half = (without_counts(rank[run][part]) for part in ("whole", "half"))
        assert state_distance(half, whole) < 1e-4
        assert rank[run]["rates"][0] == pytest.approx(rank[run]["rates"][1], rel=1e-9)
    assert state_distance(ranks[0][run]["half"], ranks[1][run]["half"]) == 0.0


def test_statistics_of_their_own_make_another_whole(ranks: list[dict], state_distance: Callable) -> None:
    """As in PPO, where each process normalises by itself."""
    run = ranks[0]["halves, statistics of their own"]
    assert state_distance(without_counts(run["half"]), without_counts(run["whole"])) > 1e-3


def test_each_rank_reports_its_own_losses(ranks: list[dict]) -> None:
    for rank in ranks:
        for ours, theirs in zip(rank["fused"]["losses"], rank["stock"]["losses"], strict=True):
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-2, abs=1e-3)
