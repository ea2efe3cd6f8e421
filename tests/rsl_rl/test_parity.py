"""20 iterations of rsl_rl's runner with FusedPPO leave what they leave with PPO, for each feature of rsl_rl.

Two yardsticks:

- In float32, as users run it, each step of the optimizer may differ by a rounding error, and training amplifies it:
  Adam divides the gradient by its own size, so that a component which is rounding noise moves a parameter as far as any
  other. How much, depends on the feature. So the stock PPO runs twice, the second time from parameters that were moved
  by one unit in the last place, and FusedPPO may be off from it by ``MARGIN`` times what these two are off from each
  other. Measured: 3e-8 to 8e-7, 0.15 to 1.4 times the yardstick; with other sizes and seeds up to 3 times.
- In float64, after 10 iterations, rounding stays below 1e-13, so that anything of another size is another formula: a
  single constant in float32 would show as 1e-8. Measured: up to 6e-16, with other sizes and seeds 3e-14.

The sequence of learning rates must be the same, number by number, and so must be the state of the random generator.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from rsl_rl.algorithms import PPO
from rsl_rl.modules.distribution import HeteroscedasticGaussianDistribution
from torch import Tensor

from pyfast_ppo.rsl_rl import fused_ppo
from pyfast_ppo.versions import release

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
MARGIN = 10.0
LEAST_DIVERGENCE = 1e-7  # what the yardstick counts at least: one unit in the last place of a parameter near 1
FLOAT64_TOLERANCE = 1e-12
EXACT_IN_FLOAT32 = {"gamma": 63 / 64, "lam": 15 / 16}  # where rsl_rl's returns have γ and γλ, whatever the dtype

HAS_MIXED_PRECISION = "use_mixed_precision" in inspect.signature(PPO.__init__).parameters
NORMALIZES_IN_UPDATE = "update_normalization" in inspect.getsource(PPO.update)

RND = {
    "num_outputs": 4,
    "predictor_hidden_dims": [8],
    "target_hidden_dims": [8],
    "weight": 0.5,
    "state_normalization": True,
    "reward_normalization": True,
}
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
GRU = {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8, "rnn_num_layers": 2}
CNN = {"class_name": "CNNModel", "cnn_cfg": {"output_channels": [2], "kernel_size": 3}}
IMAGES = {
    "obs_groups": {"actor": ["policy", "image"], "critic": ["policy", "image"]},
    "env_args": {"images": True},
}
HETEROSCEDASTIC = HeteroscedasticGaussianDistribution
MIRROR_LOSS = {"use_mirror_loss": True, "mirror_loss_coeff": 0.5}

FEATURES: dict[str, dict] = {
    "plain": {},
    "rnd": {"args": {"rnd_cfg": RND}},
    "symmetry_logged": {"args": {"symmetry_cfg": {}}},
    "symmetry_augmentation": {"args": {"symmetry_cfg": {"use_data_augmentation": True}}},
    "symmetry_mirror_loss": {"args": {"symmetry_cfg": MIRROR_LOSS}},
    "symmetry_both": {"args": {"symmetry_cfg": {"use_data_augmentation": True, **MIRROR_LOSS}}},
    "lstm": {"actor": LSTM, "critic": LSTM},
    "gru": {"actor": GRU, "critic": GRU},
    "recurrent_actor": {"actor": LSTM},
    "recurrent_critic": {"critic": GRU},
    "cnn": {"actor": CNN, "critic": CNN, **IMAGES},
    "shared_cnn": {
        "actor": CNN,
        "critic": {"class_name": "CNNModel"},
        **IMAGES,
        "args": {"share_cnn_encoders": True},
    },
    # the range keeps the std from falling to 0, where no two runs stay together
    "heteroscedastic_scalar": {
        "actor": {"distribution_cfg": {"class_name": HETEROSCEDASTIC, "std_type": "scalar", "std_range": (0.2, 5.0)}}
    },
    "heteroscedastic_log": {"actor": {"distribution_cfg": {"class_name": HETEROSCEDASTIC, "std_type": "log"}}},
    "log_std": {"actor": {"distribution_cfg": {"std_type": "log", "init_std": 0.7}}},
    "fixed_std": {"actor": {"distribution_cfg": {"learn_std": False}}},
    "beta": {"actor": {"distribution_cfg": {"class_name": "BetaDistribution"}}},
    "advantages_per_mini_batch": {"args": {"normalize_advantage_per_mini_batch": True}},
    "normalized_observations": {"actor": {"obs_normalization": True}, "critic": {"obs_normalization": True}},
    "unclipped_value_loss": {"args": {"use_clipped_value_loss": False}},
    "adamw": {"args": {"optimizer": "adamw"}},
    "sgd": {"args": {"optimizer": "sgd", "learning_rate": 5e-3}},
    "rmsprop": {"args": {"optimizer": "rmsprop"}},
    "no_entropy": {"args": {"entropy_coef": 0.0}},
    "tight_gradient_norm": {"args": {"max_grad_norm": 0.05}},
    "other_numbers": {"args": {"clip_param": 0.05, "value_loss_coef": 0.25, "gamma": 0.875, "lam": 0.75}},
}
"""What users switch on: compared with the fixed and with the adaptive learning rate."""

CORNERS: dict[str, dict] = {
    "rnd_and_symmetry": {"args": {"rnd_cfg": RND, "symmetry_cfg": {"use_data_augmentation": True, **MIRROR_LOSS}}},
    "symmetry_heteroscedastic": {
        "args": {"symmetry_cfg": {"use_data_augmentation": True}},
        "actor": {"distribution_cfg": {"class_name": HETEROSCEDASTIC, "std_type": "log"}},
    },
    "recurrent_heteroscedastic": {
        "actor": {**LSTM, "distribution_cfg": {"class_name": HETEROSCEDASTIC, "std_type": "log"}},
        "critic": GRU,
    },
    "advantages_per_mini_batch_recurrent": {
        "args": {"normalize_advantage_per_mini_batch": True},
        "actor": LSTM,
        "critic": GRU,
    },
    "clamped_std": {"actor": {"distribution_cfg": {"std_range": (0.97, 1.03)}}},
    "no_desired_kl": {"args": {"desired_kl": None}},
    "one_batch": {"args": {"num_mini_batches": 1, "num_learning_epochs": 1}},
    "uneven_mini_batches": {"args": {"num_mini_batches": 5}},
    "one_action": {"env_args": {"num_actions": 1}},
    "many_actions": {"env_args": {"num_actions": 13}},
    "one_environment": {"env_args": {"num_envs": 1}},
}


class QuietKL(HeteroscedasticGaussianDistribution):
    """For PPO: leaves out what is rounding noise of its KL.

    For a std that a network computes, rsl_rl's formula makes the KL of the first mini-batch noise of either sign; where
    it is positive, PPO raises the learning rate. FusedPPO does not (see ``adapt_before_first_step``).
    """

    def kl_divergence(self, old_params: tuple[Tensor, ...], new_params: tuple[Tensor, ...]) -> Tensor:
        kl = super().kl_divergence(old_params, new_params)
        return torch.where(kl.abs() < 1e-6, 0.0, kl)


def stock_config(feature: str, **args: object) -> dict:
    """The feature's config for PPO, with further arguments."""
    config = copy.deepcopy({**FEATURES, **CORNERS}[feature])
    distribution = config.get("actor", {}).get("distribution_cfg", {})
    if distribution.get("class_name") is HETEROSCEDASTIC:
        distribution["class_name"] = QuietKL
    return {**config, "args": {**args, **config.get("args", {})}}


