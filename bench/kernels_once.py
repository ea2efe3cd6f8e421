"""Runs every GPU kernel a few times on small tensors of awkward shapes: what compute-sanitizer watches (on_gpu.sh)."""

from __future__ import annotations

from typing import Any

import torch

import pyfast_ppo
from pyfast_ppo import backends, kl
from pyfast_ppo.bench.stock import make_mini_batch
from pyfast_ppo.ops.adam import AdamRow, AdamRule, adam_step
from pyfast_ppo.ops.learning_rate import adapted_rate

SHAPES = [(1, 1), (257, 12), (1000, 29), (333, 37), (64, 300), (5, 2000)]
LAYERS = [(1, 1), (777, 19), (500, 130), (3001, 128), (60_001, 32), (3, 20_000)]  # rows, units
SECOND_TILES = [(530, 12), (227, 29), (454, 37)]  # rows of a multiprocessor, A: more tiles than it takes at a time


def run_losses(num_rows: int, num_actions: int, old_std_per_row: bool, backend: str) -> list[torch.Tensor]:
    """Both layouts of the std, in the rollout's order and in another one; returns the inputs, the last std per row.

    Everything is drawn on the CPU: torch's own kernels are not what is watched.
    """
    inputs = list(make_mini_batch(num_rows, num_actions, old_std_per_row, 0, "cuda"))
    order = torch.randperm(num_rows).cuda()
    options: dict[str, Any] = {"kl_coef": 0.5, "kl_direction": ("old_new", "new_old")[num_rows % 2], "backend": backend}
    for use_clipped_value_loss in (True, False):
        options["use_clipped_value_loss"] = use_clipped_value_loss
        pyfast_ppo.ppo_loss_and_grad(*inputs, **options, num_original=max(1, num_rows // 2))
        pyfast_ppo.ppo_loss_and_grad(*inputs, **options, row_index=order)
        if use_clipped_value_loss:
            inputs[1] = inputs[1].detach().repeat(num_rows, 1).requires_grad_()
    return inputs


def run_steps(kernels: Any) -> None:
    """Adam with parameters of awkward sizes, aligned and not, taken and lost; the rule of the rate."""
    shapes = [(1,), (1023,), (37, 300), (5,)]
    for offset, value in ((0, 1.0), (1, 1.0), (0, torch.nan)):
        rows = []
        for i, shape in enumerate(shapes):
            parameter = torch.nn.Parameter(torch.ones(shape).cuda())
            memory = torch.full((parameter.numel() + offset,), value).cuda()
            parameter.grad = memory[offset:].view(shape)
            moments = [torch.ones(shape).cuda() for _ in range(2)]
            rows.append(AdamRow(parameter, *moments, torch.tensor(3.0).cuda(), i // 2))
        rate = torch.tensor(1e-3, dtype=torch.float64).cuda()
        for decoupled in (False, True):
            rule = AdamRule(0.9, 0.999, 1e-8, 0.1, decoupled)
            options: dict[str, Any] = {"max_norm": 1.0, "skip_nonfinite": True, "backend": kernels}
            lost = adam_step(rows, rule, rate=rate, skip=torch.tensor(False).cuda(), **options)
            limits = {"desired_kl": 0.01, "min_rate": 1e-5, "max_rate": 1e-2, "factor": 1.5}
            rate = adapted_rate(torch.tensor(0.1).cuda(), rate, **limits, lost=lost, backend=kernels.name)


def run_hidden_layer(activation: str, num_rows: int, num_units: int, kernels: Any) -> None:
    """Aligned and not, into memory of its own and in place."""
    for first in (0, 1):
        memory = torch.randn(2, num_rows * num_units + 4).cuda()[:, first:][:, : num_rows * num_units]
        y, grad = (t.view(num_rows, num_units) for t in memory)
        kernels.add_bias_and_activate(activation, y, torch.randn(num_units).cuda())
        for in_place in (False, True):
            kernels.add_bias_and_activate_backward(activation, grad, y, in_place)


def run(backend: str) -> None:
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    for rows_of_processor, num_actions in SECOND_TILES:
        for old_std_per_row in (False, True):
            run_losses(rows_of_processor * processors + 1, num_actions, old_std_per_row, backend)
    for num_rows, num_actions in SHAPES:
        for old_std_per_row in (False, True):
            inputs = run_losses(num_rows, num_actions, old_std_per_row, backend)
            mean, std, _, actions, old_log_prob, old_mean, old_std, *_ = inputs
            pyfast_ppo.gaussian_log_prob(actions, mean, std, backend=backend).sum().backward()
            kl.gaussian_loss(actions, mean, std, old_log_prob, backend=backend).sum().backward()
            pyfast_ppo.gaussian_kl(old_mean, old_std, mean, std, backend=backend).sum().backward()
            pyfast_ppo.gaussian_entropy(std, backend=backend).sum().backward()
        rewards = torch.randn(num_actions, num_rows)
        flags, rewards = (rewards > 1.0).cuda(), rewards.cuda()
        ends: dict[str, Any] = {"time_outs": flags, "final_values": rewards}
        pyfast_ppo.gae(rewards, rewards + 1.0, flags, rewards[0], 0.99, 0.95, **ends, normalize=True, backend=backend)
    kernels = backends.select(backend, torch.device("cuda"))
    if kernels.FUSES_UPDATE:
        run_steps(kernels)
        for num_rows, num_units in LAYERS:
            for activation in ("elu", "relu", "tanh"):
                run_hidden_layer(activation, num_rows, num_units, kernels)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for status in backends.status():
        if status.available and status.name in ("cuda", "triton"):
            run(status.name)
            print(f"{status.name}: every kernel ran")
