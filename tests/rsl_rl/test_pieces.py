"""On the CPU a large mini-batch goes through the networks in pieces: the step is that of the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from rsl_rl.models import MLPModel

from pyfast_ppo.rsl_rl import fused_ppo

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}

BYTES_A_ROW = 4 * 16  # of the widest layer

CASES = {
    "adaptive": {"args": {"schedule": "adaptive"}},
    "heteroscedastic": {"args": {"schedule": "adaptive"}, "actor": HETEROSCEDASTIC},
    "new_old": {"args": {"schedule": "adaptive", "kl_coef": 0.3, "kl_direction": "new_old"}},
    "rsl_rl_4": {"args": {"schedule": "adaptive", "kl_rule": "rsl_rl_4"}},
    "early_stop": {"args": {"schedule": "adaptive", "early_stop_kl": 1e-3}},
    "penalty": {"args": {"schedule": "fixed", "kl_coef": 0.5, "kl_target": 1e-3}},
}


@pytest.fixture
def forward_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small pieces; how many rows each had."""
    monkeypatch.setattr(fused_ppo, "_PIECE_BYTES", 40 * BYTES_A_ROW)
    rows = []
    loss = fused_ppo.ppo_loss_and_grad

    def recorded(mean: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        rows.append(mean.shape[0])
        return loss(mean, *args, **kwargs)

    monkeypatch.setattr(fused_ppo, "ppo_loss_and_grad", recorded)
    return rows


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pieces_make_the_step_of_the_whole(
    case: dict, float64: None, new_run: Callable, forward_rows: list[int]
) -> None:
    """96 rows in pieces of 40, 40 and 16: gradients, rates and metrics agree to the last digits."""
    pieces = new_run(FUSED, **case).learn(4)
    assert set(forward_rows) == {40, 16}
    forward_rows.clear()
    fused_ppo._PIECE_BYTES = 1000 * BYTES_A_ROW
    whole = new_run(FUSED, **case).learn(4)
    assert set(forward_rows) == {96}
    assert pieces.distance(whole) < 1e-12
    for ours, theirs in zip(pieces.losses, whole.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    assert [float(rate) for rate in pieces.rates] == [float(rate) for rate in whole.rates]


@pytest.mark.parametrize(
    "config",
    [{"critic": LSTM}, {"args": {"rnd_cfg": RND}}, {"args": {"symmetry_cfg": {"use_data_augmentation": True}}}],
    ids=["recurrent", "rnd", "symmetry"],
)
def test_what_stays_whole(config: dict, new_run: Callable, forward_rows: list[int]) -> None:
    new_run(FUSED, **config).learn(1)
    assert 40 not in forward_rows
    assert forward_rows


class Centred(MLPModel):
    def get_latent(self, *args: object, **kwargs: object) -> torch.Tensor:
        latent = super().get_latent(*args, **kwargs)
        return latent - latent.mean(0) if torch.is_grad_enabled() else latent


class OwnNormalization(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.std(0) + 1e-5) if torch.is_grad_enabled() else x


class WithOwnNormalization(MLPModel):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.mlp.insert(1, OwnNormalization())


class WithSpectralNorm(MLPModel):
    """It makes a step towards the largest singular value in each call."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        nn.utils.parametrizations.spectral_norm(self.mlp[0])


class Counting(MLPModel):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("model", [Centred, WithOwnNormalization, WithSpectralNorm, Counting])
def test_models_that_look_at_the_batch_or_count_their_calls(
    model: type, float64: None, new_run: Callable, forward_rows: list[int]
) -> None:
    runs = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, args={"schedule": "fixed"}, actor={"class_name": model})
        torch.manual_seed(0)
        run.rollout()
        torch.manual_seed(1)  # PPO draws actions in its update
        run.alg.update()
        runs.append(run)
    assert set(forward_rows) == {96}
    assert runs[1].distance(runs[0]) < 1e-7  # PPO rounds gamma to float32


def test_a_latent_of_one_model_alone(new_run: Callable, forward_rows: list[int]) -> None:
    run = new_run(FUSED)
    critic, latent = run.alg.critic, run.alg.critic.get_latent
    critic.get_latent = lambda *args, **kwargs: latent(*args, **kwargs) - latent(*args, **kwargs).mean(0)
    run.learn(1)
    assert set(forward_rows) == {96}


def test_a_nan_in_one_piece_loses_the_step(new_run: Callable, forward_rows: list[int]) -> None:
    args = {"normalize_advantage_per_mini_batch": True, "num_learning_epochs": 1}
    run = new_run(FUSED, args=args).rollout()
    run.alg.storage.returns[2, 5] = torch.nan
    assert run.alg.update()["nonfinite_steps"] == 1
    assert all(torch.isfinite(p).all() for p in run.alg.actor.parameters())


def test_a_mini_batch_below_two_pieces_stays_whole(new_run: Callable, forward_rows: list[int]) -> None:
    fused_ppo._PIECE_BYTES = 49 * BYTES_A_ROW
    new_run(FUSED).learn(1)
    assert set(forward_rows) == {96}