def fused_config(feature: str, **args: object) -> dict:
    """The feature's config for FusedPPO, so that it does what PPO does, number by number.

    Until 5.4, rsl_rl moves the observation normalizers during the rollout: the first mini-batch then has a true KL, and
    PPO lets the learning rate act on it.
    """
    config = {**FEATURES, **CORNERS}[feature]
    moved = feature == "normalized_observations" and not NORMALIZES_IN_UPDATE
    args = {**args, "keep_random_stream": True, "adapt_before_first_step": moved}
    return {**config, "args": {**args, **config.get("args", {})}}


def test_rsl_rl_is_the_version_that_its_metadata_says() -> None:
    """FusedPPO goes by the metadata; a second rsl_rl on the path would be taken for another version."""
    print("rsl-rl-lib", version("rsl-rl-lib"), inspect.getfile(PPO))
    since_5_5 = release(version("rsl-rl-lib")) >= (5, 5)
    assert since_5_5 == HAS_MIXED_PRECISION == NORMALIZES_IN_UPDATE == fused_ppo.NORMALIZES_IN_UPDATE


@pytest.mark.parametrize(
    ("feature", "schedule"),
    [(feature, schedule) for feature in FEATURES for schedule in ("fixed", "adaptive")]
    + [(feature, "adaptive") for feature in CORNERS],
)
def test_float32_stays_within_the_divergence_of_one_ulp(feature: str, schedule: str, train: Callable) -> None:
    stock = train("PPO", 20, **stock_config(feature, schedule=schedule))
    nudged = train("PPO", 20, nudge=0, **stock_config(feature, schedule=schedule))
    fused = train(FUSED, 20, **fused_config(feature, schedule=schedule))

    assert stock.env.num_time_outs > 0
    assert stock.env.num_terminations > 0
    assert nudged.rates == stock.rates, "the yardstick is void: one ulp changes the learning rate with this seed"
    assert fused.rates == stock.rates
    assert torch.equal(fused.random_state, stock.random_state)
    divergence, yardstick = fused.distance(stock), nudged.distance(stock)
    print(f"divergence {divergence:.1e}, of one ulp {yardstick:.1e}")
    assert yardstick < 1e-3
    assert divergence <= MARGIN * max(yardstick, LEAST_DIVERGENCE)


