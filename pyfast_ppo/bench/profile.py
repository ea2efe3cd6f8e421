"""What the time of an iteration is spent on: operation by operation, added up by purpose, each line with its floor.

rsl_rl and FusedPPO, both without compiler and CUDA graph. An iteration is timed as it is, and then once more with each
operation watched (``operations.py``); what the operations do not account for is in the line "between operations":
Python, autograd, dispatch, views and allocations. The floor of the matrix products is the time that as many
multiplications and additions take in a large square product, in the same precision; those of the other lines are
plain copies of the bytes that have to be moved (``moved_bytes``), on a GPU timed as the operations are: by the
profiler, without launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from rsl_rl.runners import OnPolicyRunner

from pyfast_ppo.bench import operations as ops
from pyfast_ppo.bench import results, update
from pyfast_ppo.bench.counts import Work
from pyfast_ppo.bench.harness import Options, Timing, copy_of, num_input_sets
from pyfast_ppo.bench.operations import Operation, Recorder
from pyfast_ppo.bench.sizes import SIZES, Size
from pyfast_ppo.bench.synthetic import make_runner
from pyfast_ppo.precision import multiply_in_tf32
from pyfast_ppo.rsl_rl import FusedPPO

BASELINE, OURS = update.BASELINE, update.OURS
BETWEEN, WHOLE = "between operations", "iteration"
NUM_EPOCHS, NUM_MINI_BATCHES = 5, 4
_FLOAT = 4  # bytes
_MIN_ROUNDS, _MIN_QUICK_ROUNDS, _MAX_ROUNDS = 5, 2, 25
_SQUARE = {"cpu": 1024, "cuda": 8192}


def cases(device: str, quick: bool) -> list[str]:
    """As those of the update."""
    return update.cases(device, quick)


def measure(case: str, options: Options) -> list[dict]:
    """One row for each line, one for what is between, and one for the whole."""
    size = SIZES[case]
    multiply_in_tf32()
    runners = {
        BASELINE: make_runner(size, options.device, "PPO"),
        OURS: make_runner(size, options.device, "pyfast_ppo.rsl_rl:FusedPPO"),
    }
    lines = (*ops.LINES, BETWEEN, WHOLE)
    clocks: dict[str, dict[str, Timing]] = {line: {name: Timing() for name in runners} for line in lines}
    floors = {line: Timing() for line in lines}
    found: dict[str, list[Operation]] = {}
    measure_floors = _floors(size, options.device)
    rounds, done = _MAX_ROUNDS, -1
    while done < rounds:
        start = time.perf_counter()
        for name in list(runners) if done % 2 else reversed(runners):
            whole = _iteration_seconds(runners[name], options.device)
            found[name] = _watched(runners[name], size, options.device)
            if done >= 0:
                _add_round({line: clocks[line][name] for line in lines}, found[name], whole)
        if done >= 0:
            flops = sum(operation.flops for operation in found[BASELINE])
            for line, seconds in measure_floors(flops).items():
                floors[line].seconds.append(seconds)
        else:
            least = _MIN_QUICK_ROUNDS if options.quick else _MIN_ROUNDS
            rounds = max(least, min(_MAX_ROUNDS, int(options.seconds / (time.perf_counter() - start))))
        done += 1
    return [
        results.make_row(
            {"size": case, "line": line},
            BASELINE,
            [OURS],
            clocks[line],
            counts={} if line == BETWEEN else {name: _work(line, run) for name, run in found.items()},
            moved=_must_move(size).get(line),
            floor=None if line == BETWEEN else floors[line],
        )
        for line in lines
    ]


def _iteration_seconds(runner: OnPolicyRunner, device: str) -> float:
    """Without the environment's steps."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    total = 0.0

    def around(part: str, work: Callable[[], object]) -> object:
        nonlocal total
        wait()
        start = time.perf_counter()
        out = work()
        wait()
        total += time.perf_counter() - start
        return out

    update.iterate(runner, around)
    return total


def _watched(runner: OnPolicyRunner, size: Size, device: str) -> list[Operation]:
    recorder = Recorder(device, size.hidden_dims)

    def around(part: str, work: Callable[[], object]) -> object:
        recorder.part = part
        try:
            return work()
        finally:
            recorder.part = None

    with recorder.recording(None if isinstance(runner.alg, FusedPPO) else runner.alg.optimizer):
        update.iterate(runner, around)
    return recorder.operations


