"""A loss in the KL from samples, forward and backward: ``kl.gaussian_loss`` against the same formula in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from pyfast_ppo import gaussian_log_prob, kl
from pyfast_ppo.bench import results
from pyfast_ppo.bench.counts import count
from pyfast_ppo.bench.harness import Contender, Options, able, interleave, num_input_sets, size_of

BASELINE, OURS = "eager", "gaussian_loss"
_CPU_SETS = 4


class Case(NamedTuple):
    """Rows N, actions A."""

    num_rows: int
    num_actions: int

    def __str__(self) -> str:
        return f"N = {self.num_rows:,}, A = {self.num_actions}"


class Samples(NamedTuple):
    """What the KL is estimated from; mean and std require gradients."""

    actions: Tensor  # [N, A]
    mean: Tensor  # [N, A]
    std: Tensor  # [A]
    old_log_prob: Tensor  # [N]


def cases(device: str, quick: bool) -> list[Case]:
    """Mini-batches of Isaac Lab."""
    return [Case(24_576, 12)] if quick else [Case(24_576, 12), Case(24_576, 37), Case(4_096, 12)]


def make_samples(case: Case, seed: int, device: str) -> Samples:
    """Actions of N(0, 1), and a policy near it."""
    g = torch.Generator().manual_seed(seed)
    actions, shift = torch.randn(2, case.num_rows, case.num_actions, generator=g)
    std = torch.full((case.num_actions,), 0.97)
    old_log_prob = Normal(0.0, 1.0).log_prob(actions).sum(-1)
    actions, mean, std, old_log_prob = (t.to(device) for t in (actions, 0.1 * shift, std, old_log_prob))
    return Samples(actions, mean.requires_grad_(), std.requires_grad_(), old_log_prob)


def eager(actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor) -> Tensor:
    """k3, as it is usually written."""
    log_ratio = Normal(mean, std.expand_as(mean), validate_args=False).log_prob(actions).sum(-1) - old_log_prob
    return (log_ratio.exp() - 1.0) - log_ratio


def in_two_parts(actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor) -> Tensor:
    """With the fused log-probability and the estimator in PyTorch."""
    return kl.loss(gaussian_log_prob(actions, mean, std) - old_log_prob)


def gradients(form: Callable[..., Tensor], samples: Samples) -> tuple[Tensor, ...]:
    """Of mean and std."""
    return torch.autograd.grad(form(*samples).mean(), (samples.mean, samples.std))


def measure(case: Case, options: Options) -> list[dict]:
    """One row."""
    first = make_samples(case, 0, options.device)
    moved = size_of(*first, first.mean, first.std)  # the last two are the gradients
    num_sets = num_input_sets(moved, options.device, on_cpu=_CPU_SETS)
    sets = [first, *(make_samples(case, seed, options.device) for seed in range(1, num_sets))]
    for ours, theirs in zip(gradients(kl.gaussian_loss, first), gradients(eager, first), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    torch.compiler.reset()

    def with_sets(form: Callable[..., Tensor]) -> Callable[[int], object]:
        return lambda i: gradients(form, sets[i % num_sets])

    forms = {
        BASELINE: eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        "gaussian_log_prob + loss": in_two_parts,
        OURS: kl.gaussian_loss,
    }
    kept, skipped = able(
        {name: Contender(with_sets(form), optional=name == "torch.compile") for name, form in forms.items()}
    )
    timings = interleave(kept, num_sets, options)
    counts = {name: count(partial(c.call, 0), options.device) for name, c in kept.items()}
    described = {"N": case.num_rows, "A": case.num_actions}
    return [
        results.make_row(
            described, BASELINE, [OURS, "gaussian_log_prob + loss"], timings, counts=counts, skipped=skipped
        )
    ]
