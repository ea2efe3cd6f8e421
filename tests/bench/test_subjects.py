"""Each subject measures: rows in the documented form, the contenders that there should be, and what it needs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from pyfast_ppo.bench import gae, kl, loss, profile, results, rivals, stock, synthetic, timeline, torch_only, update
from pyfast_ppo.bench import operations as ops
from pyfast_ppo.bench.harness import Options
from pyfast_ppo.bench.sizes import SIZES, Size
from pyfast_ppo.bench.torch_only import TorchOnlyPPO
from pyfast_ppo.rsl_rl.captured import Captured

OPTIONS = Options(seconds=1e-9)
SMALL = Size(64, 8, 4, 2, (16, 16))
TORCH_ONLY = "pyfast_ppo.bench.torch_only:TorchOnlyPPO"
FUSED = "pyfast_ppo.rsl_rl:FusedPPO"


@pytest.fixture(autouse=True)
def no_rivals(monkeypatch):
    monkeypatch.setattr(rivals, "installed", lambda package: None)


def checked(subject: str, rows: list[dict]) -> dict:
    document = results.new_document("cpu")
    results.add(document, subject, rows, 1.0)
    assert results.fault_of(document) is None
    return rows[0]


@pytest.mark.parametrize(
    ("module", "case", "ours"),
    [
        (loss, loss.Case(64, 3, True, 2), ["ppo_loss + backward", "ppo_loss_and_grad"]),
        (loss, loss.Case(64, 3, False, 1), ["ppo_loss + backward", "ppo_loss_and_grad"]),
        (gae, gae.Case(5, 16), ["gae"]),
        (kl, kl.Case(64, 3), ["gaussian_log_prob + loss", "gaussian_loss"]),
    ],
)
def test_operation(module, case, ours, no_compiler):
    row = checked(module.__name__, module.measure(case, OPTIONS))
    assert sorted(row["ours"]) == ours
    assert set(row["contenders"]) == {row["baseline"], *ours}
    assert row["skipped"]["torch.compile"] == "RuntimeError: no compiler here"
    assert all("launches" in entry and entry["peak_bytes"] > 0 for entry in row["contenders"].values())
    if module is not kl:
        assert row["floor"]["median_s"] > 0.0
        assert "not installed" in row["skipped"]["skrl"]


def test_bytes_are_each_input_once_and_each_gradient_once(no_compiler):
    [row] = loss.measure(loss.Case(64, 3, True, 1), OPTIONS)
    inputs = 64 * (4 * 3 + 5) + 3  # mean, actions, old_mean, old_std; five columns; std
    assert row["bytes"] == 4 * (inputs + 64 * (3 + 1) + 3)


def test_compiled_contender_is_there(eager_compiler):
    [row] = loss.measure(loss.Case(64, 3, True, 1), OPTIONS)
    assert "torch.compile" in row["contenders"]


@pytest.mark.parametrize("quick", [True, False])
def test_cases(quick):
    for module in (loss, timeline, gae, kl, update, profile):
        for device in ("cpu", "cuda"):
            cases = module.cases(device, quick)
            assert len(cases) == len(set(cases)) >= 1
    assert {"N = 24,576", "A = 12"} <= set(", ".join(map(str, loss.cases("cpu", quick))).split(", "))
    assert set(update.cases("cuda", False)) == set(SIZES)


def test_rows_at_the_edge_of_the_clip_are_moved_off_it():
    """This seed has one; there, rounding decides about the gradient."""
    loss.check_agreement(stock.make_mini_batch(4096, 12, True, 0))


def test_disagreement_stops_the_measurement(monkeypatch):
    monkeypatch.setitem(stock.COEFFICIENTS, "clip_param", 0.3)  # of ours; the stock's default is bound
    with pytest.raises((AssertionError, RuntimeError)):
        loss.check_agreement(stock.make_mini_batch(256, 3, True, 0))


# --- update -----------------------------------------------------------------------------------------------------------


def test_update(monkeypatch, no_compiler):
    monkeypatch.setitem(update.SIZES, "small", SMALL)
    rows = update.measure("small", OPTIONS)
    checked("update", rows)
    assert [row["case"]["part"] for row in rows] == [*update.PARTS, "iteration"]
    assert all(set(row["contenders"]) == {"rsl_rl", "FusedPPO"} for row in rows)
    assert set(rows[0]["skipped"]) == {"rsl_rl compiled", "torch only"}
    parts = {row["case"]["part"]: row["contenders"] for row in rows}
    for name in ("rsl_rl", "FusedPPO"):
        whole = sum(parts[part][name]["seconds"][0] for part in update.PARTS)
        assert parts["iteration"][name]["seconds"][0] == pytest.approx(whole, rel=1e-2)
        assert parts["act"][name]["launches"] % SMALL.num_steps == 0
    stock_update, fused_update = (parts["update"][name] for name in ("rsl_rl", "FusedPPO"))
    assert stock_update["syncs"] >= 20 * 4  # three losses and a branch on the KL in each mini-batch
    assert fused_update["syncs"] == 0
    assert "launches" not in parts["iteration"]["rsl_rl"]


def test_a_contender_that_fails_later_is_left_out(monkeypatch, eager_compiler):
    """In its third iteration, say, where a graph would be recorded; the others are measured."""
    real, calls = update._timed, []

    def fail(runner, device):
        if isinstance(runner.alg, TorchOnlyPPO):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no graph\nand more")
        return real(runner, device)

    monkeypatch.setattr(update, "_timed", fail)
    monkeypatch.setitem(update.SIZES, "small", SMALL)
    for row in update.measure("small", OPTIONS):
        assert set(row["contenders"]) == {"rsl_rl", "rsl_rl compiled", "FusedPPO"}
        assert row["skipped"] == {"torch only": "RuntimeError: no graph"}


def test_a_graph_that_is_none_is_not_shown_as_one():
    """What could not be recorded runs as it is, and must not be timed under the other name."""
    runner = synthetic.make_runner(SMALL, "cpu", FUSED, cuda_graph=True)
    assert update.why_no_graph(runner.alg) == "without a CUDA graph: the device is cpu"
    assert update.why_no_graph(synthetic.make_runner(SMALL, "cpu", FUSED).alg) is None
    runner.alg._captured = Captured("The update", "cuda")
    runner.alg._captured_rollout = Captured("The rollout", "cuda")
    assert update.why_no_graph(runner.alg) == "its CUDA graphs were not recorded in the warm-up"
    runner.alg._captured.num_records = runner.alg._captured_rollout.num_records = 1
    assert update.why_no_graph(runner.alg) is None
    runner.alg._captured_rollout.reason = "it waits"
    assert update.why_no_graph(runner.alg) == "without a CUDA graph: it waits"


def test_profile(monkeypatch):
    floors_of, flops = profile._floors, []

    def kept(size, device):
        measure_floors = floors_of(size, device)
        return lambda found: (flops.append(found), measure_floors(found))[1]

    monkeypatch.setattr(profile, "_floors", kept)
    monkeypatch.setitem(profile.SIZES, "small", SMALL)
    monkeypatch.setitem(profile._SQUARE, "cpu", 64)
    rows = profile.measure("small", Options(quick=True, seconds=1e-9))
    checked("profile", rows)
    assert [row["case"]["line"] for row in rows] == [*ops.LINES, profile.BETWEEN, profile.WHOLE]
    by_line = {row["case"]["line"]: row for row in rows}
    whole = by_line.pop(profile.WHOLE)
    for name in ("rsl_rl", "FusedPPO"):
        entries = [row["contenders"][name] for row in by_line.values()]
        for key in ("launches", "syncs", "moved_bytes"):
            assert sum(entry.get(key, 0) for entry in entries) == whole["contenders"][name][key]
        for i, seconds in enumerate(whole["contenders"][name]["seconds"]):
            assert sum(entry["seconds"][i] for entry in entries) >= 0.99 * seconds  # more, if watching took longer
    floors = [row["floor"]["seconds"] for row in by_line.values() if "floor" in row]
    assert [sum(f) for f in zip(*floors, strict=True)] == pytest.approx(whole["floor"]["seconds"], rel=1e-2)
    stock_work, ours = (by_line[ops.LOSS]["contenders"][name] for name in ("rsl_rl", "FusedPPO"))
    assert stock_work["syncs"] >= 20 * 4 and ours["syncs"] == 0
    assert stock_work["launches"] > 20 * 100 > 2 * ours["launches"]
    assert stock_work["moved_bytes"] > 5 * by_line[ops.LOSS]["bytes"]
    layers = [(4, 16), (16, 16), (16, 2)], [(4, 16), (16, 16), (16, 1)]  # of actor and critic
    once = [sum(2 * a * b for a, b in net) for net in layers]
    first = 2 * 2 * 4 * 16  # no gradient of the observations
    rows = SMALL.num_envs * SMALL.num_steps
    exact = rows * (5 * (3 * sum(once) - first) + sum(once)) + SMALL.num_envs * once[1]
    assert flops == [exact] * len(flops) and flops
    products = {name: entry["launches"] for name, entry in by_line[ops.MATRIX]["contenders"].items()}
    acting = 2 * 3 * (SMALL.num_steps + 1) - 3  # two networks of three layers, at the end only the critic
    assert products["rsl_rl"] == 20 * 2 * (3 + 5) + acting  # backward two each, but for the observations' gradient


def test_time_that_the_operations_do_not_account_for_is_not_negative(monkeypatch):
    """Watching takes time itself; on a machine that others use it may be more than a whole iteration."""
    monkeypatch.setitem(profile.SIZES, "small", SMALL)
    monkeypatch.setitem(profile._SQUARE, "cpu", 64)
    monkeypatch.setattr(profile, "_iteration_seconds", lambda runner, device: 1e-9)
    rows = profile.measure("small", Options(quick=True, seconds=1e-9))
    between = next(row for row in rows if row["case"]["line"] == profile.BETWEEN)
    assert all(entry["median_s"] >= 0.0 for entry in between["contenders"].values())


def test_floors_on_a_gpu_are_by_the_clock_of_the_lines(monkeypatch):
    """The profiler's, of kernels alone. A few copies would stay in the caches: more are timed."""
    copy_of, asked = profile.copy_of, []

    def device_seconds(events, count):
        asked.append(count)
        return [1e-6] * count

    monkeypatch.setattr(profile, "copy_of", lambda size, num_sets, device: copy_of(size, num_sets, "cpu"))
    monkeypatch.setattr(ops, "device_seconds", device_seconds)
    assert profile._copies(10_000_000, 3, "cuda")() == pytest.approx(3e-6)
    assert profile._copies(10_000_000, 30, "cuda")() == pytest.approx(30e-6)
    assert asked == [20, 30]


