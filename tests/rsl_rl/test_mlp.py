"""The hidden layers of rsl_rl's MLPs, fused: the numbers of torch's own, and when they are left alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn as nn
from rsl_rl.models import MLPModel
from rsl_rl.modules import MLP
from tensordict import TensorDict
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from pyfast_ppo import backends
from pyfast_ppo.rsl_rl import mlp as mlp_file
from pyfast_ppo.rsl_rl.mlp import fused_hidden_layers, observations_in_place

sys.path.append(str(Path(__file__).parents[1] / "ops" / "oracles"))

from backends_here import AVAILABLE

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
WITH_AUTOGRAD = {"symmetry_cfg": {}}  # which plain_networks.py leaves to it
FUSING = [row.name for row in AVAILABLE if backends._module(row.name).FUSES_UPDATE]


@pytest.fixture(params=FUSING)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(backend: str, device: str) -> ModuleType:
    return backends.select(backend, torch.device(device))


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, and the widths of the fused layers that they went through."""
    seen, fused = [], mlp_file.hidden_layers

    def counted(backend: ModuleType, activation: str, x: Tensor, *parameters: Tensor) -> Tensor:
        seen.append((len(x), *(bias.numel() for bias in parameters[1::2])))
        return fused(backend, activation, x, *parameters)

    monkeypatch.setattr(mlp_file, "hidden_layers", counted)
    return seen


def model_of(mlp: MLP, device: str = "cpu") -> nn.Module:
    model = nn.Module()
    model.mlp = mlp
    return model.to(device)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_an_mlp_and_its_gradients(kernels: ModuleType, device: str, fused_calls: list) -> None:
    """As autograd has them in float64; the input's, too."""
    torch.manual_seed(0)
    model = model_of(MLP(6, 3, [32, 16, 8]), device)
    exact_model = model_of(MLP(6, 3, [32, 16, 8]).double(), device)
    exact_model.mlp.load_state_dict(model.mlp.state_dict())
    x = torch.randn(50, 6, device=device, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    with fused_hidden_layers(kernels, model, exact_model):
        model.mlp(x).square().sum().backward()
        exact_model.mlp(exact_x).square().sum().backward()
    assert fused_calls == [(50, 32, 16, 8)]
    pairs = zip([x, *model.mlp.parameters()], [exact_x, *exact_model.mlp.parameters()], strict=True)
    for ours, exact in pairs:
        assert (ours.grad - exact.grad).abs().max() < 2e-6 * exact.grad.abs().max()


def test_other_layers_in_between(kernels: ModuleType, device: str, fused_calls: list) -> None:
    """Two runs of fused layers with one of another kind between them; the gradient that comes in stays as it was."""
    torch.manual_seed(0)
    mlp = MLP(6, 3, [32, 16, 8, 8])
    mlp[3] = nn.SELU()
    model, x = model_of(mlp, device), torch.randn(50, 6, device=device)
    with fused_hidden_layers(kernels, model):
        out = mlp(x)
    assert fused_calls == [(50, 32), (50, 8, 8)]
    grad = torch.randn(50, 3, device=device)
    before = grad.clone()
    ours = torch.autograd.grad(out, list(mlp.parameters()), grad)
    assert torch.equal(grad, before)
    for fused, plain in zip(ours, torch.autograd.grad(mlp(x), list(mlp.parameters()), grad), strict=True):
        torch.testing.assert_close(fused, plain)


def test_one_activation_after_another(kernels: ModuleType, device: str, fused_calls: list) -> None:
    torch.manual_seed(0)
    mlp = MLP(6, 3, [32, 16, 8, 8], activation="tanh")
    mlp[3], mlp[7] = nn.ReLU(), nn.ELU()
    model, x = model_of(mlp, device), torch.randn(50, 6, device=device)
    with fused_hidden_layers(kernels, model):
        out = mlp(x)
    assert fused_calls == [(50, 32), (50, 16), (50, 8), (50, 8)]
    torch.testing.assert_close(out, mlp(x))


def test_a_hidden_layers_gradient_is_left_alone(kernels: ModuleType, device: str) -> None:
    """The output of the fused layers is used twice: autograd's own tensor comes in."""
    model = model_of(MLP(4, 8, [8], last_activation="elu"), device)
    x = torch.randn(5, 4, device=device)
    with fused_hidden_layers(kernels, model):
        out = model.mlp(x)
    grad = torch.randn(5, 8, device=device)
    before = grad.clone()
    out.backward(grad)
    assert torch.equal(grad, before)


def test_frozen_weights_and_gradients_that_are_not_contiguous(kernels: ModuleType, device: str) -> None:
    model = model_of(MLP(4, 2, [8]), device)
    for parameter in model.mlp.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 4, device=device, requires_grad=True)
    with fused_hidden_layers(kernels, model):
        model.mlp(x).t().sum().backward()
    ours, x.grad = x.grad, None
    model.mlp(x).t().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_a_second_derivative_is_refused(kernels: ModuleType, device: str) -> None:
    model, x = model_of(MLP(4, 2, [8]), device), torch.randn(5, 4, device=device, requires_grad=True)
    with fused_hidden_layers(kernels, model):
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
    "selu": MLP(4, 2, [8], activation="selu"),
    "leaky relu": MLP(4, 2, [8], activation="lrelu"),
    "alpha": nn.Sequential(nn.Linear(4, 8), nn.ELU(0.5)),
    "no bias": nn.Sequential(nn.Linear(4, 8, bias=False), nn.ELU()),
    "float64": nn.Sequential(nn.Linear(4, 8).double(), nn.ELU()),
    "another device": nn.Sequential(nn.Linear(4, 8, device="meta"), nn.ELU()),
    "own layer": nn.Sequential(OwnLinear(4, 8), nn.ELU()),
    "hook of the layer": nn.Sequential(with_hook(nn.Linear(4, 8)), nn.ELU()),
    "hook of the activation": nn.Sequential(nn.Linear(4, 8), with_hook(nn.ELU())),
}


