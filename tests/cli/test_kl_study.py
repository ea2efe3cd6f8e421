"""The study: exact rows are exact, known biases are found, files are whole, and docs/kl.md quotes what it says."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from pyfast_ppo import kl
from pyfast_ppo import kl_study as study
from pyfast_ppo.cli import kl_study as command
from pyfast_ppo.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "kl.md").read_text()
DRIFTS = [1e-4, 0.01, 0.05, 1.0]
# Estimators that are exact; a k2 has an exact gradient and a biased value
EXACT_VALUE = ("closed form", "k1 as it is", "k3 as it is", "loss k1", "loss k3", "k3 plus ℓ ∇log π")
EXACT_GRADIENT = ("closed form", "loss k1", "loss k2", "loss k3")


@pytest.fixture(scope="module")
def findings() -> dict[tuple[str, str, str, str, float], study.Finding]:
    return {
        (f.estimator, f.samples, f.gradient_of, f.path, f.drift): f
        for f in study.study_estimators(DRIFTS, seed=0, node_count=20_001)
    }


@pytest.fixture
def old_samples(findings):
    """One row of old samples, compared with KL(old‖new)."""
    return lambda name, path, drift: findings[name, "old", "KL(old‖new)", path, drift]


@pytest.fixture(scope="module")
def rules() -> list[study.RuleFinding]:
    return [study.study_rule(rule, seed=0, updates=60) for rule in study.rules(command.DESIRED_KL)]


# --- integrals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", study.PATHS)
@pytest.mark.parametrize("drift", [1e-4, 0.3, 10.0])
def test_drift_is_the_exact_kl(path, drift):
    new = study.drifted(path, drift)
    assert study.exact_value(new, "old_new") == pytest.approx(drift, rel=1e-9)
    assert (new.mean > 0.0, new.log_std > 0.0, new.log_std < 0.0) == tuple(path == p for p in study.PATHS)


@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_exact_gradient_is_the_derivative_of_the_exact_value(direction):
    mean, log_std, step = 0.4, 0.2, 1e-5
    differences = [
        study.exact_value(study.Policy(mean + a, log_std + b), direction)
        - study.exact_value(study.Policy(mean - a, log_std - b), direction)
        for a, b in ((step, 0.0), (0.0, step))
    ]
    want = torch.tensor(differences, dtype=torch.float64) / (2.0 * step)
    torch.testing.assert_close(study.exact_gradient(study.Policy(mean, log_std), direction), want, rtol=1e-8, atol=0.0)


def test_exact_rows(findings):
    """To 1e-9, up to a drift at which the clamp of r is nowhere felt."""
    checked = 0
    for f in findings.values():
        if f.drift <= 0.05:
            if f.estimator in EXACT_VALUE:
                assert abs(f.value_bias) < 1e-9, f
            if f.estimator in EXACT_GRADIENT or (f.estimator in EXACT_VALUE[1:3] and f.samples == "old"):
                assert abs(f.gradient_bias) < 1e-9, f
                assert f.gradient_cosine == pytest.approx(1.0, abs=1e-9)
                checked += 1
    assert checked == 3 * len(study.PATHS) * (2 + 10 + 2)  # 3 drifts; closed forms, kl.loss, k1 and k3


def test_rows_of_estimates_differentiate_the_estimate():
    """Coefficients that are written down against autograd of the plain formulas."""
    x = torch.tensor([-1.3, -0.2, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    for samples, sign in (("old", 1.0), ("new", -1.0)):
        formulas = {"k1": -sign * x, "k2": x * x / 2, "k3": torch.exp(sign * x) - 1 - sign * x}
        for name, formula in formulas.items():
            [row] = [
                e for e in study.estimators() if (e.name, getattr(e, "samples", "")) == (f"{name} as it is", samples)
            ]
            value, coefficient = row.terms(x.detach())
            torch.testing.assert_close(value, formula.detach())
            torch.testing.assert_close(coefficient, torch.autograd.grad(formula.sum(), x)[0])


def test_known_biases(old_samples, findings):
    for drift in DRIFTS:  # k2 of a mean shift by K nats: K + K²/2
        assert old_samples("k2 as it is", "mean shift", drift).value_bias == pytest.approx(drift / 2, rel=1e-9)
    assert old_samples("k3 plus ℓ ∇log π", "mean shift", 1e-4).gradient_bias == pytest.approx(1.0, abs=0.01)
    for path in study.PATHS:
        assert findings["k1 as it is", "new", "KL(new‖old)", path, 0.01].gradient_bias == pytest.approx(1.0)
        assert findings["k1 as it is", "new", "KL(new‖old)", path, 0.01].gradient_cosine == 0.0
        epsilon = findings["closed form with ε = 1e-5", "none", "KL(old‖new)", path, 1e-4]
        assert epsilon.value_bias == pytest.approx(0.1, rel=0.02)


def test_k3_of_the_clipped_ratio_saturates(findings):
    """At k3 of the ratio 0.8, the lower end of the clip: no drift is further away than that."""
    [clipped] = [e for e in study.estimators() if e.name == "k3 of the ratio clipped at 0.2"]
    limit = -0.2 - math.log(0.8)  # 0.0231
    value, coefficient = clipped.terms(torch.tensor([-50.0, -0.1, 50.0], dtype=torch.float64))
    assert value[0].item() == pytest.approx(limit, rel=1e-9)
    assert coefficient.tolist() == [0.0, pytest.approx(math.expm1(-0.1)), 0.0]
    far = [f.mean for f in findings.values() if f.estimator == clipped.name and f.drift == 1.0]
    assert len(far) == len(study.PATHS)
    assert all(0.8 * limit < mean < limit for mean in far)


def test_known_spreads(old_samples, findings):
    k = 0.05
    assert old_samples("k1 as it is", "mean shift", k).spread == pytest.approx(math.sqrt(2 * k), rel=1e-9)
    variance = math.expm1(2 * k) - 2 * k
    assert old_samples("k3 as it is", "mean shift", k).spread == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert math.isfinite(old_samples("k3 as it is", "growing std", 0.05).spread)
    assert math.isinf(old_samples("k3 as it is", "growing std", 1.0).spread)
    assert math.isfinite(old_samples("k3 as it is", "shrinking std", 1.0).spread)
    assert math.isinf(findings["k3 as it is", "new", "KL(new‖old)", "shrinking std", 1.0].spread)
    for f in findings.values():  # the samples tell the same, within four standard errors, where there is a variance
        if math.isfinite(f.spread) and f.drift <= 0.05:
            assert abs(f.mini_batch_mean - f.mean) <= 4.0 * f.spread / math.sqrt(study.MINI_BATCH) + 1e-15, f


def test_infinite_spread_starts_at_root_2():
    [k3] = [e for e in study.estimators() if (e.name, getattr(e, "samples", "")) == ("k3 as it is", "old")]
    half_log_2 = 0.5 * math.log(2.0)
    assert not k3.infinite_spread(study.Policy(0.0, half_log_2 - 1e-6))
    assert k3.infinite_spread(study.Policy(0.0, half_log_2 + 1e-6))


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_proportional_rule_meets_the_target_and_the_others_overshoot_it(rules):
    exact, k3, k1, _, _, proportional, _ = rules
    assert proportional.end_kl < 1.5 * proportional.desired_kl
    assert exact.end_kl > 2.5 * exact.desired_kl
    assert k1.end_kl_spread > 2.0 * k3.end_kl_spread
    assert all(r.learning_rate < 1e-2 and r.reward > -1.0 for r in rules)


def test_seed_decides_everything(rules):
    rule = study.rules(command.DESIRED_KL)[0]
    again, other = (study.study_rule(rule, seed, updates=4) for seed in (0, 1))
    assert study.study_rule(rule, 0, updates=4) == again
    assert other.end_kl != again.end_kl


# --- command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A study of three estimators and one rule: what matters is what the command does with it."""
    some_estimators, one_rule = study.estimators()[3:6], study.rules(command.DESIRED_KL)[:1]
    monkeypatch.setattr(study, "estimators", lambda: some_estimators)
    monkeypatch.setattr(study, "rules", lambda desired_kl: one_rule)


