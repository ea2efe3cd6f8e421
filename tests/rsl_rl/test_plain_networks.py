"""Actor and critic without autograd: the same gradients to the bit, and when it is left to autograd."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn as nn
from rsl_rl.models import MLPModel
from rsl_rl.modules import MLP
from rsl_rl.modules.distribution import GaussianDistribution
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization

from pyfast_ppo import backends
from pyfast_ppo.rsl_rl import fused_ppo
from pyfast_ppo.rsl_rl.plain_networks import PlainNetworks, _Std

sys.path.append(str(Path(__file__).parents[1] / "ops" / "oracles"))

from backends_here import AVAILABLE

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
FUSING = [row.name for row in AVAILABLE if backends._module(row.name).FUSES_UPDATE]
RND = {"num_outputs": 4, "predictor_hidden_dims": [8], "target_hidden_dims": [8], "weight": 0.5}
LSTM = {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8}
LOW, HIGH = 1e-3, 0.7  # neither is a number of float32


@pytest.fixture(params=FUSING)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(backend: str, device: str) -> ModuleType:
    return backends.select(backend, torch.device(device))


def gaussian(**options: object) -> dict:
    return {"distribution_cfg": {"class_name": "GaussianDistribution", **options}}


# --- the numbers ------------------------------------------------------------------------------------------------------


def freeze(*names: str) -> Callable:
    def change(alg: object) -> None:
        for model in (alg.actor, alg.critic):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in names)

    return change


CASES: dict[str, tuple[dict, Callable]] = {
    "plain": ({}, lambda alg: None),
    "three layers, one group": (
        {"actor": {"hidden_dims": [16, 8, 4]}, "obs_groups": {"critic": ["policy"]}},
        lambda alg: None,
    ),
    "std of the logarithm": ({"actor": gaussian(std_type="log", init_std=0.7)}, lambda alg: None),
    "std at its bound": ({"actor": gaussian(std_range=(0.2, 1.0))}, lambda alg: None),
    "fixed std": ({"actor": gaussian(learn_std=False)}, lambda alg: None),
    "normalized": ({"actor": {"obs_normalization": True}, "critic": {"obs_normalization": True}}, lambda alg: None),
    "frozen first layer": ({}, freeze("mlp.0.weight", "mlp.0.bias")),
    "frozen weights": ({}, freeze("mlp.0.weight", "mlp.2.weight")),
    "frozen biases": ({}, freeze("mlp.0.bias", "mlp.2.bias")),
    "penalty": ({"args": {"kl_coef": 0.3}}, lambda alg: None),
    "tanh and relu": ({"actor": {"activation": "tanh"}, "critic": {"activation": "relu"}}, lambda alg: None),
}


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_autograd(
    name: str, pieces: bool, backend: str, device: str, new_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, losses, rates, and what the distribution tells afterwards."""
    config, change = CASES[name]
    if pieces:  # whose gradients add up
        monkeypatch.setattr(fused_ppo, "_PIECE_BYTES", 40 * 4 * 16)
    taken, runs, of = [], [], PlainNetworks.for_update
    for allowed in (True, False):

        def found(*args: object, allowed: bool = allowed) -> PlainNetworks | None:
            taken.append(of(*args))
            return taken[-1] if allowed else None

        args = {"backend": backend, "schedule": "adaptive", **config.get("args", {})}
        run = new_run(FUSED, device=device, **{**config, "args": args})
        change(run.alg)
        with monkeypatch.context() as patch:
            patch.setattr(PlainNetworks, "for_update", found)
            runs.append(run.learn(3))
    assert len(taken) == 6
    assert None not in taken
    plain, with_autograd = runs
    assert plain.distance(with_autograd) == 0.0
    assert plain.losses == with_autograd.losses
    assert plain.rates == with_autograd.rates
    for ours, theirs in zip(*(run.alg.actor.output_distribution_params for run in runs), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def around(bound: float) -> list[Tensor]:
    """The bound in float32, and the numbers beside."""
    at = torch.tensor(bound)
    return [at, *(torch.nextafter(at, torch.tensor(to)) for to in (0.0, 1.0))]


@pytest.mark.parametrize("std_type", ["scalar", "log"])
def test_the_range_of_the_std(std_type: str) -> None:
    """Gradients at its bounds, beside and beyond them."""
    stds = torch.stack([*around(LOW), *around(HIGH), *torch.tensor([-1.0, 0.0, 0.3, 5.0, torch.inf])])
    distribution = GaussianDistribution(len(stds), std_range=(LOW, HIGH), std_type=std_type)
    (parameter,) = distribution.parameters()
    parameter.data.copy_(stds if std_type == "scalar" else stds.clamp_min(1e-9).log())
    grad = torch.arange(1.0, len(stds) + 1)
    distribution.update(torch.zeros(1, len(stds)))
    (exact,) = torch.autograd.grad(distribution.std, parameter, grad.unsqueeze(0))
    assert 0 < exact.count_nonzero() < len(stds)
    ours = _Std(distribution)
    with torch.no_grad():
        assert torch.equal(ours.forward(), distribution.std[0])
        ours.backward(grad)
    assert torch.equal(parameter.grad, exact)


def test_a_range_that_is_changed_later(new_run: Callable) -> None:
    runs = []
    for algorithm, args in (("PPO", {}), (FUSED, {"keep_random_stream": True})):
        run = new_run(algorithm, args={"schedule": "fixed", **args}).learn(2)
        run.alg.actor.distribution.std_range[1] = 0.9
        runs.append(run.learn(2))
    assert runs[0].distance(runs[1]) < 1e-4
    assert (runs[1].rollout().alg.storage.distribution_params[1] == torch.tensor(0.9)).all()


# --- when it is left to autograd --------------------------------------------------------------------------------------


class OwnUpdate(GaussianDistribution):
    def update(self, mlp_output: Tensor) -> None:
        super().update(2.0 * mlp_output)


def transpose(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


def tie(layer: nn.Linear, other: nn.Linear) -> None:
    """Its weight becomes a tensor that is computed from the other's."""
    del layer.weight
    layer.weight = other.weight[:1, : layer.in_features]


class OwnCall(MLPModel):
    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return 2.0 * super().__call__(*args, **kwargs)


CHANGES: dict[str, Callable] = {
    "hook of the model": lambda alg: alg.actor.register_forward_hook(lambda *_: None),
    "hook of the MLP": lambda alg: alg.critic.mlp.register_full_backward_hook(lambda *_: None),
    "hook of a layer": lambda alg: alg.actor.mlp[2].register_forward_pre_hook(lambda *_: None),
    "hook of the normalizer": lambda alg: alg.critic.obs_normalizer.register_forward_hook(lambda *_: None),
    "hook of a parameter": lambda alg: alg.actor.mlp[0].weight.register_hook(lambda grad: grad),
    "hook after a gradient": lambda alg: alg.critic.mlp[2].bias.register_post_accumulate_grad_hook(lambda _: None),
    "hook of the std": lambda alg: alg.actor.distribution.std_param.register_hook(lambda grad: grad),
    "forward of the model": lambda alg: setattr(alg.actor, "forward", alg.actor.forward),
    "forward of the MLP": lambda alg: setattr(alg.critic.mlp, "forward", alg.critic.mlp.forward),
    "update of the distribution": lambda alg: setattr(alg.actor.distribution, "__class__", OwnUpdate),
    "update of this distribution": lambda alg: setattr(alg.actor.distribution, "update", alg.actor.distribution.update),
    "sample": lambda alg: setattr(alg.actor.distribution, "sample", alg.actor.distribution.sample),
    "another activation": lambda alg: alg.critic.mlp.__setitem__(1, nn.SELU()),
    "no bias": lambda alg: alg.critic.mlp[2].register_parameter("bias", None),
    "another layout": lambda alg: transpose(alg.actor.mlp[0]),
    "distribution of the critic": lambda alg: setattr(alg.critic, "distribution", GaussianDistribution(1)),
    "std for all actions": lambda alg: setattr(alg.actor.distribution, "std_param", nn.Parameter(torch.tensor([0.5]))),
    "std that is computed": lambda alg: register_parametrization(alg.actor.distribution, "std_param", nn.Softplus()),
    "bounds that are tensors": lambda alg: setattr(
        alg.actor.distribution, "std_range", [torch.full((3,), 0.1), torch.full((3,), 2.0)]
    ),
    "weight of another": lambda alg: tie(alg.critic.mlp[2], alg.critic.mlp[0]),
    "call of a subclass": lambda alg: setattr(alg.critic, "__class__", OwnCall),
    "another normalizer": lambda alg: setattr(alg.critic, "obs_normalizer", nn.LayerNorm(12)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_the_users(change: Callable, new_run: Callable, kernels: ModuleType) -> None:
    run = new_run(FUSED).rollout()
    assert PlainNetworks.for_update(kernels, run.alg.actor, run.alg.critic, run.alg.storage.observations) is not None
    change(run.alg)
    assert PlainNetworks.for_update(kernels, run.alg.actor, run.alg.critic, run.alg.storage.observations) is None


@pytest.mark.parametrize(
    ("owner", "name"),
    [(GaussianDistribution, "update"), (MLPModel, "forward"), (MLP, "forward"), (nn.Linear, "forward")],
)
def test_functions_that_are_replaced_for_all(
    owner: type, name: str, new_run: Callable, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    alg = new_run(FUSED).rollout().alg
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: own(*args, **kwargs))
    assert PlainNetworks.for_update(kernels, alg.actor, alg.critic, alg.storage.observations) is None


def test_other_types_and_modes(new_run: Callable, kernels: ModuleType, backend: str) -> None:
    alg = new_run(FUSED).rollout().alg

    def is_taken(backend: ModuleType = kernels) -> bool:
        return PlainNetworks.for_update(backend, alg.actor, alg.critic, alg.storage.observations) is not None

    assert is_taken()
    assert not is_taken(backends.select("eager", torch.device("cpu")))
    with torch.autograd.set_detect_anomaly(True):
        assert not is_taken()
    with torch.autocast(kernels.DEVICE_TYPE, dtype=torch.bfloat16):
        assert not is_taken()
    with torch.no_grad():
        assert not is_taken()
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # not in torch 2.6
        with torch.autograd.graph.save_on_cpu():
            assert not is_taken()
    alg.critic.double()
    assert not is_taken()
    alg.critic.float()
    alg.storage.observations["policy"] = alg.storage.observations["policy"].double()
    assert not is_taken()


@pytest.mark.parametrize(
    "config",
    [
        {"actor": LSTM, "critic": LSTM},
        {"actor": {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution"}}},
        {"args": {"rnd_cfg": RND}},
        {"args": {"symmetry_cfg": {}}},
        {"args": {"backend": "eager"}},
    ],
    ids=["recurrent", "heteroscedastic", "rnd", "symmetry", "eager"],
)
def test_configs(config: dict, new_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainNetworks, "forward", None)  # which would be called
    new_run(FUSED, **config).learn(1)


def test_hooks_are_called(new_run: Callable) -> None:
    run, seen = new_run(FUSED), []
    run.alg.actor.mlp[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    run.learn(1)
    assert len(seen) == run.alg.num_learning_epochs * run.alg.num_mini_batches


def test_what_is_looked_at_within_an_update(new_run: Callable) -> None:
    """By a hook of the optimizer, the distribution is that of the mini-batch."""
    seen = []
    for algorithm in ("PPO", FUSED):
        run = new_run(algorithm, args={"schedule": "fixed"})
        policy = run.alg.actor
        run.alg.optimizer.register_step_pre_hook(
            lambda *_, policy=policy: seen.append((policy.output_mean.shape, policy.output_std[0, 0].item()))
        )
        run.learn(1)
    stock, fused = seen[:4], seen[4:]
    assert [shape for shape, _ in fused] == [shape for shape, _ in stock]
    assert [std for _, std in fused] == pytest.approx([std for _, std in stock], abs=1e-2)
    assert len({std for _, std in fused}) == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_no_activations_are_kept(frozen: bool, new_run: Callable, kernels: ModuleType) -> None:
    """Nor observations, which the next mini-batch's would stand beside."""
    alg = new_run(FUSED).rollout().alg
    if frozen:
        alg.actor.mlp[0].requires_grad_(False)
    plain = PlainNetworks.for_update(kernels, alg.actor, alg.critic, alg.storage.observations)
    obs = alg.storage.observations[0]
    plain.backward(*plain.forward(obs, sample=False))
    assert plain._actor._outputs == plain._critic._outputs == []


# --- in a rollout -----------------------------------------------------------------------------------------------------


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of rollouts that went without modules."""
    seen, act = [], PlainNetworks.act
    monkeypatch.setattr(PlainNetworks, "act", lambda self, obs: seen.append(len(seen)) or act(self, obs))
    return seen


@pytest.mark.parametrize("name", [name for name in CASES if "frozen" not in name])
def test_a_rollout(
    name: str, backend: str, device: str, new_run: Callable, acted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is what the modules give, to rounding; and so is what the distribution tells."""
    config, _ = CASES[name]
    config = {**config, "args": {"backend": backend, **config.get("args", {})}}
    plain = new_run(FUSED, device=device, **config).rollout().alg
    assert len(acted) == plain.storage.num_transitions_per_env
    monkeypatch.setattr(PlainNetworks, "for_rollout", lambda *_: None)
    modules = new_run(FUSED, device=device, **config).rollout().alg
    assert len(acted) == plain.storage.num_transitions_per_env
    for field in ("actions", "values", "actions_log_prob", "returns", "advantages"):
        ours, theirs = (getattr(alg.storage, field) for alg in (plain, modules))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    for params in (lambda alg: alg.storage.distribution_params, lambda alg: alg.actor.output_distribution_params):
        for ours, theirs in zip(params(plain), params(modules), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


class OwnSample(GaussianDistribution):
    def sample(self) -> Tensor:
        return super().sample() + 100.0


class Other(MLPModel):
    pass


def other_layer(model: MLPModel) -> None:
    model.mlp[0] = copy.deepcopy(model.mlp[0])


def other_weights(model: MLPModel) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def hook_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = torch.nn.modules.module._global_forward_hooks
    monkeypatch.setitem(hooks, -1, lambda *_: None)


LATER: dict[str, Callable] = {
    "hook": lambda alg, _: alg.actor.mlp[1].register_forward_hook(lambda *_: None),
    "hook before": lambda alg, _: alg.critic.register_forward_pre_hook(lambda *_: None),
    "hook of all": lambda alg, monkeypatch: hook_of_all(monkeypatch),
    "forward": lambda alg, _: setattr(alg.critic.mlp[0], "forward", alg.critic.mlp[0].forward),
    "latent": lambda alg, _: setattr(alg.actor, "get_latent", alg.actor.get_latent),
    "update": lambda alg, _: setattr(alg.actor.distribution, "update", alg.actor.distribution.update),
    "log_prob": lambda alg, _: setattr(alg.actor.distribution, "log_prob", alg.actor.distribution.log_prob),
    "sample": lambda alg, _: setattr(alg.actor.distribution, "__class__", OwnSample),
    "class": lambda alg, _: setattr(alg.critic, "__class__", Other),
    "layer": lambda alg, _: other_layer(alg.actor),
    "weights": lambda alg, _: other_weights(alg.critic),
    "actor": lambda alg, _: setattr(alg, "actor", copy.deepcopy(alg.actor)),
    "distribution": lambda alg, _: setattr(alg.actor, "distribution", copy.deepcopy(alg.actor.distribution)),
}


@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
def test_changes_within_a_rollout(
    change: Callable, new_run: Callable, acted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(FUSED)
    act = run.alg.act

    def change_and_act(obs: object) -> Tensor:
        if run.alg.storage.step == 3:
            change(run.alg, monkeypatch)
        return act(obs)

    run.alg.act = change_and_act
    run.rollout()
    assert len(acted) == 3


def test_autograd_and_autocast_within_a_rollout(new_run: Callable, acted: list) -> None:
    run = new_run(FUSED).rollout()
    run.alg.storage.clear()
    acted.clear()
    obs = run.env.get_observations()
    with torch.inference_mode():
        run.alg.act(obs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run.alg.act(obs)
    assert len(acted) == 1
    run.alg.act(obs)
    assert len(acted) == 1
    assert run.alg.actor.output_mean.requires_grad
    with torch.no_grad():
        run.alg.act(obs)
    assert len(acted) == 2


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"args": {"rnd_cfg": RND, "symmetry_cfg": {}}}, 6),  # of which acting knows nothing
        ({"actor": LSTM, "critic": LSTM}, 0),
        ({"actor": {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution"}}}, 0),
        ({"actor": {"distribution_cfg": {"class_name": OwnSample}}}, 0),
        ({"actor": {"activation": "tanh"}, "critic": {"activation": "relu"}}, 6),
        ({"actor": {"activation": "swish"}}, 0),
        ({"args": {"backend": "eager"}}, 0),
    ],
    ids=["rnd and symmetry", "recurrent", "heteroscedastic", "own sample", "tanh and relu", "swish", "eager"],
)
def test_which_configs_act_so(config: dict, steps: int, new_run: Callable, acted: list) -> None:
    new_run(FUSED, **config).rollout()
    assert len(acted) == steps
