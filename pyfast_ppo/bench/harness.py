"""Timing that can be trusted on a shared machine: contenders take turns in one process, and rounds are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyfast_ppo.cuda_graph import Graph

METHOD = """\
Contenders take turns in one process, in an order that is reversed in every other round (A B C, C B A, ...). A turn is
a few calls, each with the next of several input sets; the first rounds do not count. On the CPU the first call of a
turn, which finds caches full of another contender's data and code, is kept apart, and the median of the other calls
is the round's time. On a GPU a turn lies between two CUDA events and is divided by its calls: what a loop of such
calls takes, launches and all, or, for what was captured, what the GPU takes; input sets are so many that its caches do
not hold all of them, but 64 at most. In an iteration a turn is one iteration, timed part by part; the device's work is
waited for in each.
Median and spread (10th to 90th percentile) are over rounds; "x faster" is the median over rounds of the ratio of the
baseline's time to this one's in the same round.
The bandwidth floor is a plain copy that moves as many bytes as the operation must (each input read once, each output
written once), timed in the same rounds.
Launches are counted with torch.profiler in one more call: on a GPU kernels, copies and graphs that the host launches;
on the CPU operations that torch's dispatcher ran, views and allocations among them, an operation that is made of
others not counted itself; what a compiled graph or a kernel of pyfast_ppo does by itself is not seen there.
Host syncs: on a GPU waits for a stream, an event or the device; on the CPU reads of a number
(aten::_local_scalar_dense), which on a GPU would be such waits, without those inside of optimizers' steps and
aten::std, which are made on the CPU only.
Peak memory is what one call holds at most, above what there was before: on a GPU torch.cuda.max_memory_allocated; on
the CPU the running sum of the allocator's events in torch.profiler (profile_memory), which sees every tensor and not
the scratch memory of libraries. It is not given for what replays CUDA graphs, whose memory is set aside before."""

CALLS_PER_TURN = 6  # on the CPU; the first is kept apart
WARMUP_ROUNDS = 2
MIN_ROUNDS, MIN_QUICK_ROUNDS, MAX_ROUNDS = 5, 3, 40
_GPU_TURN_SECONDS = 5e-3  # long enough for events, which are good for some microseconds
_GPU_BYTES_IN_TURN = 200e6  # more than the second-level cache holds
_MAX_GPU_SETS = 64


@dataclass(frozen=True)
class Options:
    """How a run measures. ``seconds``: for the rounds of one case, about."""

    device: str = "cpu"
    quick: bool = False
    seconds: float = 8.0


@dataclass(frozen=True)
class Contender:
    """``call(i)`` does the work on input set i, modulo their number."""

    call: Callable[[int], object]
    captured: bool = False  # on a GPU: one CUDA graph of a call for each input set, replayed
    optional: bool = True  # left out, with the reason, if its first call raises


@dataclass
class Timing:
    """Seconds per call, one entry per round."""

    seconds: list[float] = field(default_factory=list)
    first_call: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def percentile(self, share: float) -> float:
        return percentile(self.seconds, share)

    def times_faster_than(self, other: Timing) -> float:
        """Median over rounds of the other's time by this one's."""
        return median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of them lies, of those that there are."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def able(contenders: dict[str, Contender]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those whose first call goes through, and why the others' do not (no compiler, another result than ours, ...)."""
    kept, skipped = {}, {}
    for name, contender in contenders.items():
        try:
            contender.call(0)
            if contender.captured:
                captured(contender.call, 1)
        except Exception as error:
            if not contender.optional:
                raise
            skipped[name] = first_line(error)
        else:
            kept[name] = contender
    return kept, skipped


def first_line(error: Exception) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def interleave(contenders: dict[str, Contender], num_sets: int, options: Options) -> dict[str, Timing]:
    """Times the contenders in turns, for about ``options.seconds``, but in no fewer rounds than are needed."""
    take_turn = _gpu_turns(contenders, num_sets) if options.device == "cuda" else _cpu_turn
    timings = {name: Timing() for name in contenders}
    names = list(contenders)
    rounds, done = MAX_ROUNDS, -WARMUP_ROUNDS
    while done < rounds:
        start = time.perf_counter()
        for name in names if done % 2 else reversed(names):
            seconds, first = take_turn(contenders[name])
            if done >= 0:
                timings[name].seconds.append(seconds)
                timings[name].first_call += first
        if done == -1:  # the last round of the warm-up tells how long one takes
            least = MIN_QUICK_ROUNDS if options.quick else MIN_ROUNDS
            rounds = max(least, min(MAX_ROUNDS, int(options.seconds / (time.perf_counter() - start))))
        done += 1
    return timings


def _cpu_turn(contender: Contender) -> tuple[float, list[float]]:
    turn = []
    for i in range(CALLS_PER_TURN):
        start = time.perf_counter()
        contender.call(i)
        turn.append(time.perf_counter() - start)
    return median(turn[1:]), turn[:1]


def _gpu_turns(contenders: dict[str, Contender], num_sets: int) -> Callable[[Contender], tuple[float, list[float]]]:
    """Captures what is to be captured, and chooses how often each contender goes through its input sets in a turn."""

    def all_sets(contender: Contender) -> Callable[[], object]:
        if contender.captured:
            return captured(contender.call, num_sets)
        return lambda: [contender.call(i) for i in range(num_sets)]

    passes = {id(c): all_sets(c) for c in contenders.values()}
    repeats = {}
    for key, once in passes.items():
        once()
        repeats[key] = max(1, round(_GPU_TURN_SECONDS / _seconds_between_events(once, 1)))

    def take_turn(contender: Contender) -> tuple[float, list[float]]:
        key = id(contender)
        passes[key]()
        return _seconds_between_events(passes[key], repeats[key]) / (repeats[key] * num_sets), []

    return take_turn


def _seconds_between_events(work: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def captured(call: Callable[[int], object], num_calls: int) -> Callable[[], object]:
    """``call(0)`` … ``call(num_calls - 1)`` as one CUDA graph: what is timed is the GPU's work, not the launching."""
    device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in (0, 1, 2):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = Graph(device)
    # kept, so that each call writes to memory of its own, not to what is still in the cache; without autograd's nodes,
    # which bind what requires gradients to the stream of the recording and slow down other contenders' backward
    results = tree_map_only(Tensor, Tensor.detach, graph.record(lambda: [call(i) for i in range(num_calls)]))

    def replay() -> list[object]:
        graph.replay()
        return results

    return replay


def copy_of(num_bytes: int, num_sets: int, device: str) -> Contender:
    """A plain copy that moves this many bytes: half of them read, half written."""
    # not zeros, which take less power to move
    sources = [torch.randn(num_bytes // 8, device=device) for _ in range(num_sets)]
    targets = [torch.empty_like(source) for source in sources]
    return Contender(
        lambda i: targets[i % num_sets].copy_(sources[i % num_sets]), captured=device == "cuda", optional=False
    )


def num_input_sets(num_bytes: int, device: str, on_cpu: int) -> int:
    """How many take turns, where a call moves so many bytes: see ``METHOD``."""
    if device != "cuda":
        return on_cpu
    return max(2, min(_MAX_GPU_SETS, round(_GPU_BYTES_IN_TURN / num_bytes)))


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)
