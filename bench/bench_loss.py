"""The loss and all its gradients: pyfast_ppo against rsl_rl's own formula, in eager PyTorch and under torch.compile.

python bench/bench_loss.py            # the table of the README
python bench/bench_loss.py --quick    # the first two lines, fewer rounds
python bench/bench_loss.py --save     # also writes bench/results/<machine>/loss.json
python bench/bench_loss.py --device cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median

import torch
from harness import RESULTS, Timing, gpu_backends, interleave, interleave_graphs, machine, print_table, write_results
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import pyfast_ppo

COEFFICIENTS = {"clip_param": 0.2, "value_loss_coef": 1.0, "entropy_coef": 0.01}

# Where the data are when a call begins: one input set is still in the caches from the call before, as a mini-batch is
# that was just gathered; four in turn have been pushed out to memory, at least in part.
NUM_INPUT_SETS = {"cache": 1, "memory": 4}

# rows N, actions A, whether old_std is stored per row as rsl_rl does, and the least that is expected with the data in
# the caches: (eager, compiled)
CASES = [
    (24_576, 12, True, (20.0, 2.5)),
    (24_576, 12, False, (25.0, 3.0)),
    (98_304, 29, True, None),
    (98_304, 29, False, None),
    (24_576, 1, True, None),
    (24_576, 37, True, None),
]


# On a GPU calls are captured in CUDA graphs, with as many input sets in turn as do not fit its second-level cache.
GPU_CASES = [
    (24_576, 12, True),
    (24_576, 12, False),
    (24_576, 1, True),
    (24_576, 37, True),
    (98_304, 29, True),
    (1_048_576, 32, True),
    (1_048_576, 32, False),
]
GPU_BYTES_IN_TURN = 200e6


def make_inputs(
    num_rows: int, num_actions: int, old_std_per_row: bool, seed: int, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """A mini-batch a few steps into an update; mean, std and values require gradients."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    old_mean = randn(num_rows, num_actions)
    old_std = 0.5 + torch.rand(num_actions, generator=g)
    actions = old_mean + old_std * randn(num_rows, num_actions)
    old_log_prob = Normal(old_mean, old_std).log_prob(actions).sum(-1, keepdim=True)
    mean = (old_mean + 0.05 * randn(num_rows, num_actions)).to(device).requires_grad_()
    std = (old_std * 1.02).to(device).requires_grad_()
    old_values = randn(num_rows, 1)
    values = (old_values + 0.1 * randn(num_rows, 1)).to(device).requires_grad_()
    if old_std_per_row:
        old_std = old_std.repeat(num_rows, 1)
    rollout = (actions, old_log_prob, old_mean, old_std, randn(num_rows, 1), randn(num_rows, 1), old_values)
    return mean, std, values, *(t.to(device) for t in rollout)


def stock_loss(
    mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values
) -> tuple[Tensor, Tensor]:
    """The lines of rsl_rl 5.5.1's PPO.update between the networks and backward(), and its distribution's formulas."""
    clip_param, value_loss_coef, entropy_coef = COEFFICIENTS.values()
    distribution = Normal(mean, std, validate_args=False)
    actions_log_prob = distribution.log_prob(actions).sum(dim=-1)
    entropy = distribution.entropy().sum(dim=-1)
    with torch.no_grad():
        old = Normal(old_mean, old_std, validate_args=False)
        new = Normal(distribution.mean, distribution.stddev, validate_args=False)
        kl_mean = kl_divergence(old, new).sum(dim=-1).mean()
    ratio = torch.exp(actions_log_prob - torch.squeeze(old_log_prob))
    surrogate = -torch.squeeze(advantages) * ratio
    surrogate_clipped = -torch.squeeze(advantages) * torch.clamp(ratio, 1.0 - clip_param, 1.0 + clip_param)
    surrogate_loss = torch.max(surrogate, surrogate_clipped).mean()
    value_clipped = old_values + (values - old_values).clamp(-clip_param, clip_param)
    value_losses = (values - returns).pow(2)
    value_losses_clipped = (value_clipped - returns).pow(2)
    value_loss = torch.max(value_losses, value_losses_clipped).mean()
    return surrogate_loss + value_loss_coef * value_loss - entropy_coef * entropy.mean(), kl_mean