@pytest.mark.parametrize("feature", [*FEATURES, *CORNERS])
def test_float64_shows_no_other_formula(feature: str, float64: None, train: Callable) -> None:
    stock = train("PPO", 10, **stock_config(feature, schedule="adaptive", **EXACT_IN_FLOAT32))
    fused = train(FUSED, 10, **fused_config(feature, schedule="adaptive", **EXACT_IN_FLOAT32))

    assert all(t.dtype == torch.float64 for t in fused.alg.actor.parameters())
    assert fused.rates == stock.rates
    assert torch.equal(fused.random_state, stock.random_state)
    divergence = fused.distance(stock)
    print(f"divergence {divergence:.1e}")
    assert divergence < FLOAT64_TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "feature",
    [
        *("plain", "rnd", "symmetry_both", "lstm", "cnn", "heteroscedastic_log", "advantages_per_mini_batch"),
        *("normalized_observations", "unclipped_value_loss", "adamw", "sgd", "rmsprop", "tight_gradient_norm"),
    ],
)
def test_on_a_gpu(feature: str, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA graphs; those give the same bits (test_captured.py)."""
    # else cuDNN's products have 10 bits, and backward passes add in another order each time
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    stock = train("PPO", 20, device="cuda", **stock_config(feature, schedule="adaptive"))
    nudged = train("PPO", 20, nudge=0, device="cuda", **stock_config(feature, schedule="adaptive"))
    fused = train(FUSED, 20, device="cuda", **fused_config(feature, schedule="adaptive"))
    assert nudged.rates == stock.rates, "the yardstick is void: one ulp changes the learning rate with this seed"
    assert fused.rates == stock.rates
    divergence, yardstick = fused.distance(stock), nudged.distance(stock)
    print(f"divergence {divergence:.1e}, of one ulp {yardstick:.1e}")
    assert divergence <= MARGIN * max(yardstick, LEAST_DIVERGENCE)


@pytest.mark.parametrize("feature", ["plain", "rnd_and_symmetry", "lstm", "shared_cnn", "beta"])
def test_the_losses_of_ppo_are_in_loss_dict_with_its_values(feature: str, float64: None, train: Callable) -> None:
    stock = train("PPO", 3, **stock_config(feature, schedule="adaptive", **EXACT_IN_FLOAT32))
    fused = train(FUSED, 3, **fused_config(feature, schedule="adaptive", **EXACT_IN_FLOAT32))
    for ours, theirs in zip(fused.losses, stock.losses, strict=True):
        assert ours.keys() >= theirs.keys()
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_beta_runs_the_update_of_ppo_bit_for_bit(train: Callable) -> None:
    """The returns are FusedPPO's own; with PPO's no bit is left that could differ."""

    class StockReturns(fused_ppo.FusedPPO):
        compute_returns = PPO.compute_returns

    stock = train("PPO", 20, **stock_config("beta"))
    fused = train(StockReturns, 20, **stock_config("beta"))
    assert fused.distance(stock) == 0.0
    assert fused.losses == stock.losses
    assert fused.rates == stock.rates


def test_two_threads(train: Callable) -> None:
    """Larger batches, so that the work is split."""
    torch.set_num_threads(2)
    config = {"args": {"schedule": "adaptive"}, "env_args": {"num_envs": 512}}
    stock = train("PPO", 2, **config)
    nudged = train("PPO", 2, nudge=0, **config)
    fused = train(FUSED, 2, **{**config, "args": {"schedule": "adaptive", "keep_random_stream": True}})
    assert torch.get_num_threads() == 2
    assert fused.rates == stock.rates
    assert fused.distance(stock) <= MARGIN * max(nudged.distance(stock), LEAST_DIVERGENCE)


def test_normalizers_that_move_during_the_rollout_show_in_first_kl(train: Callable) -> None:
    """Until 5.4 acting and updating see different observations; since 5.5 they do not."""
    fused = train(FUSED, 3, **fused_config("normalized_observations"))
    first_kl = max(losses["first_kl"] for losses in fused.losses)
    if NORMALIZES_IN_UPDATE:
        assert first_kl < 1e-10
    else:
        assert first_kl > 1e-6