@pytest.mark.parametrize("mlp", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_layers_are_left_alone(mlp: nn.Module, kernels: ModuleType, device: str) -> None:
    on_device = mlp if next(mlp.parameters()).is_meta else copy.deepcopy(mlp).to(device)
    assert not any(mlp_file._is_fusible(kernels, *pair) for pair in pairwise(on_device))


def test_a_bias_that_is_every_other_number_of_another_tensor(kernels: ModuleType, device: str) -> None:
    """Kernels read neighbours."""
    model, x = model_of(MLP(4, 2, [8]), device), torch.randn(5, 4, device=device)
    model.mlp[0].bias = nn.Parameter(torch.randn(16, device=device)[::2])
    with fused_hidden_layers(kernels, model):
        out = model.mlp(x)
    assert torch.equal(out, model.mlp(x))


def test_only_within_the_context(kernels: ModuleType, device: str, fused_calls: list) -> None:
    model = model_of(MLP(4, 2, [8]), device)
    x = torch.randn(5, 4, device=device)
    with pytest.raises(KeyError), fused_hidden_layers(kernels, model):
        model.mlp(x)
        raise KeyError
    assert len(fused_calls) == 1
    model.mlp(x)
    assert len(fused_calls) == 1
    assert "forward" not in vars(model.mlp)


def test_hooks_on_all_modules_see_every_layer(new_run: Callable, fused_calls: list) -> None:
    """As profilers set them."""
    run = new_run(FUSED).rollout()
    seen = []
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        run.alg.update()
    finally:
        hook.remove()
    assert fused_calls == []
    assert seen.count(nn.ELU) == 2 * 4  # actor and critic, in four steps
    assert seen.count(nn.Linear) == 2 * 2 * 4


def test_a_backend_that_has_nothing_for_it(fused_calls: list) -> None:
    model, x = model_of(MLP(4, 2, [8])), torch.randn(5, 4)
    with fused_hidden_layers(backends.select("eager", x.device), model):
        assert "forward" not in vars(model.mlp)
        assert model.mlp(x).shape == (5, 2)
    assert fused_calls == []


def test_an_mlp_that_runs_in_its_own_way(
    kernels: ModuleType, fused_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MLP(4, 2, [8]))
    own = torch.ones(5, 2)
    monkeypatch.setattr(model.mlp, "forward", lambda x: own)
    with fused_hidden_layers(kernels, model):
        assert model.mlp(torch.randn(5, 4)) is own
    assert model.mlp(torch.randn(5, 4)) is own


def test_other_inputs_take_the_layers_own_way(
    kernels: ModuleType, device: str, fused_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences, mixed precision, nothing at all; but not because of another device's mixed precision."""
    model = model_of(MLP(4, 2, [8]), device)
    with fused_hidden_layers(kernels, model):
        assert model.mlp(torch.randn(3, 5, 4, device=device)).shape == (3, 5, 2)
        assert model.mlp(torch.randn(0, 4, device=device)).shape == (0, 2)
        with torch.autocast(device, torch.bfloat16):
            assert model.mlp(torch.randn(3, 4, device=device)).dtype == torch.bfloat16
        assert fused_calls == []
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type != device)
        model.mlp(torch.randn(3, 4, device=device))
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


def test_the_update_takes_them(backend: str, device: str, new_run: Callable, fused_calls: list) -> None:
    """But not the rollout, whose actions are those of PPO to the bit. The update is that with torch's own layers."""
    plain = new_run(FUSED, device=device, args={"backend": "eager", **WITH_AUTOGRAD}).rollout()
    plain.alg.update()
    run = new_run(FUSED, device=device, args={"backend": backend, **WITH_AUTOGRAD}).rollout()
    assert fused_calls == []
    run.alg.update()
    assert fused_calls
    assert run.distance(plain) < 1e-5


def test_the_update_takes_them_by_itself(new_run: Callable, fused_calls: list) -> None:
    new_run(FUSED, args=WITH_AUTOGRAD).rollout().alg.update()
    assert bool(fused_calls) == backends.select(None, torch.device("cpu")).FUSES_UPDATE