def contenders(inputs: list[tuple[Tensor, ...]]) -> dict[str, Callable[[int], object]]:
    compiled = torch.compile(stock_loss)

    def with_gradients(loss_of: Callable[..., tuple[Tensor, ...]]) -> Callable[[int], object]:
        def call(i: int) -> object:
            args = inputs[i % len(inputs)]
            out = loss_of(*args)
            return out, torch.autograd.grad(out[0], args[:3])

        return call

    def with_backend(name: str) -> Callable[[int], object]:
        return lambda i: pyfast_ppo.ppo_loss_and_grad(*inputs[i % len(inputs)], **COEFFICIENTS, backend=name)

    sources = inputs[0]
    buffers = [torch.empty_like(t) for t in sources]
    on_this_gpu = gpu_backends() if sources[0].is_cuda else []
    return {
        "eager": with_gradients(stock_loss),
        "compiled": with_gradients(compiled),
        "ppo_loss": with_gradients(lambda *args: pyfast_ppo.ppo_loss(*args, **COEFFICIENTS)),
        "ppo_loss_and_grad": lambda i: pyfast_ppo.ppo_loss_and_grad(*inputs[i % len(inputs)], **COEFFICIENTS),
        **{name: with_backend(name) for name in on_this_gpu},
        "copy": lambda i: torch._foreach_copy_(buffers, [t.detach() for t in inputs[i % len(inputs)]]),
    }


def bytes_of(inputs: tuple[Tensor, ...]) -> int:
    """What one pass must move: every input read once, the three gradients written once."""
    return sum(t.numel() * t.element_size() for t in (*inputs, *inputs[:3]))


def check_agreement(inputs: tuple[Tensor, ...]) -> None:
    """A benchmark of two different things would be worthless."""
    loss, kl = stock_loss(*inputs)
    stock_grads = torch.autograd.grad(loss, inputs[:3])
    out, grads = pyfast_ppo.ppo_loss_and_grad(*inputs, **COEFFICIENTS)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.kl, kl, rtol=1e-3, atol=1e-6)
    for ours, stock in zip(grads, stock_grads, strict=True):
        assert (ours - stock).norm() <= 1e-5 * stock.norm(), "the gradients differ"


def measured_row(inputs: tuple[Tensor, ...], data: str, timings: dict[str, Timing]) -> dict:
    """The figures of one case, as they go into the JSON file."""
    old_std = inputs[6]
    row = {"N": inputs[0].shape[0], "A": inputs[0].shape[1], "old_std": "[N, A]" if old_std.dim() == 2 else "[A]"}
    row["data in"] = data
    for name, timing in timings.items():
        row[name] = {"median ms": 1e3 * timing.median, "p10 ms": 1e3 * timing.percentile(0.1)}
        row[name] |= {"p90 ms": 1e3 * timing.percentile(0.9), "first call ms": 1e3 * median(timing.first_call)}
    for name in ("ppo_loss", "ppo_loss_and_grad"):
        for other in ("eager", "compiled"):
            row[name][f"times faster than {other}"] = timings[name].times_faster_than(timings[other])
    input_bytes = sum(t.numel() * t.element_size() for t in inputs)
    row["ppo_loss_and_grad"]["GB/s"] = bytes_of(inputs) / timings["ppo_loss_and_grad"].median / 1e9
    row["copy"]["GB/s"] = 2 * input_bytes / timings["copy"].median / 1e9
    return row


