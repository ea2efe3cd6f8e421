"""``use_mixed_precision``, which rsl_rl has since 5.5: conftest.py leaves this file out where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"


def test_mixed_precision_stays_within_the_divergence_of_one_ulp(train: Callable) -> None:
    """As in test_parity.py, with the figures of bfloat16: its rounding errors are 2⁻⁹, not 2⁻²⁴, of a number, but only
    some of the differences are large enough to change how a number is rounded. Two PPOs diverge by 1e-5 to 5e-4.
    Measured: up to 3 times as much."""
    args = {"schedule": "fixed", "use_mixed_precision": True}
    stock = train("PPO", 20, args=args)
    nudged = train("PPO", 20, nudge=0, args=args)
    fused = train(FUSED, 20, args={**args, "keep_random_stream": True})
    divergence, yardstick = fused.distance(stock), nudged.distance(stock)
    print(f"divergence {divergence:.1e}, of one ulp {yardstick:.1e}")
    assert yardstick < 1e-2
    assert divergence <= 10.0 * max(yardstick, 1e-5)
    assert torch.equal(fused.random_state, stock.random_state)


@pytest.mark.parametrize("learn_std", [True, False])
def test_mixed_precision_has_the_gradients_of_ppo_to_the_rounding_of_bfloat16(
    learn_std: bool, new_run: Callable
) -> None:
    config = {
        "actor": {"distribution_cfg": {"learn_std": learn_std}},
        "args": {"use_mixed_precision": True, "num_learning_epochs": 1, "num_mini_batches": 1, "max_grad_norm": 1e9},
    }
    grads = {}
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, **config).rollout()
        run.alg.update()
        parameters = [*run.alg.actor.parameters(), *run.alg.critic.parameters()]
        grads[algorithm] = [p.grad for p in parameters if p.requires_grad]
    for ours, theirs in zip(grads[FUSED], grads["PPO"], strict=True):
        assert (ours - theirs).abs().max() <= 2**-8 * theirs.abs().max()


def test_the_learning_rate_in_mixed_precision(train: Callable) -> None:
    """Acting in float32 and updating in bfloat16 gives the first mini-batch a KL of about 1e-6. PPO takes it for a
    policy that has moved too little and raises the rate; FusedPPO does so on request only."""
    args = {"schedule": "adaptive", "use_mixed_precision": True}
    stock = train("PPO", 3, args=args)
    following = train(FUSED, 3, args={**args, "adapt_before_first_step": True, "keep_random_stream": True})
    default = train(FUSED, 3, args=args)

    assert 0.0 < default.losses[0]["first_kl"] < 1e-4
    assert stock.rates[0] == pytest.approx(1.5e-3)
    assert following.rates == stock.rates
    assert default.rates[0] == 1e-3
