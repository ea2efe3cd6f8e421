"""A loss in the KL from samples, forward and backward: kl.gaussian_loss against the same formula in PyTorch.

python bench/bench_kl.py                  # the CPU
python bench/bench_kl.py --device cuda    # host and GPU time
python bench/bench_kl.py --save NAME      # also writes bench/results/NAME/kl.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import RESULTS, interleave, machine, print_table, write_results
from torch import Tensor
from torch.distributions import Normal

from pyfast_ppo import gaussian_log_prob, kl

CASES = [(24_576, 12), (24_576, 37), (4_096, 12)]  # rows N, actions A
NUM_INPUT_SETS = 4


def make_inputs(num_rows: int, num_actions: int, seed: int, device: str) -> tuple[Tensor, ...]:
    """actions, mean [N, A], std [A], old_log_prob [N]."""
    g = torch.Generator().manual_seed(seed)
    actions, shift = torch.randn(2, num_rows, num_actions, generator=g)
    std = torch.full((num_actions,), 0.97)
    old_log_prob = Normal(0.0, 1.0).log_prob(actions).sum(-1)
    actions, mean, std, old_log_prob = (t.to(device) for t in (actions, 0.1 * shift, std, old_log_prob))
    return actions, mean.requires_grad_(), std.requires_grad_(), old_log_prob


def eager(actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor) -> Tensor:
    """k3, as it is usually written."""
    log_ratio = Normal(mean, std.expand_as(mean)).log_prob(actions).sum(-1) - old_log_prob
    return (log_ratio.exp() - 1.0) - log_ratio


def in_two_parts(actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor) -> Tensor:
    return kl.loss(gaussian_log_prob(actions, mean, std) - old_log_prob)


FORMS = {"eager": eager, "gaussian_log_prob + loss": in_two_parts, "gaussian_loss": kl.gaussian_loss}


def gradients(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(*inputs).mean(), inputs[1:3])


def measured_row(num_rows: int, num_actions: int, device: str, rounds: int) -> dict:
    inputs = [make_inputs(num_rows, num_actions, seed, device) for seed in range(NUM_INPUT_SETS)]
    for ours, theirs in zip(gradients(kl.gaussian_loss, inputs[0]), gradients(eager, inputs[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    contenders = {
        name: lambda i, form=form: gradients(form, inputs[i % NUM_INPUT_SETS]) for name, form in FORMS.items()
    }
    timings = interleave(contenders, rounds, synchronize=torch.cuda.synchronize if device == "cuda" else None)
    row = {"N": num_rows, "A": num_actions}
    for name, timing in timings.items():
        row[name] = {"median ms": 1e3 * timing.median, "p10 ms": 1e3 * timing.percentile(0.1)}
        row[name]["p90 ms"] = 1e3 * timing.percentile(0.9)
        row[name]["gaussian_loss is times faster"] = timings["gaussian_loss"].times_faster_than(timing)
    return row


def displayed(row: dict) -> dict[str, str]:
    cells = {"N": f"{row['N']:,}", "A": str(row["A"])}
    for name in FORMS:
        cells[f"{name} ms"] = f"{row[name]['median ms']:.3f}"
    for name in FORMS:
        if name != "gaussian_loss":
            cells[f"x {name}"] = f"{row[name]['gaussian_loss is times faster']:.1f}"
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/kl.json")
    args = parser.parse_args()
    print("  ".join(f"{k}: {v}" for k, v in machine().items()))
    rows = [measured_row(*case, args.device, args.rounds) for case in CASES]
    print_table([displayed(row) for row in rows])
    if args.save:
        print(f"written: {write_results('kl', rows, RESULTS / args.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