def test_quick_run_writes_everything(run_command, tmp_path):
    out = tmp_path / "a" / "b"
    outcome = run_command("kl-study", "--quick", "--out", out)
    assert outcome.code == 0
    assert sorted(p.name for p in out.iterdir()) == [command.ESTIMATORS, command.FIGURE, command.RULES]
    assert (out / command.FIGURE).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / command.ESTIMATORS).open(encoding="utf-8")))
    rules = list(csv.DictReader((out / command.RULES).open(encoding="utf-8")))
    names = [(r["estimator"], r["samples"], r["value_of"], r["gradient_of"]) for r in rows]
    assert len(set(names)) == len(study.estimators()) == 22
    cells = {(name, row["path"], row["drift"]) for name, row in zip(names, rows, strict=True)}
    assert len(cells) == len(rows) == 22 * len(study.PATHS) * 6
    assert (min(float(r["drift"]) for r in rows), max(float(r["drift"]) for r in rows)) == (1e-4, 10.0)
    numbers = [float(v) for r in [*rows, *rules] for k, v in r.items() if k not in _TEXT_COLUMNS]
    assert len(numbers) == 9 * len(rows) + 6 * len(rules)
    assert not any(map(math.isnan, numbers))
    for name, *_ in names:
        assert outcome.out.count(name) >= 2  # at 0.01 and at 1 nat
    assert [r["rule"] for r in rules] == ["rsl_rl 5.x"] * 4 + ["rsl_rl before 5.0"] + ["proportional"] * 2
    assert "exact" in outcome.out and "inf" in outcome.out and "nan" not in outcome.out


