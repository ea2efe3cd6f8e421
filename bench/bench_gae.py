"""Generalised advantage estimation with normalisation: pyfast_ppo against rsl_rl's loop over the steps.

python bench/bench_gae.py                  # the CPU
python bench/bench_gae.py --device cuda    # GPU time, captured in CUDA graphs
python bench/bench_gae.py --save NAME      # also writes bench/results/NAME/gae.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import RESULTS, gpu_backends, interleave, interleave_graphs, machine, print_table, write_results
from torch import Tensor

import pyfast_ppo

GAMMA, LAM = 0.99, 0.95
CASES = [(24, 4096), (16, 4096), (64, 8192)]  # steps T, environments E
NUM_INPUT_SETS = 8


def make_inputs(num_steps: int, num_envs: int, seed: int, device: str) -> tuple[Tensor, ...]:
    """rewards, values, dones [T, E, 1] as rsl_rl stores them, last values [E, 1]."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, num_steps, num_envs, 1, generator=g)
    dones = (torch.rand(num_steps, num_envs, 1, generator=g) < 0.02).byte()
    return tuple(t.to(device) for t in (rewards, values, dones, torch.randn(num_envs, 1, generator=g)))


def stock_gae(rewards: Tensor, values: Tensor, dones: Tensor, last_values: Tensor) -> tuple[Tensor, Tensor]:
    """The lines of rsl_rl 5.5.1's PPO.compute_returns, with its normalisation."""
    returns = torch.empty_like(values)
    advantage = 0
    for step in reversed(range(rewards.shape[0])):
        next_values = last_values if step == rewards.shape[0] - 1 else values[step + 1]
        next_is_not_terminal = 1.0 - dones[step].float()
        delta = rewards[step] + next_is_not_terminal * GAMMA * next_values - values[step]
        advantage = delta + next_is_not_terminal * GAMMA * LAM * advantage
        returns[step] = advantage + values[step]
    advantages = returns - values
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns


def fused_gae(*inputs: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return pyfast_ppo.gae(*inputs, GAMMA, LAM, normalize=True, backend=backend)


def contenders(inputs: list[tuple[Tensor, ...]]) -> dict[str, Callable[[int], object]]:
    def fused(backend: str | None) -> Callable[[int], object]:
        return lambda i: fused_gae(*inputs[i % len(inputs)], backend=backend)

    on_this_gpu = gpu_backends() if inputs[0][0].is_cuda else []
    return {
        "rsl_rl": lambda i: stock_gae(*inputs[i % len(inputs)]),
        "gae": fused(None),
        **{name: fused(name) for name in on_this_gpu},
    }


def measured_row(num_steps: int, num_envs: int, device: str, rounds: int) -> dict:
    inputs = [make_inputs(num_steps, num_envs, seed, device) for seed in range(NUM_INPUT_SETS)]
    for ours, stock in zip(fused_gae(*inputs[0]), stock_gae(*inputs[0]), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    if device == "cuda":
        timings = interleave_graphs(contenders(inputs), NUM_INPUT_SETS, rounds, replays=20)
    else:
        timings = interleave(contenders(inputs), rounds)
    row = {"T": num_steps, "E": num_envs}
    for name, timing in timings.items():
        row[name] = {"median ms": 1e3 * timing.median, "p10 ms": 1e3 * timing.percentile(0.1)}
        row[name]["p90 ms"] = 1e3 * timing.percentile(0.9)
    row["gae"]["times faster than rsl_rl"] = timings["gae"].times_faster_than(timings["rsl_rl"])
    moved = sum(t.numel() * t.element_size() for t in (*inputs[0], inputs[0][0], inputs[0][0]))
    row["gae"]["GB/s"] = moved / timings["gae"].median / 1e9
    return row


def displayed(row: dict) -> dict[str, str]:
    return {
        "T": str(row["T"]),
        "E": f"{row['E']:,}",
        "rsl_rl us": f"{1e3 * row['rsl_rl']['median ms']:.1f}",
        "gae us": f"{1e3 * row['gae']['median ms']:.1f}",
        "x rsl_rl": f"{row['gae']['times faster than rsl_rl']:.1f}",
        "GB/s": f"{row['gae']['GB/s']:.1f}",
        **{f"{name} us": f"{1e3 * row[name]['median ms']:.1f}" for name in ("cuda", "triton") if name in row},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/gae.json")
    args = parser.parse_args()
    print("  ".join(f"{k}: {v}" for k, v in machine().items()))
    rows = [measured_row(*case, args.device, args.rounds) for case in CASES]
    print_table([displayed(row) for row in rows])
    if args.save:
        print(f"written: {write_results('gae', rows, RESULTS / args.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
