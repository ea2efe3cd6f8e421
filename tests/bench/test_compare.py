"""bench/compare.py: slower, faster, neither, missing, and its exit code."""

from __future__ import annotations

import copy

import pytest

from pyfast_ppo.bench import results
from pyfast_ppo.bench.compare import compare


def scaled(document: dict, factor: float, contender: str, spread: float = 1.0) -> dict:
    """The same with one contender's times of the loss multiplied, and their spread widened."""
    changed = copy.deepcopy(document)
    for row in changed["subjects"]["loss"]["rows"]:
        entry = row["contenders"][contender]
        entry["median_s"] *= factor
        entry["p10_s"] *= factor / spread
        entry["p90_s"] *= factor * spread
    return changed


def verdicts(old: dict, new: dict) -> set[str]:
    return {change.verdict(0.1) for change in compare(old, new).changes}


def test_only_what_is_beyond_tolerance_and_spread_counts(document):
    ours = "ppo_loss_and_grad"
    assert verdicts(document, document) == {"same"}
    assert verdicts(document, scaled(document, 1.3, ours)) == {"same", "slower"}
    assert verdicts(document, scaled(document, 1 / 1.3, ours)) == {"same", "faster"}
    assert verdicts(document, scaled(document, 1.08, ours)) == {"same"}
    assert verdicts(document, scaled(document, 1.3, ours, spread=1.5)) == {"same"}


def test_only_ours_are_blamed(document):
    assert len(compare(document, scaled(document, 2.0, "ppo_loss_and_grad")).slower()) == 5
    assert compare(document, scaled(document, 2.0, "rsl_rl")).slower() == []


def test_missing_entries_are_listed(document):
    fewer = copy.deepcopy(document)
    del fewer["subjects"]["update"]
    del fewer["subjects"]["loss"]["rows"][0]["contenders"]["torch.compile"]
    found = compare(document, fewer)
    assert len(found.only_old) == 1 + 20 and found.only_new == []
    assert found.only_old[0] == "loss, N 1024, A 12, old_std [N, A], input sets 4, torch.compile"
    assert len(compare(fewer, document).only_new) == 21


@pytest.fixture
def run(document, load_script, tmp_path, capsys):
    script = load_script("compare")

    def run(new: dict, *flags: str) -> tuple[int, str]:
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, made in zip(paths, (document, new), strict=True):
            path.write_bytes(results.dumps(made))
        code = script.main([*map(str, paths), *flags])
        return code, capsys.readouterr().out

    return run


def test_exit_code(document, run):
    slower = scaled(document, 1.3, "ppo_loss_and_grad")
    code, out = run(slower)
    assert code == 1
    assert "5 of pyfast_ppo's entries got slower by more than 10%" in out
    assert out.count("1.30") >= 10  # in the table and in the list
    assert run(slower, "--tolerance", "0.5")[0] == 0
    assert run(document)[0] == 0


def test_another_machine_is_told(document, run):
    code, out = run({**document, "machine": {**document["machine"], "threads": 77}})
    assert code == 0
    assert out.startswith(f"not the same machine: threads: {document['machine']['threads']} -> 77")


@pytest.mark.parametrize("flags", [["nowhere.json", "nowhere.json"], ["a"], ["a", "b", "--tolerance", "-1"]])
def test_wrong_arguments(flags, load_script, capsys):
    with pytest.raises(SystemExit) as info:
        load_script("compare").main(flags)
    assert info.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_nothing_in_common(document, run):
    with pytest.raises(SystemExit) as info:
        run({**document, "subjects": {}})
    assert info.value.code == 2