_TEXT_COLUMNS = ("estimator", "samples", "value_of", "gradient_of", "path", "rule", "fed")


def test_without_matplotlib_it_says_how_to_get_it(run_command, tmp_path, monkeypatch, small):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    outcome = run_command("kl-study", "--quick", "--out", tmp_path)
    assert outcome.code == 0
    assert "pip install 'pyfast-ppo[gym]'" in outcome.out
    assert sorted(p.name for p in tmp_path.iterdir()) == [command.ESTIMATORS, command.RULES]


def test_interrupt_leaves_no_half_written_file(run_command, tmp_path, monkeypatch, small):
    """Ctrl-C between writing a file and giving it its name: the old one is still whole."""
    (tmp_path / command.ESTIMATORS).write_text("before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    outcome = run_command("kl-study", "--quick", "--out", tmp_path)
    assert outcome.code == 130
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(command.ESTIMATORS, "before")]


def test_directory_that_cannot_be_made(run_command, tmp_path):
    (tmp_path / "file").touch()
    outcome = run_command("kl-study", "--out", tmp_path / "file" / "out")
    assert outcome.code == 2
    assert outcome.err.startswith("pyfast-ppo: cannot make")


@pytest.mark.parametrize(("argv", "text"), [(["kl-study", "--help"], "--quick"), (["--help"], "kl-study")])
def test_help(argv, text, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 0
    assert text in capsys.readouterr().out


# --- docs/kl.md -------------------------------------------------------------------------------------------------------


def test_page_quotes_the_estimators(old_samples):
    """Each phrase is made of the number that the study gives, as the page has it."""
    k1, k3, k2 = (f"{k} as it is" for k in ("k1", "k3", "k2"))
    clipped, clamped, advice = "k3 of the ratio clipped at 0.2", "k3 clamped to ±10", "k3 plus ℓ ∇log π"

    def at_1_nat(name, form):
        cells = [format(100.0 * old_samples(name, path, 1.0).value_bias, form) for path in study.PATHS]
        return "| " + " | ".join(f"{cell}%" for cell in cells) + " |"

    def percent(name, drift, quantity):
        return f"{100.0 * getattr(old_samples(name, 'mean shift', drift), quantity):+.0f}%"

    small, large = ([old_samples(k, "mean shift", d).spread for k in (k3, k1)] for d in (0.01, 1.0))
    growing = old_samples(k3, "growing std", 1.0)
    phrases = [
        f"0.2: value {at_1_nat(clipped, '+.0f')}",
        f"±10: value {at_1_nat(clamped, '+.2g')}",
        f"old samples: value {at_1_nat(k2, '+.0f')}",
        f"with it {percent(advice, 0.01, 'gradient_bias')} at 0.01 nats",
        f"of mean shift, {percent(advice, 1.0, 'gradient_bias')} at 1 nat",
        f"({percent(clipped, 0.01, 'value_bias')} at 0.01 nats of mean shift, {percent(clipped, 1.0, 'value_bias')}",
        f"is the expansion, and is {percent(k2, 1.0, 'value_bias')} there",
        f"{small[0]:.3g} nats, k1 {small[1]:.3g}. At 1 nat: {large[0]:.2g} against {large[1]:.3g}",
        f"the spread {large[0]:.2g}, as a sum of a hundred k3 {10.0 * small[0]:.3g}",
        f"24,576 samples was {growing.mini_batch_mean:.3f} nats",
        f"lost {-100.0 * growing.value_bias:.0f}% to the clamp, its gradient {100.0 * growing.gradient_bias:.0f}%",
        f"a drift of {study.exact_value(study.Policy(0.0, 0.5 * math.log(2.0)), 'old_new'):.3f}",
        f"never exceeds {-0.2 - math.log(0.8):.4f} nats",
    ]
    page = " ".join(PAGE.split())
    assert [phrase for phrase in phrases if phrase not in page] == []


def test_page_quotes_the_rules(rules):
    """Its table, number by number; to a tenth: rounding differs between processors, and the loop amplifies it."""
    lines = PAGE.partition("```text\n")[2].partition("```")[0].splitlines()[1:]
    assert len(lines) == len(rules)
    for line, r in zip(lines, rules, strict=True):
        assert line.startswith(f"{r.rule:<20}{r.fed:<22}")
        want = (r.desired_kl, r.end_kl, r.end_kl_spread, r.end_kl_max, r.learning_rate, r.reward)
        assert [float(x) for x in line[42:].split()] == pytest.approx(want, rel=0.1)


def test_page_names_every_file_and_function():
    for name in (command.ESTIMATORS, command.RULES, command.FIGURE, "pyfast-ppo kl-study"):
        assert name in PAGE
    assert all(hasattr(kl, name) for name in ("gaussian", "loss", "sequence_loss"))