def on_gpu(rounds: int) -> list[dict]:
    """Microseconds and GB/s of the GPU's own work."""
    rows = []
    for num_rows, num_actions, old_std_per_row in GPU_CASES:
        first = make_inputs(num_rows, num_actions, old_std_per_row, 0, "cuda")
        num_sets = max(2, min(64, round(GPU_BYTES_IN_TURN / bytes_of(first))))
        inputs = [first]
        for _ in range(num_sets - 1):  # as rows in another order: quicker than drawing them
            order = torch.randperm(num_rows, device="cuda")
            rows_of = [t.detach()[order] if t.shape[0] == num_rows else t.detach().clone() for t in first]
            inputs.append(tuple(t.requires_grad_(i < 3) for i, t in enumerate(rows_of)))
        check_agreement(first)
        replays = max(1, 20_000_000 // num_rows // num_sets)
        timings = interleave_graphs(contenders(inputs), num_sets, rounds, replays)
        row = measured_row(first, "memory", timings)
        rows.append(row)
        ours, copy = row["ppo_loss_and_grad"], row["copy"]
        each = "  ".join(f"{name} {1e3 * row[name]['median ms']:.2f} us" for name in gpu_backends())
        print(
            f"{num_rows:>9,} x {num_actions:<2} old_std {row['old_std']:<6}  {1e3 * ours['median ms']:8.2f} us  "
            f"{ours['GB/s']:6.0f} GB/s (copy {copy['GB/s']:.0f})  {ours['times faster than eager']:6.1f} x eager  "
            f"{ours['times faster than compiled']:5.1f} x compiled  host {1e3 * ours['first call ms']:.0f} us  {each}",
            flush=True,
        )
    return rows


def displayed(row: dict) -> dict[str, str]:
    """The same as cells of the printed table."""
    ours, autograd = row["ppo_loss_and_grad"], row["ppo_loss"]
    return {
        "N": f"{row['N']:,}",
        "A": str(row["A"]),
        "old_std": row["old_std"],
        "data in": row["data in"],
        "eager ms": f"{row['eager']['median ms']:.2f}",
        "compiled ms": f"{row['compiled']['median ms']:.2f}",
        "and_grad ms": f"{ours['median ms']:.2f} ({ours['p10 ms']:.2f} to {ours['p90 ms']:.2f})",
        "x eager": f"{ours['times faster than eager']:.1f}",
        "x compiled": f"{ours['times faster than compiled']:.1f}",
        "first call ms": f"{ours['first call ms']:.2f}",
        "autograd ms": f"{autograd['median ms']:.2f}",
        "its x eager": f"{autograd['times faster than eager']:.1f}",
        "its x compiled": f"{autograd['times faster than compiled']:.1f}",
        "GB/s (copy)": f"{ours['GB/s']:.1f} ({row['copy']['GB/s']:.1f})",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two cases, fewer rounds")
    parser.add_argument("--rounds", type=int, default=None, help="rounds per case (default: 40, quick: 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/loss.json")
    args = parser.parse_args()
    rounds = args.rounds or (15 if args.quick else 40)
    print("  ".join(f"{k}: {v}" for k, v in machine().items()))

    if args.device == "cuda":
        rows = on_gpu(rounds)
        if args.save:
            print(f"written: {write_results('loss', rows, RESULTS / args.save)}")
        return 0

    rows, missed = [], []
    for num_rows, num_actions, old_std_per_row, bar in CASES[:2] if args.quick else CASES:
        for data, num_sets in NUM_INPUT_SETS.items():
            inputs = [make_inputs(num_rows, num_actions, old_std_per_row, seed) for seed in range(num_sets)]
            check_agreement(inputs[0])
            row = measured_row(inputs[0], data, interleave(contenders(inputs), rounds))
            rows.append(row)
            case = f"N = {num_rows}, A = {num_actions}, old_std {row['old_std']}, data in {data}"
            print(f"measured {case}", file=sys.stderr)
            faster = [row["ppo_loss_and_grad"][f"times faster than {other}"] for other in ("eager", "compiled")]
            if bar and data == "cache" and any(f < b for f, b in zip(faster, bar, strict=True)):
                missed.append(f"{case}: {faster[0]:.1f} and {faster[1]:.1f} times, expected {bar[0]} and {bar[1]}")

    print_table([displayed(row) for row in rows])
    print("and_grad: ppo_loss_and_grad; autograd: ppo_loss and torch.autograd.grad; (10th to 90th percentile)")
    for line in missed:
        print(f"below the bar: {line}")
    if args.save:
        print(f"written: {write_results('loss', rows, RESULTS / args.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
