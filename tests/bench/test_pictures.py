"""Pictures are drawn from results: whole PNGs of a sane size, and none where there is nothing to show."""

from __future__ import annotations

import struct

import pytest

from pyfast_ppo.bench import figures, results


def size_of(image: bytes) -> tuple[int, int]:
    assert image.startswith(b"\x89PNG") and image.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", image[16:24])


def test_all_pictures(document):
    images = figures.draw(document)
    assert list(images) == ["loss", "iteration", "profile", "timeline"]
    for image in images.values():
        width, height = size_of(image)
        assert 1000 < width < 2000 and 300 < height < 1500
        assert 20_000 < len(image) < 400_000


def test_what_was_not_measured_is_not_drawn(document):
    for subject in ("update", "profile", "timeline"):
        del document["subjects"][subject]
    assert list(figures.draw(document)) == ["loss"]
    document["subjects"]["loss"]["rows"] = document["subjects"]["loss"]["rows"][:1]  # one point is no curve
    assert figures.draw(document) == {}


def test_contender_that_is_missing_somewhere(document):
    """One that was skipped in a case, the last one among them, and one that has no style of its own."""
    rows = document["subjects"]["loss"]["rows"]
    del rows[2]["contenders"]["torch.compile"]
    rows[0]["contenders"]["another library"] = rows[0]["contenders"]["rsl_rl"]
    assert "loss" in figures.draw(document)


def test_plot_draws_the_newest_of_each_machine(document, load_script, tmp_path, capsys):
    there = tmp_path / "results" / "some-machine"
    there.mkdir(parents=True)
    (tmp_path / "results" / "empty").mkdir()
    (there / "note.json").write_text("{}")
    (tmp_path / "page.md").write_text("<!-- results: loss some-machine -->\n<!-- /results -->\n")
    old, new = ({**document, "subjects": {n: document["subjects"][n]}} for n in ("update", "loss"))
    old["machine"] = {**old["machine"], "backends": {"cpu": "C++ (avx512), 2 threads"}, "torch": "2.9"}
    (there / "2026-01-01.json").write_bytes(results.dumps(old))
    (there / "2026-01-02.json").write_bytes(results.dumps(new))
    plot = load_script("plot")
    assert (
        plot.main(
            ["--results", str(tmp_path / "results"), "--out", str(tmp_path), "--pages", str(tmp_path / "page.md")]
        )
        == 0
    )
    assert "| 24,576 | 12 |" in (tmp_path / "page.md").read_text()
    newest = plot.newest(there)  # each subject with the machine that it was measured on
    assert ", AVX-512, torch 2.9, " in results.made_with(newest, "update")
    assert ", AVX-512, torch 2.9, " not in results.made_with(newest, "loss")
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["bench-iteration-some-machine.png", "bench-loss-some-machine.png"]
    assert capsys.readouterr().out.count("some-machine.png") == 2


def test_of_one_day_the_last_file_counts(document, load_script, tmp_path):
    for number, torch in enumerate(["2.9", "2.10", "2.11"] + ["2.12"] * 8):
        name = "2026-01-01.json" if number == 0 else f"2026-01-01-{number + 1}.json"
        (tmp_path / name).write_bytes(results.dumps({**document, "machine": {**document["machine"], "torch": torch}}))
    assert load_script("plot").newest(tmp_path)["machine"]["torch"] == "2.12"
    for path in tmp_path.glob("2026-01-01-?*.json"):
        if path.name != "2026-01-01-2.json":
            path.unlink()
    assert load_script("plot").newest(tmp_path)["machine"]["torch"] == "2.10"


@pytest.mark.parametrize("flag", ["--results", "--out"])
def test_plot_says_which_directory_is_missing(flag, load_script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_script("plot").main([flag, str(tmp_path / "nowhere")])
    assert f"{flag} {tmp_path / 'nowhere'} is not a directory" in capsys.readouterr().err
