"""What one call of ppo_loss_and_grad costs the host: checks, outputs, and the launch.

On a GPU it says first what torch's profiler sees of a call, and how that is counted (pyfast_ppo/bench/counts.py).

python bench/bench_launch.py                  # CPU tensors, the CUDA launch itself left out (tests/csrc/emulation)
python bench/bench_launch.py --device cuda    # GPU tensors, with it; the GPU works on meanwhile
python bench/bench_launch.py --save           # also writes bench/results/<machine>/<date>.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import pyfast_ppo
from pyfast_ppo.bench import results, tables
from pyfast_ppo.bench.counts import cuda_calls
from pyfast_ppo.bench.harness import Timing, captured
from pyfast_ppo.bench.loss import gpu_backends
from pyfast_ppo.bench.stock import COEFFICIENTS, make_mini_batch

CASES = [(24_576, 12, True), (24_576, 12, False)]
CALLS, ROUNDS, WARMUP_ROUNDS = 500, 30, 5


def host_time(call: Callable[[], object], synchronize: Callable[[], None]) -> Timing:
    """Seconds that the host takes for a call; nobody waits for the GPU in between."""
    timing = Timing()
    for i in range(-WARMUP_ROUNDS, ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        elapsed = time.perf_counter() - start
        if i >= 0:
            timing.seconds.append(elapsed / CALLS)
    synchronize()
    return timing


def emulate() -> None:
    """The CUDA backend takes CPU tensors; kernels are launched and do nothing."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ops" / "oracles"))
    import cuda_on_cpu

    cuda_on_cpu.install().run_kernels(False)


def say_cuda_calls() -> None:
    """Of each backend, and of a graph that is replayed."""
    for name in gpu_backends():
        batch = make_mini_batch(*CASES[0], 0, "cuda")
        call = partial(pyfast_ppo.ppo_loss_and_grad, *batch, **COEFFICIENTS, backend=name)
        replay = captured(lambda i, call=call: call(), 1)
        for what, work in ((name, call), (f"{name}, CUDA graph", replay)):
            print(f"{what}: {', '.join(cuda_calls(work)) or 'the profiler sees nothing'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", nargs="?", const="", metavar="MACHINE", help="write results/MACHINE/<date>.json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    document = results.new_document(args.device)  # before the emulation, which is not what this machine has
    if on_gpu:
        say_cuda_calls()
    else:
        emulate()
    rows = []
    for num_rows, num_actions, old_std_per_row in CASES:
        batch = make_mini_batch(num_rows, num_actions, old_std_per_row, 0, args.device)
        names = gpu_backends() if on_gpu else ["cuda"]
        timings = {
            name: host_time(
                lambda batch=batch, name=name: pyfast_ppo.ppo_loss_and_grad(*batch, **COEFFICIENTS, backend=name),
                torch.cuda.synchronize if on_gpu else lambda: None,
            )
            for name in names
        }
        case = {"N": num_rows, "A": num_actions, "old_std": "[N, A]" if old_std_per_row else "[A]"}
        case["the launch itself"] = "with it" if on_gpu else "left out"
        rows.append(results.make_row(case, names[0], names, timings))
    results.add(document, "launch", rows, sum(sum(t["seconds"]) for t in rows[0]["contenders"].values()) * CALLS)
    print("\n".join(tables.blocks(rows)))
    if args.save is not None:
        print(f"written: {results.keep(document, Path(__file__).parent / 'results', args.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