def _add_round(clocks: dict[str, Timing], operations: list[Operation], whole: float) -> None:
    between = whole
    for line in ops.LINES:
        seconds = sum(operation.seconds for operation in operations if operation.line == line)
        clocks[line].seconds.append(seconds)
        between -= seconds
    clocks[BETWEEN].seconds.append(max(between, 0.0))
    clocks[WHOLE].seconds.append(whole)


def _work(line: str, operations: list[Operation]) -> Work:
    of_line = [operation for operation in operations if line in (operation.line, WHOLE)]
    return Work(len(of_line), sum(o.is_sync for o in of_line), sum(o.moved_bytes for o in of_line))


def _must_move(size: Size) -> dict[str, int]:
    """Bytes of an iteration that each line has to read and write, whatever the code looks like."""
    rows, actions, hidden = size.num_envs * size.num_steps, size.num_actions, sum(size.hidden_dims)
    visits, steps = rows * NUM_EPOCHS, NUM_EPOCHS * NUM_MINI_BATCHES
    parameters = num_parameters(size)
    per_row = size.num_obs + 2 * actions + 5  # observation, action, mean, log-probability, value, advantage, return
    return {
        # two networks; forward reads and writes an activation, backward reads it and its gradient, and writes one
        ops.ACTIVATION: _FLOAT * 2 * hidden * (5 * visits + 2 * rows),
        # reads mean, action, old mean and five columns, writes gradients of mean and value
        ops.LOSS: _FLOAT * visits * (4 * actions + 6),
        # the norm reads gradients; Adam reads parameters, gradients and two moments, and writes all but the gradients
        ops.OPTIMIZER: _FLOAT * steps * 8 * parameters,
        ops.MINI_BATCHES: _FLOAT * 2 * rows * per_row,
        # copies the observation, reads the mean, writes action, mean, value, log-probability, reward and done
        ops.ACTING: _FLOAT * rows * (2 * size.num_obs + 3 * actions + 4),
        # reads reward, value and done, writes return and advantage, and normalises that: one more of each
        ops.RETURNS: _FLOAT * rows * 7,
    }


def num_parameters(size: Size) -> int:
    """Of actor and critic, weights, biases and std."""
    total = size.num_actions
    for outputs in (size.num_actions, 1):
        dims = (size.num_obs, *size.hidden_dims, outputs)
        total += sum(a * b + b for a, b in pairwise(dims))
    return total


def _floors(size: Size, device: str) -> Callable[[int], dict[str, float]]:
    """Measures seconds of each line, for so many floating-point operations of its matrix products."""
    pieces = {  # line: number of copies, and bytes of one
        ops.LOSS: NUM_EPOCHS * NUM_MINI_BATCHES,
        ops.OPTIMIZER: NUM_EPOCHS * NUM_MINI_BATCHES,
        ops.ACTIVATION: NUM_EPOCHS * NUM_MINI_BATCHES * 2 * len(size.hidden_dims) * 2,
        ops.MINI_BATCHES: 1,
        ops.ACTING: size.num_steps,
        ops.RETURNS: 1,
    }
    must_move = _must_move(size)
    copies = {line: _copies(must_move[line] // number, number, device) for line, number in pieces.items()}
    n = _SQUARE[device]
    a, b = torch.randn(2, n, n, device=device).unbind()
    product = torch.empty_like(a)

    def measure_floors(flops: int) -> dict[str, float]:
        seconds = {line: measure() for line, measure in copies.items()}
        seconds[ops.MATRIX] = flops / (2 * n**3) * _best_of(lambda: torch.mm(a, b, out=product), device)
        seconds[WHOLE] = sum(seconds.values())
        return seconds

    return measure_floors


def _copies(num_bytes: int, number: int, device: str) -> Callable[[], float]:
    """Measures seconds of a number of copies that move so many bytes each."""
    num_sets = num_input_sets(num_bytes, device, on_cpu=1)
    copy = copy_of(num_bytes, num_sets, device).call
    if device != "cuda":
        return lambda: number * _best_of(partial(copy, 0), device)
    num_calls = max(number, num_sets)

    def measure() -> float:
        recorder = Recorder(device, (), part="update")
        with recorder.recording():
            for i in range(num_calls):
                copy(i)
        return number / num_calls * sum(operation.seconds for operation in recorder.operations)

    return measure


def _best_of(call: Callable[[], object], device: str, number: int = 5) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for _ in range(number):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)
