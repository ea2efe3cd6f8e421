"""Turns, rounds, ratios; what is left out; what is counted."""

from __future__ import annotations

import time

import pytest
import torch
from torch.autograd import DeviceType

from pyfast_ppo.bench import counts, harness, stock
from pyfast_ppo.bench.counts import Counts, count
from pyfast_ppo.bench.harness import Contender, Options, Timing, able, interleave


def test_turns_are_reversed_every_other_round_and_input_sets_rotate():
    order: list[tuple[str, int]] = []
    contenders = {name: Contender(lambda i, name=name: order.append((name, i))) for name in "ab"}
    timings = interleave(contenders, 4, Options(seconds=1e-9))
    turns = [order[i] for i in range(0, len(order), harness.CALLS_PER_TURN)]
    rounds = harness.WARMUP_ROUNDS + harness.MIN_ROUNDS
    assert [name for name, _ in turns] == (list("ba") + list("ab")) * (rounds // 2) + list("ba")
    assert [i for _, i in order[: harness.CALLS_PER_TURN]] == list(range(harness.CALLS_PER_TURN))
    assert [len(t.seconds) for t in timings.values()] == [harness.MIN_ROUNDS] * 2  # the first rounds do not count


def test_time_decides_how_many_rounds():
    quick = {"a": Contender(lambda i: None)}
    assert len(interleave(quick, 1, Options(seconds=1.0))["a"].seconds) == harness.MAX_ROUNDS


def test_times_are_those_of_the_calls():
    contenders = {"slow": Contender(lambda i: time.sleep(2e-3)), "fast": Contender(lambda i: None)}
    timings = interleave(contenders, 1, Options(seconds=1e-9))
    assert timings["slow"].median >= 2e-3 > timings["fast"].median
    assert timings["fast"].times_faster_than(timings["slow"]) > 1.0


def test_turns_on_a_gpu(monkeypatch):
    """A turn goes through all input sets, often enough for the clock; what is captured is replayed as a whole."""
    calls: list[int] = []
    replays: list[float] = []
    now = [0.0]  # of a GPU that is only thought of

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end) -> float:
            return 1e3 * (end.at - self.at)

    def replay() -> None:
        replays.append(now[0])
        now[0] += 3e-3

    def eager(i: int) -> None:
        calls.append(i)
        now[0] += 1e-3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "captured", lambda call, num_calls: replay)
    contenders = {"eager": Contender(eager), "captured": Contender(lambda i: None, captured=True)}
    timings = interleave(contenders, 3, Options("cuda", seconds=1e-9))
    assert len(calls) > 6 and calls == [0, 1, 2] * (len(calls) // 3)  # and no other between the turns
    for timing in timings.values():
        assert timing.first_call == []
        assert timing.seconds == pytest.approx([1e-3] * len(timing.seconds))  # of one call, not of three
    rounds = harness.WARMUP_ROUNDS + len(timings["captured"].seconds)
    assert len(replays) == 2 + 3 * rounds  # one before each turn, and two in it, which are 6 ms


def test_input_sets_on_a_gpu_are_more_than_its_caches_hold():
    assert harness.num_input_sets(10_000_000, "cpu", on_cpu=4) == 4
    assert [harness.num_input_sets(n, "cuda", on_cpu=4) for n in (1_000, 10_000_000, 10**9)] == [64, 20, 2]


def test_ratio_is_taken_within_rounds():
    """A machine that is slow for a while is slow for both: the medians' ratio would be 1."""
    ours, other = Timing([1.0, 10.0, 2.0]), Timing([2.0, 20.0, 4.0])
    assert ours.times_faster_than(other) == 2.0
    assert Timing([5.0, 1.0, 3.0, 2.0, 4.0]).percentile(0.1) == 1.0
    assert Timing([5.0, 1.0, 3.0, 2.0, 4.0]).percentile(0.9) == 5.0


def test_optional_contender_that_fails_is_left_out_with_its_reason():
    def fail(i):
        raise ValueError("one line\nanother")

    fine = Contender(lambda i: None, optional=False)
    kept, skipped = able({"fine": fine, "odd": Contender(fail)})
    assert kept == {"fine": fine}
    assert skipped == {"odd": "ValueError: one line"}
    with pytest.raises(ValueError, match="one line"):
        able({"needed": Contender(fail, optional=False)})


def test_counts_of_operations_reads_and_memory(capfd):
    x = torch.ones(1000)

    def call():
        y = x + 1.0
        y = y * 2.0
        return y.sum().item()

    found = count(call, "cpu")
    assert found.syncs == 1
    assert found.launches >= 4  # add, mul, sum, the read, and what they are made of
    assert found.launches == count(call, "cpu").launches
    assert 8000 <= found.peak_bytes < 9000  # the second product is made while the first sum is still there
    assert count(lambda: None, "cpu") == Counts(0, 0, 0)
    assert capfd.readouterr().err == ""  # the profiler writes there, past Python


def test_the_profilers_own_wait_is_not_counted():
    """It synchronizes the device before it stops."""

    class Event:
        def __init__(self, name: str, start: int, duration: int, device: DeviceType = DeviceType.CPU) -> None:
            self.name, self.device_type = lambda: name, lambda: device
            self.start_ns, self.duration_ns = lambda: start, lambda: duration

    events = [
        Event("cudaLaunchKernel", 12, 1),
        Event("cudaStreamSynchronize", 15, 3),
        Event("pyfast_ppo call", 10, 10),
        Event("pyfast_ppo call", 13, 30, DeviceType.CUDA),  # as the GPU saw it
        Event("aten::add", 11, 3),
        Event("cutlass_gemm", 14, 3, DeviceType.CUDA),
        Event("cudaDeviceSynchronize", 25, 5),
    ]
    assert counts._names_within_call(events) == ["cudaLaunchKernel", "cudaStreamSynchronize"]


def test_names_that_are_not_counted_show(monkeypatch):
    names = ["cuLaunchKernelEx", "cudaLaunchKernel_v2", "cuLaunchKernelEx", "cudaStreamSynchronize"]
    monkeypatch.setattr(counts, "_names_within_call", lambda events: names)
    assert counts.cuda_calls(lambda: None) == [
        "2 cuLaunchKernelEx (launch)",
        "1 cudaLaunchKernel_v2 (not counted)",
        "1 cudaStreamSynchronize (sync)",
    ]


def test_what_the_profiler_sees_of_a_launch_is_said(load_script, monkeypatch, capsys):
    script, make = load_script("bench_launch"), stock.make_mini_batch
    monkeypatch.setattr(script, "CASES", [(64, 3, True)])
    monkeypatch.setattr(script, "gpu_backends", lambda: ["cpu", "eager"])
    monkeypatch.setattr(script, "make_mini_batch", lambda *case: make(*case[:-1]))
    monkeypatch.setattr(script, "captured", lambda call, num_calls: lambda: [call(i) for i in range(num_calls)])
    seen = iter((["1 cuLaunchKernel (launch)", "2 cuOther (not counted)"], ["1 cudaGraphLaunch (launch)"], [], []))
    monkeypatch.setattr(script, "cuda_calls", lambda work: (work(), next(seen))[1])
    script.say_cuda_calls()
    assert capsys.readouterr().out.splitlines() == [
        "cpu: 1 cuLaunchKernel (launch), 2 cuOther (not counted)",
        "cpu, CUDA graph: 1 cudaGraphLaunch (launch)",
        "eager: the profiler sees nothing",
        "eager, CUDA graph: the profiler sees nothing",
    ]


def test_reads_that_only_the_cpu_makes_are_not_counted():
    assert count(torch.ones(3).std, "cpu").syncs == 0
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.1), fused=True)
    optimizer.step()
    assert count(optimizer.step, "cpu").syncs == 0
