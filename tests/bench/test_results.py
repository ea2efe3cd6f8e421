"""What is written can be read, says everything, and a damaged file is explained."""

from __future__ import annotations

import json
from datetime import date

import pytest

import pyfast_ppo
from pyfast_ppo.bench import machine, results, tables
from pyfast_ppo.bench.counts import Counts
from pyfast_ppo.bench.harness import Timing


def test_written_document_reads_back(document, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(results.dumps(document))
    assert results.load(path) == document
    lines = path.read_text().splitlines()
    rows = [row for subject in document["subjects"].values() for row in subject["rows"]]
    timings = sum(len(row["contenders"]) + ("floor" in row) for row in rows)
    assert sum('"seconds": [' in line and "]" in line for line in lines) == timings  # each list of numbers in one line


def test_document_says_when_and_where(document):
    assert document["date"] == document["subjects"]["loss"]["date"] == date.today().isoformat()
    about = document["machine"]
    assert about["pyfast_ppo"] == pyfast_ppo.__version__
    assert about["torch"] and about["threads"] >= 1 and about["backends"]["eager"]
    assert "turns" in document["method"] and "Peak memory" in document["method"]


def test_row_has_what_the_docstring_says():
    timings = {"a": Timing([2.0, 4.0, 6.0]), "b": Timing([1.0, 1.0, 1.0], first_call=[3.0])}
    row = results.make_row(
        {"N": 1},
        "a",
        ["b", "absent"],
        timings,
        counts={"b": Counts(5, 1, 100)},
        moved=3_000_000_000,
        floor=Timing([0.5]),
    )
    assert row["contenders"]["b"] == {
        "median_s": 1.0,
        "p10_s": 1.0,
        "p90_s": 1.0,
        "first_call_s": 3.0,
        "times_faster": 4.0,
        "gb_per_s": 3.0,
        "seconds": [1.0, 1.0, 1.0],
        "launches": 5,
        "syncs": 1,
        "peak_bytes": 100,
    }
    assert row["ours"] == ["b"]
    assert row["floor"]["gb_per_s"] == 6.0
    assert results.ratios(row, "b", "a") == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda d: d.pop("schema"), "schema 1"),
        (lambda d: d.pop("machine"), "'machine' is missing"),
        (lambda d: d["subjects"]["loss"].pop("rows"), "'loss' has no rows"),
        (lambda d: d["subjects"]["loss"]["rows"][1].pop("case"), "row 1 of 'loss' has no case"),
        (lambda d: d["subjects"]["loss"]["rows"][0]["contenders"]["rsl_rl"].pop("p10_s"), "'rsl_rl' has no p10_s"),
    ],
)
def test_damage_is_named(document, tmp_path, damage, text):
    damage(document)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is not a result") as info:
        results.load(path)
    assert text in str(info.value)


def test_file_that_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        results.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        results.load(tmp_path / "a.json")


def test_subjects_of_a_day_share_a_file_unless_the_machine_changed(document, tmp_path):
    both = {name: document["subjects"][name] for name in ("loss", "update")}
    document["subjects"] = both
    loss, update = ({**document, "subjects": {name: entry}} for name, entry in both.items())
    path = results.keep(loss, tmp_path, "")
    assert path == tmp_path / machine.short_name(document["machine"]) / f"{document['date']}.json"
    assert results.keep(update, tmp_path, "") == path
    assert results.load(path) == document
    other = {**update, "machine": {**update["machine"], "torch": "0.1"}}
    assert results.keep(other, tmp_path, "").name == f"{document['date']}-2.json"
    assert results.load(path) == document
    elsewhere = tmp_path / "else" / "where"
    assert results.keep(loss, tmp_path, str(elsewhere)).parent == elsewhere


def test_names_of_machines():
    assert machine.short_name({"device": "cpu", "cpu": "AMD EPYC (TM), 2 cores"}) == "amd-epyc-tm-2-cores"
    assert machine.short_name({"device": "cuda", "cpu": "x", "gpu": "NVIDIA H200"}) == "nvidia-h200"


def test_commit_is_only_told_of_the_own_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))  # in no repository, or in somebody else's
    assert machine.commit() is None


def test_tables_show_every_contender(document):
    text = "\n".join(tables.blocks(document["subjects"]["loss"]["rows"]))
    assert text.count("ppo_loss_and_grad") == text.count("copy of as many bytes") == 5
    assert text.count("Not measured: skrl (?)") == 1
    assert "N 24,576, A 37" in text
    assert "20.00" not in text.split("ppo_loss_and_grad")[0]  # the baseline is 1.00 times faster than itself
    assert tables.summary(document["subjects"]["loss"]["rows"][0]).endswith("20.0x rsl_rl, 3.0x torch.compile")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.23 s"), (0.5, "500 ms"), (2.5e-3, "2.5 ms"), (1e-4, "100 µs"), (2e-7, "0.2 µs")]
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text
