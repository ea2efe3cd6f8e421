"""rsl_rl's ``torch_compile_mode``: actor and critic compiled, FusedPPO around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from rsl_rl.modules.distribution import GaussianDistribution
from torch import Tensor

from pyfast_ppo.rsl_rl import rollout

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"

HETEROSCEDASTIC = {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}}
SMALL = {"hidden_dims": [8]}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def captured_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Lets torch.compile run the graphs that it captures as they are, and collects them."""
    graphs: list[torch.fx.GraphModule] = []
    compile_model = torch.compile

    def collect(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    def patched(model: torch.nn.Module, *, mode: str) -> Callable:
        assert mode == "default"
        return compile_model(model, backend=collect)

    monkeypatch.setattr(torch, "compile", patched)
    return graphs


def test_compiled_models_stay_with_ppo(train: Callable) -> None:
    """The real compiler, for PPO too: with torch 2.15 compiled models draw other actions than plain ones. FusedPPO's
    sums have another order than PPO's: the divergence is that of test_parity.py. Three iterations: the time goes into
    compiling."""
    args = {"schedule": "adaptive"}
    config = {"actor": SMALL, "critic": SMALL, "torch_compile_mode": "default"}
    stock = train("PPO", 3, **config, args=args)
    nudged = train("PPO", 3, nudge=0, **config, args=args)
    args = {**args, "keep_random_stream": True}
    fused = train(FUSED, 3, **config, args=args)
    assert type(fused.alg.actor).__name__ == "OptimizedModule"
    assert fused.rates == stock.rates
    assert fused.distance(stock) <= 10.0 * max(nudged.distance(stock), 1e-7)


@pytest.mark.parametrize("keep_random_stream", [False, True])
@pytest.mark.parametrize("actor", [{}, HETEROSCEDASTIC], ids=["state_independent", "heteroscedastic"])
def test_captured_graphs_give_the_bits_of_plain_models(
    actor: dict, keep_random_stream: bool, train: Callable, captured_graphs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    # plain models use the kernels that there are: an activation that has none, and torch's log-probability
    def formula(distribution: GaussianDistribution, outputs: Tensor, *, backend: str | None) -> Tensor:
        return type(distribution).log_prob(distribution, outputs)

    monkeypatch.setattr(rollout, "log_prob_at_once", formula)
    config = {"actor": {**actor, "activation": "selu"}, "critic": {"activation": "selu"}}
    config["args"] = {"schedule": "adaptive", "keep_random_stream": keep_random_stream}
    plain = train(FUSED, 3, **config)
    assert not captured_graphs
    compiled = train(FUSED, 3, **config, torch_compile_mode="default")
    assert captured_graphs
    assert compiled.rates == plain.rates
    assert compiled.distance(plain) == 0.0
    assert torch.equal(compiled.random_state, plain.random_state)


def test_nothing_is_compiled_anew_after_the_first_iterations(new_run: Callable, captured_graphs: list) -> None:
    """The forward pass without sampling is one more graph than PPO has, not one more for each mini-batch."""
    num_graphs = {}
    for algorithm in ("PPO", FUSED):
        torch.compiler.reset()
        captured_graphs.clear()
        run = new_run(algorithm, torch_compile_mode="default").learn(2)
        num_graphs[algorithm] = len(captured_graphs)
        run.learn(3)
        assert len(captured_graphs) == num_graphs[algorithm]
    assert num_graphs[FUSED] <= num_graphs["PPO"] + 1
