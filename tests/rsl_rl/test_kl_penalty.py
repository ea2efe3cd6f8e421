"""``kl_coef`` and ``kl_direction`` against an update written down by hand: one loss, autograd through the networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rsl_rl.algorithms import PPO
from torch import nn
from torch.distributions import Normal, kl_divergence

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"

HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
AUGMENTED = {"symmetry_cfg": {"use_data_augmentation": True}}
EXACT_IN_FLOAT32 = {"gamma": 63 / 64, "lam": 15 / 16}  # where rsl_rl's returns have γ and γλ, whatever the dtype


class PenalizedPPO(PPO):
    """PPO with the KL of torch.distributions in its loss, for feed-forward policies without RND."""

    rate_by_penalty = False  # the adaptive learning rate goes by the KL of the penalty, not always by KL(old‖new)

    def __init__(self, *args, kl_coef: float, kl_direction: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kl_coef = kl_coef
        self.kl_direction = kl_direction

    def update(self) -> dict[str, float]:
        kls = []
        for batch in self.storage.mini_batch_generator(self.num_mini_batches, self.num_learning_epochs):
            num_original = batch.observations.batch_size[0]
            if self.symmetry:
                self.symmetry.augment_batch(batch, num_original)
            self.actor(batch.observations, stochastic_output=True)  # draws, as PPO does
            new = Normal(self.actor.output_mean, self.actor.output_std)
            values = self.critic(batch.observations)

            old_original = Normal(*batch.old_distribution_params)
            new_original = Normal(new.mean[:num_original], new.stddev[:num_original])
            kl_old_new = kl_divergence(old_original, new_original).sum(-1).mean()
            kl_new_old = kl_divergence(new_original, old_original).sum(-1).mean()
            kl = kl_old_new if self.kl_direction == "old_new" else kl_new_old

            if self.schedule == "adaptive":
                kl_of_rate = kl if self.rate_by_penalty else kl_old_new
                if kl_of_rate > 2.0 * self.desired_kl:
                    self.learning_rate = max(1e-5, self.learning_rate / 1.5)
                elif kl_of_rate < 0.5 * self.desired_kl and kls:  # not before the first step
                    self.learning_rate = min(1e-2, self.learning_rate * 1.5)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate

            ratio = (new.log_prob(batch.actions).sum(-1, keepdim=True) - batch.old_actions_log_prob).exp()
            clipped = ratio.clamp(1.0 - self.clip_param, 1.0 + self.clip_param)
            surrogate = -torch.min(batch.advantages * ratio, batch.advantages * clipped).mean()
            value_clipped = batch.values + (values - batch.values).clamp(-self.clip_param, self.clip_param)
            value_loss = torch.max((values - batch.returns) ** 2, (value_clipped - batch.returns) ** 2).mean()
            entropy = new_original.entropy().sum(-1).mean()
            loss = surrogate + self.value_loss_coef * value_loss - self.entropy_coef * entropy + self.kl_coef * kl

            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.actor.parameters(), self.max_grad_norm)
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
            self.optimizer.step()
            kls.append(kl.item())
        obs = self.storage.observations.flatten(0, 1)
        self.actor.update_normalization(obs)
        self.critic.update_normalization(obs)
        self.storage.clear()
        return {"kl": sum(kls) / len(kls)}


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize(
    "config",
    [{}, {"actor": HETEROSCEDASTIC}, {"args": AUGMENTED}, {"actor": HETEROSCEDASTIC, "args": AUGMENTED}],
    ids=["plain", "heteroscedastic", "augmented", "augmented_heteroscedastic"],
)
def test_the_update_is_the_one_written_by_hand(
    config: dict, direction: str, schedule: str, float64: None, train: Callable
) -> None:
    args = {
        **EXACT_IN_FLOAT32,
        **config.get("args", {}),
        "schedule": schedule,
        "learning_rate": 3e-3,
        "kl_coef": 0.7,
        "kl_direction": direction,
    }
    by_hand = train(PenalizedPPO, 5, **{**config, "args": args})
    fused = train(FUSED, 5, **{**config, "args": {**args, "keep_random_stream": True}})
    assert fused.rates == by_hand.rates
    assert (len(set(fused.rates)) > 1) == (schedule == "adaptive")
    assert fused.distance(by_hand) < 1e-12
    for ours, theirs in zip(fused.losses, by_hand.losses, strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-9)

    # and the penalty is not lost in the tolerance
    without = train(FUSED, 5, **{**config, "args": {**args, "keep_random_stream": True, "kl_coef": 0.0}})
    assert fused.distance(without) > 1e-3


def test_the_learning_rate_goes_by_the_kl_from_the_old_policy(float64: None, train: Callable) -> None:
    """Also where the penalty has the other direction. A small std, so that the two are not alike."""

    class RateByPenalty(PenalizedPPO):
        rate_by_penalty = True

    args = {
        **EXACT_IN_FLOAT32,
        "num_learning_epochs": 5,
        "learning_rate": 1e-2,
        "desired_kl": 0.2,
        "kl_coef": 0.1,
        "kl_direction": "new_old",
    }
    config = {"actor": {"distribution_cfg": {"init_std": 0.1}}}
    by_hand, by_penalty = (train(alg, 8, **config, args=args) for alg in (PenalizedPPO, RateByPenalty))
    fused = train(FUSED, 8, **config, args={**args, "keep_random_stream": True})
    assert by_penalty.rates != by_hand.rates
    assert fused.rates == by_hand.rates
    assert fused.distance(by_hand) < 1e-12


def test_the_two_directions_differ(float64: None, train: Callable) -> None:
    args = {"schedule": "fixed", "learning_rate": 1e-2, "kl_coef": 1.0}
    old_new, new_old = (train(FUSED, 3, args={**args, "kl_direction": d}) for d in ("old_new", "new_old"))
    assert old_new.distance(new_old) > 1e-4


@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_penalty_lowers_the_kl_that_an_update_reaches(recurrent: bool, direction: str, train: Callable) -> None:
    config = {"actor": {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8}} if recurrent else {}
    args = {"schedule": "fixed", "learning_rate": 3e-3, "num_learning_epochs": 5, "kl_direction": direction}
    reached = []
    for kl_coef in (0.0, 1.0, 10.0):
        run = train(FUSED, 5, **config, args={**args, "kl_coef": kl_coef})
        reached.append(sum(losses["kl"] for losses in run.losses))
    assert reached[1] < 0.8 * reached[0]
    assert reached[2] < 0.5 * reached[1]
