"""An exported policy clips its actions; everything else in the file is as rsl_rl writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyfast_ppo.rsl_rl.export import export_policy_to_jit, export_policy_to_onnx

LOW, HIGH = torch.tensor([-0.05, -0.1, 0.0]), torch.tensor([0.05, 0.2, 0.01])
SAMPLES = 64

POLICIES = {
    "mlp": {"actor": {"obs_normalization": True}},
    "heteroscedastic": {"actor": {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution"}}},
    "gru": {"actor": {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8}},
    "lstm": {"actor": {"class_name": "RNNModel", "rnn_type": "lstm", "rnn_hidden_dim": 8, "rnn_num_layers": 2}},
}


@pytest.fixture
def runner(new_run, request):
    name = getattr(request, "param", "mlp")
    run = new_run(**POLICIES[name])
    with torch.no_grad():  # so that the mean moves across the bounds
        list(run.runner.alg.get_policy().mlp.parameters())[-2].mul_(3.0)
    return run.runner


def observations(num_steps: int = 5) -> Tensor:
    return torch.randn(num_steps, 1, 6, generator=torch.Generator().manual_seed(0))


def outputs(path: Path, times: int = 1) -> Tensor:
    """Of an exported TorchScript policy, step by step; ``times`` episodes."""
    policy = torch.jit.load(path)
    episodes = []
    for _ in range(times):
        policy.reset()
        episodes.append(torch.stack([policy(obs) for obs in observations()]))
    assert all(torch.equal(episode, episodes[0]) for episode in episodes), "reset() does not reset"
    return episodes[0]


def onnx_outputs(path: Path) -> tuple[np.ndarray, list[str]]:
    """Of an exported ONNX policy, step by step, its states handed on; and the names of its inputs."""
    onnx = pytest.importorskip("onnx")
    evaluator = onnx.reference.ReferenceEvaluator(str(path))
    graph = evaluator.proto_.graph
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    states = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name != "obs"}
    actions = []
    for obs in observations():
        results = evaluator.run(None, {"obs": obs.numpy(), **states})
        actions.append(results[0])
        states = dict(zip(states, results[1:], strict=True))
    return np.stack(actions), [i.name for i in graph.input] + [o.name for o in graph.output]


@pytest.mark.parametrize("runner", POLICIES, indirect=True)
def test_torchscript_clips(runner, tmp_path):
    runner.export_policy_to_jit(str(tmp_path), "stock.pt")
    export_policy_to_jit(runner, tmp_path, "clipped.pt", action_bounds=(LOW, HIGH))
    stock, clipped = outputs(tmp_path / "stock.pt"), outputs(tmp_path / "clipped.pt", times=2)
    assert torch.equal(clipped, torch.clamp(stock, LOW, HIGH))
    assert not torch.equal(clipped, stock)


@pytest.mark.parametrize("runner", POLICIES, indirect=True)
def test_onnx_clips(runner, tmp_path):
    pytest.importorskip("onnx.reference")
    runner.export_policy_to_onnx(str(tmp_path), "stock.onnx")
    export_policy_to_onnx(runner, tmp_path, "clipped.onnx", action_bounds=(LOW, HIGH))
    stock, stock_names = onnx_outputs(tmp_path / "stock.onnx")
    clipped, names = onnx_outputs(tmp_path / "clipped.onnx")
    assert names == stock_names
    np.testing.assert_allclose(clipped, np.clip(stock, LOW.numpy(), HIGH.numpy()), atol=1e-6)
    assert (clipped != stock).any()


def test_images(new_run, tmp_path):
    runner = new_run(
        actor={
            "class_name": "CNNModel",
            "cnn_cfg": {"output_channels": [4], "kernel_size": 3, "activation": "elu"},
        },
        obs_groups={"actor": ["policy", "image"]},
        env_args={"images": True},
    ).runner
    runner.export_policy_to_jit(str(tmp_path), "stock.pt")
    export_policy_to_jit(runner, tmp_path, "clipped.pt", action_bounds=0.001)
    vector, image = torch.randn(1, 6), [torch.randn(1, 1, 6, 6)]
    stock = torch.jit.load(tmp_path / "stock.pt")(vector, image)
    assert torch.equal(torch.jit.load(tmp_path / "clipped.pt")(vector, image), stock.clamp(-0.001, 0.001))
    assert not torch.equal(stock, stock.clamp(-0.001, 0.001))


@pytest.mark.parametrize(
    ("action_bounds", "low", "high"),
    [(0.05, -0.05, 0.05), ((-0.02, 0.04), -0.02, 0.04), ((-0.02, HIGH), -0.02, HIGH), (None, None, None)],
)
def test_forms_of_the_bounds(runner, tmp_path, action_bounds, low, high):
    runner.export_policy_to_jit(str(tmp_path), "stock.pt")
    export_policy_to_jit(runner, str(tmp_path), "clipped.pt", action_bounds)
    expected = outputs(tmp_path / "stock.pt")
    if low is not None:
        expected = torch.clamp(expected, torch.as_tensor(low).expand(3), torch.as_tensor(high).expand(3))
    assert torch.equal(outputs(tmp_path / "clipped.pt"), expected)


def test_the_bounds_of_the_environment(runner, tmp_path):
    runner.export_policy_to_jit(str(tmp_path), "stock.pt")
    stock = outputs(tmp_path / "stock.pt")
    for bounds, expected in [((LOW, HIGH), stock.clamp(LOW, HIGH)), (None, stock)]:
        runner.env.action_bounds = bounds
        export_policy_to_jit(runner, tmp_path)
        assert torch.equal(outputs(tmp_path / "policy.pt"), expected)
    del runner.env.action_bounds  # an environment that does not clip
    export_policy_to_jit(runner, tmp_path)
    assert torch.equal(outputs(tmp_path / "policy.pt"), stock)


def test_the_policy_is_left_as_it_was(runner, tmp_path):
    policy = runner.alg.get_policy()
    attributes = set(vars(policy))
    runner.export_policy_to_jit(str(tmp_path), "before.pt")
    export_policy_to_jit(runner, tmp_path, action_bounds=0.01)
    runner.export_policy_to_jit(str(tmp_path), "after.pt")
    assert set(vars(policy)) == attributes
    assert torch.equal(outputs(tmp_path / "before.pt"), outputs(tmp_path / "after.pt"))


def test_a_runner_that_exports_in_its_own_way(runner, tmp_path):
    seen = []

    class OwnWay(type(runner)):
        def export_policy_to_jit(self, path, filename="policy.pt"):
            seen.append(filename)
            super().export_policy_to_jit(path, filename)

    runner.__class__ = OwnWay
    export_policy_to_jit(runner, tmp_path, "own.pt", action_bounds=0.0)
    assert seen == ["own.pt"]
    assert torch.equal(outputs(tmp_path / "own.pt"), torch.zeros(5, 1, 3))


@pytest.mark.parametrize(
    ("action_bounds", "error", "message"),
    [
        ("environment", ValueError, 'action_bounds must be "env"'),
        ((1.0, -1.0), ValueError, "action_bounds has a low above its high"),
        ((-1.0, [1.0, 1.0]), ValueError, "action_bounds: high must be one number or 3"),
        ({}, TypeError, "action_bounds must be a number or a pair"),
    ],
)
def test_wrong_bounds(runner, tmp_path, action_bounds, error, message):
    with pytest.raises(error, match=message):
        export_policy_to_jit(runner, tmp_path, action_bounds=action_bounds)
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_another_form_is_refused(runner, tmp_path):
    policy = runner.alg.get_policy()
    policy.as_jit = lambda: torch.nn.Linear(6, 3)
    with pytest.raises(TypeError, match=r"Linear without the submodule deterministic_output .* action_bounds=None"):
        export_policy_to_jit(runner, tmp_path, action_bounds=1.0)
