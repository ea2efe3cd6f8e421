"""Runs every GPU kernel a few times on small tensors of awkward shapes: what compute-sanitizer watches (on_gpu.sh)."""

from __future__ import annotations

import torch

import pyfast_ppo
from pyfast_ppo import backends, kl
from pyfast_ppo.bench.stock import make_mini_batch

SHAPES = [(1, 1), (257, 12), (1000, 29), (333, 37), (64, 300), (5, 2000)]


def run(backend: str) -> None:
    for num_rows, num_actions in SHAPES:
        for old_std_per_row in (False, True):
            inputs = list(make_mini_batch(num_rows, num_actions, old_std_per_row, 0, "cuda"))
            options = {"kl_coef": 0.5, "kl_direction": ("old_new", "new_old")[num_rows % 2], "backend": backend}
            pyfast_ppo.ppo_loss_and_grad(*inputs, **options, num_original=max(1, num_rows // 2))
            order = torch.randperm(num_rows, device="cuda")
            pyfast_ppo.ppo_loss_and_grad(*inputs, **options, row_index=order)
            inputs[1] = inputs[1].detach().repeat(num_rows, 1).requires_grad_()
            pyfast_ppo.ppo_loss_and_grad(*inputs, **options, use_clipped_value_loss=False)
            mean, std, _, actions, old_log_prob, old_mean, old_std, *_ = inputs
            pyfast_ppo.gaussian_log_prob(actions, mean, std, backend=backend).sum().backward()
            kl.gaussian_loss(actions, mean, std, old_log_prob, backend=backend).sum().backward()
            pyfast_ppo.gaussian_kl(old_mean, old_std, mean, std, backend=backend).sum().backward()
            pyfast_ppo.gaussian_entropy(std, backend=backend).sum().backward()
        rewards = torch.randn(num_actions, num_rows, device="cuda")
        flags = rewards > 1.0
        options = {"time_outs": flags, "final_values": rewards, "normalize": True, "backend": backend}
        pyfast_ppo.gae(rewards, rewards + 1.0, flags, rewards[0], 0.99, 0.95, **options)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for status in backends.status():
        if status.available and status.name in ("cuda", "triton"):
            run(status.name)
            print(f"{status.name}: every kernel ran")
