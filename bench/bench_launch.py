"""What one call of ppo_loss_and_grad costs the host: checks, outputs, and the launch.

python bench/bench_launch.py                  # CPU tensors, the CUDA launch itself left out (tests/csrc/emulation)
python bench/bench_launch.py --device cuda    # GPU tensors, with it; the GPU works on meanwhile
python bench/bench_launch.py --save NAME      # also writes bench/results/NAME/launch.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from bench_loss import COEFFICIENTS, make_inputs
from harness import RESULTS, gpu_backends, machine, print_table, write_results

import pyfast_ppo

CASES = [(24_576, 12, True), (24_576, 12, False)]
CALLS, ROUNDS = 500, 30


def microseconds(call, synchronize) -> list[float]:
    """Per call, one entry a round."""
    rounds = []
    for i in range(-5, ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        elapsed = time.perf_counter() - start
        if i >= 0:
            rounds.append(1e6 * elapsed / CALLS)
    synchronize()
    return rounds


def emulate() -> None:
    """The CUDA backend takes CPU tensors; kernels are launched and do nothing."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ops" / "oracles"))
    import cuda_on_cpu

    cuda_on_cpu.install().run_kernels(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/launch.json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    print("  ".join(f"{k}: {v}" for k, v in machine().items()))
    if not on_gpu:
        emulate()
    rows = []
    for num_rows, num_actions, old_std_per_row in CASES:
        inputs = make_inputs(num_rows, num_actions, old_std_per_row, 0, args.device)
        for backend in gpu_backends() if on_gpu else ["cuda"]:

            def call(inputs=inputs, backend=backend) -> object:
                return pyfast_ppo.ppo_loss_and_grad(*inputs, **COEFFICIENTS, backend=backend)

            found = microseconds(call, torch.cuda.synchronize if on_gpu else lambda: None)
            row = {"N": num_rows, "A": num_actions, "old_std": "[N, A]" if old_std_per_row else "[A]"}
            row |= {"backend": backend, "with the launch": on_gpu, "median us": median(found), "least us": min(found)}
            rows.append(row)
    print_table([{k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows])
    if args.save:
        print(f"written: {write_results('launch', rows, RESULTS / args.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
