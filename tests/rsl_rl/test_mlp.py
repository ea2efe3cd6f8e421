"""The hidden layers of rsl_rl's MLPs, fused on the CPU: the numbers of torch's own, and when they are left alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rsl_rl.models import MLPModel
from rsl_rl.modules import MLP
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.backends import cpu
from pyfast_ppo.rsl_rl import mlp as mlp_file
from pyfast_ppo.rsl_rl.mlp import fused_hidden_layers, observations_in_place

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the C++ kernels are not here")

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, and the widths of the fused layers that they went through."""
    seen, fused = [], mlp_file.hidden_layers

    def counted(x: Tensor, *parameters: Tensor) -> Tensor:
        seen.append((len(x), *(bias.numel() for bias in parameters[1::2])))
        return fused(x, *parameters)

    monkeypatch.setattr(mlp_file, "hidden_layers", counted)
    return seen


def model_of(*layers: nn.Module | MLP) -> nn.Module:
    model = nn.Module()
    model.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    return model


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (129, 16), (1000, 19), (257, 128), (2, 20000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_forward_and_backward_against_float64(shape: tuple[int, int], threads: int) -> None:
    """Within 4e-7 of each value, and of each column's sum of magnitudes."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) * 4.0 for _ in range(2))
    bias = torch.zeros(shape[1]) if shape[0] > 500 else torch.randn(shape[1], generator=generator)
    exact = F.elu((x + bias).double())
    y = cpu.add_bias_and_elu(x.clone(), bias)
    assert ((y - exact).abs() <= 4e-7 * exact.abs()).all()
    grad_x, grad_bias = cpu.add_bias_and_elu_backward(grad, y)
    exact_grad = grad.double() * torch.where(y > 0.0, 1.0, y.double() + 1.0)
    assert ((grad_x - exact_grad).abs() <= 1e-7 * grad.abs()).all()
    assert ((grad_bias - exact_grad.sum(0)).abs() <= 4e-7 * exact_grad.abs().sum(0)).all()
    in_place, same_bias = cpu.add_bias_and_elu_backward(grad, y, in_place=True)
    assert in_place is grad
    assert torch.equal(in_place, grad_x)
    assert torch.equal(same_bias, grad_bias)


def test_the_smallest_and_the_largest() -> None:
    x = torch.tensor([[-torch.inf, -1e30, -100.0, -20.0, -1e-20, -0.0, 0.0, 1e-20, 1e30, torch.inf, torch.nan]])
    y = cpu.add_bias_and_elu(x.clone(), torch.zeros(x.shape[1]))
    assert torch.equal(y[:, :-1], F.elu(x)[:, :-1])
    assert y[0, -1].isnan()
    grad_x, _ = cpu.add_bias_and_elu_backward(torch.ones_like(y), y)
    assert torch.equal(grad_x[0, 3:10], torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    assert grad_x[0, -1].isnan()


def test_near_zero_nothing_cancels() -> None:
    x = -torch.logspace(-10, 1.2, 4000).unsqueeze(0)
    y = cpu.add_bias_and_elu(x.clone(), torch.zeros(x.shape[1]))
    exact = torch.expm1(x.double())
    assert ((y - exact) / exact).abs().max() < 4e-7


def test_the_same_bits_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5000, 37, generator=generator) for _ in range(2))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = cpu.add_bias_and_elu(x.clone(), torch.ones(37))
        results.append((y, *cpu.add_bias_and_elu_backward(grad, y)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_mlp_and_its_gradients(fused_calls: list) -> None:
    """As autograd has them in float64; the input's, too."""
    torch.manual_seed(0)
    model = model_of(MLP(6, 3, [32, 16, 8]))
    exact_model = model_of(MLP(6, 3, [32, 16, 8]).double())
    exact_model.mlp.load_state_dict(model.mlp.state_dict())
    x = torch.randn(50, 6, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    with fused_hidden_layers(model, exact_model):
        model.mlp(x).square().sum().backward()
        exact_model.mlp(exact_x).square().sum().backward()
    assert fused_calls == [(50, 32, 16, 8)]
    pairs = zip([x, *model.mlp.parameters()], [exact_x, *exact_model.mlp.parameters()], strict=True)
    for ours, exact in pairs:
        assert (ours.grad - exact.grad).abs().max() < 2e-6 * exact.grad.abs().max()


def test_other_layers_in_between(fused_calls: list) -> None:
    """Two runs of fused layers with one of another kind between them; the gradient that comes in stays as it was."""
    torch.manual_seed(0)
    mlp = MLP(6, 3, [32, 16, 8, 8])
    mlp[3] = nn.Tanh()
    model, x = model_of(mlp), torch.randn(50, 6)
    with fused_hidden_layers(model):
        out = mlp(x)
    assert fused_calls == [(50, 32), (50, 8, 8)]
    grad = torch.randn(50, 3)
    before = grad.clone()
    ours = torch.autograd.grad(out, list(mlp.parameters()), grad)
    assert torch.equal(grad, before)
    for fused, plain in zip(ours, torch.autograd.grad(mlp(x), list(mlp.parameters()), grad), strict=True):
        torch.testing.assert_close(fused, plain)


def test_a_hidden_layers_gradient_is_left_alone() -> None:
    """The output of the fused layers is used twice: autograd's own tensor comes in."""
    model = model_of(MLP(4, 8, [8], last_activation="elu"))
    x = torch.randn(5, 4)
    with fused_hidden_layers(model):
        out = model.mlp(x)
    grad = torch.randn(5, 8)
    before = grad.clone()
    out.backward(grad)
    assert torch.equal(grad, before)


def test_frozen_weights_and_gradients_that_are_not_contiguous() -> None:
    model = model_of(MLP(4, 2, [8]))
    for parameter in model.mlp.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 4, requires_grad=True)
    with fused_hidden_layers(model):
        model.mlp(x).t().sum().backward()
    ours, x.grad = x.grad, None
    model.mlp(x).t().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_a_second_derivative_is_refused() -> None:
    model, x = model_of(MLP(4, 2, [8])), torch.randn(5, 4, requires_grad=True)
    with fused_hidden_layers(model):
        (grad,) = torch.autograd.grad(model.mlp(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


# --- when they are left alone -----------------------------------------------------------------------------------------


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


LEFT_ALONE = {
    "tanh": MLP(4, 2, [8], activation="tanh"),
    "relu": MLP(4, 2, [8], activation="relu"),
    "alpha": nn.Sequential(nn.Linear(4, 8), nn.ELU(0.5)),
    "no bias": nn.Sequential(nn.Linear(4, 8, bias=False), nn.ELU()),
    "float64": nn.Sequential(nn.Linear(4, 8).double(), nn.ELU()),
    "own layer": nn.Sequential(OwnLinear(4, 8), nn.ELU()),
    "hook of the layer": nn.Sequential(with_hook(nn.Linear(4, 8)), nn.ELU()),
    "hook of the activation": nn.Sequential(nn.Linear(4, 8), with_hook(nn.ELU())),
}


@pytest.mark.parametrize("mlp", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_layers_are_left_alone(mlp: nn.Module) -> None:
    assert not any(mlp_file._is_fusible(*pair) for pair in pairwise(mlp))


def test_only_within_the_context(fused_calls: list) -> None:
    model = model_of(MLP(4, 2, [8]))
    x = torch.randn(5, 4)
    with pytest.raises(KeyError), fused_hidden_layers(model):
        model.mlp(x)
        raise KeyError
    assert len(fused_calls) == 1
    model.mlp(x)
    assert len(fused_calls) == 1
    assert "forward" not in vars(model.mlp)


def test_an_mlp_that_runs_in_its_own_way(fused_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(MLP(4, 2, [8]))
    own = torch.ones(5, 2)
    monkeypatch.setattr(model.mlp, "forward", lambda x: own)
    with fused_hidden_layers(model):
        assert model.mlp(torch.randn(5, 4)) is own
    assert model.mlp(torch.randn(5, 4)) is own


def test_other_inputs_take_the_layers_own_way(fused_calls: list) -> None:
    """Sequences, mixed precision, nothing at all."""
    model = model_of(MLP(4, 2, [8]))
    with fused_hidden_layers(model):
        assert model.mlp(torch.randn(3, 5, 4)).shape == (3, 5, 2)
        assert model.mlp(torch.randn(0, 4)).shape == (0, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.mlp(torch.randn(3, 4)).dtype == torch.bfloat16
        assert fused_calls == []
        model.mlp(torch.randn(3, 4))
    assert fused_calls == [(3, 8)]


# --- observations -----------------------------------------------------------------------------------------------------


def mlp_model(groups: list[str], model_class: type = MLPModel, **arguments: object) -> tuple[MLPModel, TensorDict]:
    obs = TensorDict({"a": torch.randn(5, 3), "b": torch.randn(5, 2)}, batch_size=5)
    return model_class(obs, {"actor": groups}, "actor", 1, hidden_dims=[4], **arguments), obs


def test_a_single_group_is_taken_as_it_is() -> None:
    model, obs = mlp_model(["a"])
    before = model(obs)
    with observations_in_place(model):
        assert model.get_latent(obs) is obs["a"]
        assert torch.equal(model(obs), before)
    assert model.get_latent(obs) is not obs["a"]


def test_it_is_normalized_as_before() -> None:
    model, obs = mlp_model(["a"], obs_normalization=True)
    model.update_normalization(obs)
    before = model(obs)
    with observations_in_place(model):
        assert torch.equal(model(obs), before)
    assert not torch.equal(model.get_latent(obs), obs["a"])


class OwnLatent(MLPModel):
    def get_latent(self, obs: TensorDict, *args: object) -> Tensor:
        return 2.0 * super().get_latent(obs)


def test_several_groups_and_other_latents_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, obs in (mlp_model(["a", "b"]), mlp_model(["a"], OwnLatent), mlp_model(["a"])):
        if type(model) is MLPModel and model.obs_groups == ["a"]:
            monkeypatch.setattr(model, "get_latent", lambda obs: 3.0 * obs["a"])
        before = model.get_latent(obs)
        with observations_in_place(model):
            assert torch.equal(model.get_latent(obs), before)
        assert torch.equal(model.get_latent(obs), before)


# --- in the update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "fused"), [(None, True), ("cpu", True), ("eager", False)])
def test_the_update_takes_them_with_the_cpus_kernels(
    backend: str | None, fused: bool, new_run: Callable, fused_calls: list
) -> None:
    """But not the rollout, whose actions are those of PPO to the bit."""
    run = new_run(FUSED, args={"backend": backend}).rollout()
    assert fused_calls == []
    run.alg.update()
    assert bool(fused_calls) == fused
