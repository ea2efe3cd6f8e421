"""Tables of Markdown pages come from results; those of this repository are what its results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyfast_ppo.bench import markdown, results

PAGE = "before\n<!-- results: {} some-machine -->\nold figures\n<!-- /results -->\nafter\n"


def table_of(name: str, document: dict) -> list[str]:
    page = markdown.filled(PAGE.format(name), {"some-machine": document})
    assert page.startswith(f"before\n<!-- results: {name} some-machine -->\n")
    assert page.endswith("<!-- /results -->\nafter\n") and "old figures" not in page
    assert markdown.filled(page, {"some-machine": document}) == page  # as often as one likes
    return page.splitlines()[2:-2]


def test_loss(document):
    measured, _, header, rule, *lines = table_of("loss", document)
    assert measured.endswith("; medians of 10 rounds: `python bench/bench_loss.py --seconds 8`")
    assert document["date"] in measured
    assert header.count("|") == rule.count("|") == lines[0].count("|")
    assert len(lines) == 5
    n, a, stock, other, compiled, ours, faster, than_compiled = (cell.strip() for cell in lines[2].split("|")[1:-1])
    assert (n, a, stock, other) == ("24,576", "12", "58.9 ms", "")  # no other library was there
    assert compiled == "8.83 ms" and ours.startswith("2.94 ms (2.9 ms to 2.")
    assert (faster, than_compiled) == ("20.0", "3.0")


def test_fastest_other_library(document):
    entries = document["subjects"]["loss"]["rows"][0]["contenders"]
    entries["skrl"], entries["rl_games"] = entries["rsl_rl"], {**entries["rsl_rl"], "median_s": 1e-4}
    assert "| 100 µs (rl_games) |" in table_of("loss-all", document)[4]


def test_update_and_parts(document):
    for row in document["subjects"]["update"]["rows"]:
        for entry in row["contenders"].values():
            entry |= {"launches": 1234, "syncs": 5, "peak_bytes": 2_000_000}
    lines = table_of("update", document)
    assert len(lines) == 4 + 2 * 2 and "(1.67×)" in lines[-1]
    lines = table_of("parts", document)
    assert len(lines) == 4 + 2 * 4 * 2 and lines[-1].endswith("| FusedPPO | 120 ms | 1.67 | 1,234 | 5 | 2.0 |")


def test_profile(document):
    lines = table_of("profile", document)
    assert lines[2].startswith("| size | what for | rsl_rl: operations | rsl_rl: syncs | rsl_rl: MB |")
    assert "| cartpole | between operations |  |  |  |" in "\n".join(lines)


def interval(estimate: float) -> dict:
    return {"estimate": estimate, "low": 0.9 * estimate, "high": 1.1 * estimate}


def test_learning(document):
    score = {"score_stock": interval(1.0), "score_fused": interval(0.99)}
    over = {**score, "fused_minus_stock": interval(-0.01), "permutation_p_value": 0.7}
    returns = {"final_return_stock": interval(500.0), "final_return_fused": interval(510.0)}
    task = {
        "machine": {"date": "2026-01-01", "cpu": "Abacus"},
        "made_with": {"torch": "2.0", "commit": "abc"},
        "seeds": [1, 2, 3],
        "returns": {**returns, "fused_minus_stock": interval(10.0), "permutation_p_value": 0.456},
        "times": {part: {"times_faster": interval(1.4)} for part in ("update", "iteration")},
    }
    document["learning"] = {"tasks": {"Ant-v5": task}, "over_all_tasks": over}
    measured, _, _, _, ant, everything = table_of("learning", document)
    assert "Abacus" in measured and "2026-01-01, commit abc: `python bench/learning.py --seeds 3`" in measured
    cells = "| Ant-v5 | 3 | 500 (450 to 550) | 510 (459 to 561) | 10 (9 to 11) | 0.46 | 1.4 (1.26 to 1.54) | 1.4 (1.26"
    assert ant.startswith(cells)
    assert everything.endswith("| -0.01 (-0.009 to -0.011) | 0.70 |  |  |")


def test_soak(document):
    arm = {
        "growth_per_iteration": {"heap_bytes": interval(10.0), "resident_bytes": interval(200.0)},
        "last_by_first_quarter": {"iteration_cpu_ms": interval(0.9)},
    }
    part = {"ms_stock": interval(20.0), "ms_fused": interval(10.0), "times_faster": interval(2.0)}
    document["soak"] = {
        "machine": {"date": "2026-01-01", "cpu": "Abacus"},
        "made_with": {"torch": "2.0", "commit": "abc"},
        **{"task": "Pole", "num_envs": 128, "iterations": 2000, "seeds": [1, 2, 3]},
        "stability": {"stock": arm, "fused": arm, "drift_fused_by_stock": {"iteration_cpu_ms": interval(1.0)}},
        "times": dict.fromkeys(("collect", "update", "iteration"), part),
    }
    measured, _, _, _, heap, _, drift, collect, *_ = table_of("soak", document)
    assert measured.startswith("Pole, 128 environments, 3 seeds of both; Abacus, ")
    assert measured.endswith("2026-01-01, commit abc: `python bench/soak.py --iterations 2000 --seeds 3`")
    assert heap.endswith("growth per iteration, bytes | 10 (9 to 11) | 10 (9 to 11) |  |")
    assert drift.endswith("last quarter by first | 0.9 (0.81 to 0.99) | 0.9 (0.81 to 0.99) | 1 (0.9 to 1.1) |")
    assert collect == "| collecting, ms | 20 (18 to 22) | 10 (9 to 11) | 2 (1.8 to 2.2) times as fast |"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- results: losses some-machine -->\n<!-- /results -->", "no table 'losses'; there are: loss, "),
        ("<!-- results: loss abacus -->\n<!-- /results -->", "no results of 'abacus'; there are those of: some-mach"),
        ("<!-- results: gae some-machine -->\n<!-- /results -->", "no results of 'gae' on this machine"),
        ("<!-- results: soak some-machine -->\n<!-- /results -->", "no results of 'soak' on this machine"),
    ],
)
def test_what_is_not_there(page, message, document):
    with pytest.raises(ValueError, match=message):
        markdown.filled(page, {"some-machine": document})


def test_pages_of_this_repository_say_what_the_results_say(load_script):
    plot = load_script("plot")
    documents = plot.documents(plot.HERE / "results")
    places = 0
    for path in plot.PAGES:
        text = Path(path).read_text()
        places += text.count("<!-- results: ")
        assert markdown.filled(text, documents) == text, f"{path.name}: run python bench/plot.py"
    assert places > 0 and all(results.fault_of(document) is None for document in documents.values())