def test_what_has_to_be_moved_and_computed():
    runner = synthetic.make_runner(SMALL, "cpu", "PPO")
    modules = (runner.alg.actor, runner.alg.critic)
    assert profile.num_parameters(SMALL) == sum(p.numel() for m in modules for p in m.parameters())


def test_timeline():
    [row] = timeline.measure(timeline.Case(256, 3), Options(quick=True))
    checked("timeline", [row])
    stock_run, ours = (row["contenders"][name]["operations"] for name in ("rsl_rl", "ppo_loss_and_grad"))
    assert [name for name, _ in ours] == ["ppo_loss"]
    assert len(stock_run) > 100 and {"log", "exp", "maximum", "clamp"} <= {name for name, _ in stock_run}
    assert all(seconds > 0.0 for _, seconds in stock_run + ours)


class GraphOfCalls:
    """Of work that gives three numbers: a replay does it again, into the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._output = torch.zeros(3)

    def record(self, work):
        self._work = work
        return self._output

    def replay(self) -> None:
        self._output.copy_(self._work())


@pytest.fixture
def graphs_of_calls(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch_only, "Graph", GraphOfCalls)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


def test_what_is_replayed_has_memory_of_its_own(graphs_of_calls):
    """After three calls as they are: the compiler and the optimizer have made by then what they make once."""
    seen = []
    doubled = torch_only.Replayed(lambda x: (seen.append(x.data_ptr()), 2.0 * x)[1])
    inputs = [torch.full((3,), float(i)) for i in range(6)]
    outputs = [doubled(x) for x in inputs]
    assert [y.tolist() for y in outputs] == [[2.0 * i] * 3 for i in range(6)]
    assert seen[:3] == [x.data_ptr() for x in inputs[:3]]
    assert len(seen) == 6 and len(set(seen[3:])) == 1 and seen[3] != inputs[3].data_ptr()


@pytest.mark.parametrize("as_graph", [False, True])
def test_torch_only_contender_computes_what_the_stock_does(as_graph, eager_compiler, graphs_of_calls):
    parameters, rates, losses = [], [], []
    for algorithm in ("PPO", TORCH_ONLY):
        runner = synthetic.make_runner(SMALL, "cpu", algorithm)
        if as_graph and algorithm == TORCH_ONLY:
            runner.alg._replayed_step = torch_only.Replayed(runner.alg._step)
        found: dict[str, dict] = {}

        def around(part, work, found=found):
            found[part] = out = work()
            return out

        for seed in range(2):
            torch.manual_seed(seed)
            update.iterate(runner, around)
        modules = (runner.alg.actor, runner.alg.critic)
        parameters.append(torch.cat([p.detach().flatten() for m in modules for p in m.parameters()]))
        rates.append(runner.alg.learning_rate)
        losses.append(found["update"])
    torch.testing.assert_close(*parameters, rtol=1e-4, atol=1e-5)
    assert rates[1] == pytest.approx(rates[0]) and rates[0] != 1e-3  # the rule has acted
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-5)


def test_loss_and_gae_run_without_rsl_rl():
    code = """
        import sys
        from importlib.abc import MetaPathFinder
        class Missing(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("rsl_rl", "matplotlib", "gymnasium"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Missing())
        from pyfast_ppo.bench import gae, kl, loss, figures, compare
        from pyfast_ppo.bench.stock import make_mini_batch
        loss.check_agreement(make_mini_batch(64, 3, True, 0))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
