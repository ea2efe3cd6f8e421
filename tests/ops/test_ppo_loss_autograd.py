"""ppo_loss as a citizen of PyTorch: autograd, autocast, torch.compile, threads, fork, equal bits."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from backends_here import KERNELS, NATIVE
from ppo_loss_oracle import (
    DEFAULTS,
    DIFFERENTIABLE,
    NAMES,
    VECTORS,
    Inputs,
    assert_matches,
    call_with_autograd,
    make_inputs,
)
from second_derivative import WAYS
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pyfast_ppo
from pyfast_ppo import backends, ppo_loss, ppo_loss_and_grad, ppo_loss_reference
from pyfast_ppo.versions import release

TORCH = release(torch.__version__)
compiles = pytest.mark.skipif(TORCH < (2, 9), reason="torch.compile of that torch does not take named tuples")
exports = pytest.mark.skipif(TORCH < (2, 11), reason="torch.export of that torch does not take symbolic sizes so")


def with_leaves(inputs: Inputs, names: tuple[str, ...] = DIFFERENTIABLE) -> Inputs:
    return {name: t.clone().requires_grad_() if name in names else t for name, t in inputs.items()}


@pytest.fixture
def inputs(device: str) -> Inputs:
    return make_inputs(50, 4, old_std_per_row=True, device=device)


@pytest.fixture
def grads(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The gradients of the loss, which other tests hold against the oracle."""
    return call_with_autograd(ppo_loss, inputs, backend=backend)[1]


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_only_the_loss_has_a_gradient(inputs: Inputs, backend: str) -> None:
    out = ppo_loss(**with_leaves(inputs), backend=backend)
    assert [name for name, t in zip(out._fields, out, strict=True) if t.requires_grad] == ["loss"]
    expanded = {**with_leaves(inputs), "std": inputs["std"].clone().requires_grad_().expand(50, 4)}
    for leaves in (with_leaves(inputs), expanded):
        out, grads = ppo_loss_and_grad(**leaves, backend=backend)
        assert not any(t.requires_grad for t in (*out, *grads))


def test_scaled_loss(inputs: Inputs, grads: dict[str, Tensor], backend: str) -> None:
    leaves = with_leaves(inputs)
    (2 * ppo_loss(**leaves, backend=backend).loss).backward()
    for name in DIFFERENTIABLE:
        assert torch.equal(leaves[name].grad, 2 * grads[name])


def test_loss_scaling(backend: str, device: str) -> None:
    """What a GradScaler is for: a factor on the loss lifts gradients that float16 would round to 0 or to few digits."""
    dtypes = dict.fromkeys(DIFFERENTIABLE, torch.float16)
    inputs = make_inputs(20_000, 2, std_per_row=True, dtypes=dtypes, device=device)
    leaves = with_leaves(inputs)
    (2.0**16 * ppo_loss(**leaves, backend=backend).loss).backward()
    _, want = call_with_autograd(ppo_loss, {name: t.float() for name, t in inputs.items()}, backend=backend)
    assert (want["mean"].abs() < 2.0**-25).any(), "nothing here is too small for float16"
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(leaves[name].grad.double() / 2.0**16, want[name].double(), rtol=2.0**-10, atol=2e-12)


def test_expanded_std_of_float16(backend: str, device: str) -> None:
    """The row's gradient is not divided by the number of rows, which float16 would round to 0."""
    inputs = make_inputs(20_000 if backend in NATIVE else 3_000, 2, dtypes={"std": torch.float16}, device=device)
    inputs["advantages"] = 0.01 * inputs["advantages"]
    _, want = call_with_autograd(ppo_loss, inputs, backend=backend, entropy_coef=0.0)
    std = inputs["std"].requires_grad_()
    expanded = {**inputs, "std": std.expand(inputs["mean"].shape)}
    ppo_loss(**expanded, entropy_coef=0.0, backend=backend).loss.backward()
    assert torch.equal(std.grad, want["std"])
    _, (_, grad_std, _) = ppo_loss_and_grad(**expanded, entropy_coef=0.0, backend=backend)
    assert torch.equal(grad_std.sum(0), want["std"])


def test_part_of_a_larger_loss(inputs: Inputs, grads: dict[str, Tensor], backend: str) -> None:
    leaves = with_leaves(inputs)
    (ppo_loss(**leaves, backend=backend).loss / 4 + leaves["mean"].sum()).backward()
    torch.testing.assert_close(leaves["mean"].grad, grads["mean"] / 4 + 1)
    torch.testing.assert_close(leaves["std"].grad, grads["std"] / 4)


def test_gradients_accumulate(inputs: Inputs, grads: dict[str, Tensor], backend: str) -> None:
    leaves = with_leaves(inputs)
    for _ in range(3):
        ppo_loss(**leaves, backend=backend).loss.backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(leaves[name].grad, 3 * grads[name])


def test_autograd_grad(inputs: Inputs, grads: dict[str, Tensor], backend: str) -> None:
    leaves = with_leaves(inputs)
    out = ppo_loss(**leaves, backend=backend)
    got = torch.autograd.grad(out.loss, [leaves[name] for name in reversed(DIFFERENTIABLE)])
    for name, grad in zip(reversed(DIFFERENTIABLE), got, strict=True):
        assert torch.equal(grad, grads[name])


def test_backward_twice(inputs: Inputs, grads: dict[str, Tensor], backend: str) -> None:
    leaves = with_leaves(inputs)
    loss = ppo_loss(**leaves, backend=backend).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name in DIFFERENTIABLE:
        assert torch.equal(leaves[name].grad, 2 * grads[name])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("factor", [1, 2])
def test_gradient_changed_before_another_backward(
    inputs: Inputs, grads: dict[str, Tensor], backend: str, factor: int
) -> None:
    """The gradient that autograd.grad hands out may be the saved one. A second backward is refused then, not wrong."""
    leaves = with_leaves(inputs)
    loss = ppo_loss(**leaves, backend=backend).loss * factor
    torch.autograd.grad(loss, leaves["mean"], retain_graph=True)[0].zero_()
    try:
        (second,) = torch.autograd.grad(loss, leaves["mean"])
    except RuntimeError as refused:
        assert "modified by an inplace operation" in str(refused)
    else:
        assert torch.equal(second, factor * grads["mean"])


@pytest.mark.parametrize("names", [("mean",), ("std",), ("values",), ("mean", "values")])
def test_some_require_a_gradient(
    inputs: Inputs, grads: dict[str, Tensor], backend: str, names: tuple[str, ...]
) -> None:
    leaves = with_leaves(inputs, names)
    ppo_loss(**leaves, backend=backend).loss.backward()
    for name in DIFFERENTIABLE:
        assert leaves[name].grad is None if name not in names else torch.equal(leaves[name].grad, grads[name])


def test_nothing_requires_a_gradient(inputs: Inputs, backend: str) -> None:
    out = ppo_loss(**inputs, backend=backend)
    assert not out.loss.requires_grad
    with torch.no_grad():
        same = ppo_loss(**with_leaves(inputs), backend=backend)
    assert not same.loss.requires_grad
    for one, other in zip(out, same, strict=True):
        assert torch.equal(one, other)


def test_rollout_gets_no_gradient(inputs: Inputs, backend: str) -> None:
    leaves = with_leaves(inputs, NAMES)
    ppo_loss(**leaves, kl_coef=0.5, backend=backend).loss.backward()
    assert {name for name in NAMES if leaves[name].grad is not None} == set(DIFFERENTIABLE)
    rollout_only = with_leaves(inputs, tuple(name for name in NAMES if name not in DIFFERENTIABLE))
    assert not ppo_loss(**rollout_only, kl_coef=0.5, backend=backend).loss.requires_grad


@pytest.mark.parametrize("options", [{}, {"kl_coef": 1}, {"num_original": 50}, {"row_index": True}], ids=str)
def test_rollout_gets_no_gradient_of_the_reference(inputs: Inputs, device: str, options: dict) -> None:
    """Whichever way its arguments were checked."""
    if "row_index" in options:
        options = {"row_index": torch.arange(50, device=device)}
    leaves = with_leaves(inputs, NAMES)
    ppo_loss_reference(**leaves, **options).loss.backward()
    assert {name for name in NAMES if leaves[name].grad is not None} == set(DIFFERENTIABLE)
    rollout_only = with_leaves(inputs, tuple(name for name in NAMES if name not in DIFFERENTIABLE))
    assert not ppo_loss_reference(**rollout_only, **options).loss.requires_grad


class NoGradient(torch.autograd.Function):
    """As of an operation whose result is only looked at."""

    @staticmethod
    def forward(ctx, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


def test_a_loss_that_gets_no_gradient(inputs: Inputs, backend: str) -> None:
    leaves = with_leaves(inputs)
    loss = NoGradient.apply(ppo_loss(**leaves, backend=backend).loss)
    (loss + leaves["mean"].sum()).backward()
    assert torch.equal(leaves["mean"].grad, torch.ones_like(leaves["mean"]))
    assert leaves["std"].grad is None or not leaves["std"].grad.any()


@pytest.mark.parametrize("backend", ["cpu", "cuda", "eager"], indirect=True)
@pytest.mark.parametrize("std_per_row", [False, True])
def test_gradcheck(backend: str, device: str, std_per_row: bool) -> None:
    """Finite differences, undefined and batched gradients: all that torch asks of a Function in reverse mode."""
    dtypes = dict.fromkeys(NAMES, torch.float64)
    inputs = make_inputs(5, 3, std_per_row=std_per_row, dtypes=dtypes, device=device)
    leaves = with_leaves(inputs)

    def loss(*leaves: Tensor) -> Tensor:
        return ppo_loss(
            **{**inputs, **dict(zip(DIFFERENTIABLE, leaves, strict=True))}, kl_coef=0.5, backend=backend
        ).loss

    of = [leaves[name] for name in DIFFERENTIABLE]
    assert torch.autograd.gradcheck(loss, of, check_batched_grad=True)
    vectorized, one_by_one = (torch.autograd.functional.jacobian(loss, tuple(of), vectorize=v) for v in (True, False))
    assert_same_bits(vectorized, one_by_one)


def test_batch_of_gradients(inputs: Inputs, grads: dict[str, Tensor], backend: str, device: str) -> None:
    leaves = with_leaves(inputs)
    loss = ppo_loss(**leaves, backend=backend).loss
    factors = torch.tensor([1.0, -2.0, 0.0], device=device)
    got = torch.autograd.grad(loss, [leaves[name] for name in DIFFERENTIABLE], factors, is_grads_batched=True)
    for name, batch in zip(DIFFERENTIABLE, got, strict=True):
        for factor, grad in zip(factors, batch, strict=True):
            assert torch.equal(grad, factor * grads[name])


def test_coefficients_get_no_gradient(inputs: Inputs, backend: str) -> None:
    coefficient = torch.tensor(0.5, device=inputs["mean"].device, requires_grad=True)
    ppo_loss(**with_leaves(inputs), kl_coef=coefficient, backend=backend).loss.backward()
    assert coefficient.grad is None


def test_leaves_that_are_used_again(inputs: Inputs, backend: str) -> None:
    """Nothing that autograd needs is an input: the optimizer may change the parameters before another backward."""
    leaves = with_leaves(inputs)
    loss = ppo_loss(**leaves, backend=backend).loss
    loss.backward(retain_graph=True)
    first = leaves["mean"].grad.clone()
    with torch.no_grad():
        leaves["mean"].mul_(2.0)
    loss.backward()
    assert torch.equal(leaves["mean"].grad, 2 * first)


def test_inputs_are_left_alone(inputs: Inputs, backend: str) -> None:
    before = {name: t.clone() for name, t in inputs.items()}
    call_with_autograd(ppo_loss, inputs, backend=backend)
    ppo_loss_and_grad(**inputs, backend=backend)
    assert all(torch.equal(inputs[name], before[name]) for name in NAMES)


def test_gradients_for_autograd_backward(inputs: Inputs, grads: dict[str, Tensor], backend: str) -> None:
    """As a training loop uses ppo_loss_and_grad: the network's parameters get what loss.backward() gives them."""
    device = inputs["mean"].device
    weight = torch.ones(4, device=device, requires_grad=True)
    leaves = {**inputs, "mean": inputs["mean"] * weight, "std": inputs["std"] * weight, "values": inputs["values"] + 0}
    _, got = ppo_loss_and_grad(**leaves, backend=backend)
    torch.autograd.backward([leaves["mean"], leaves["std"]], got[:2])
    want = (inputs["mean"] * grads["mean"]).sum(0) + inputs["std"] * grads["std"]
    torch.testing.assert_close(weight.grad, want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("scaled_by_a_parameter", [False, True])
def test_second_derivative_is_refused(
    inputs: Inputs, backend: str, way: Callable, name: str, scaled_by_a_parameter: bool
) -> None:
    """A penalty on the gradient must not silently have none."""
    leaves = with_leaves(inputs)
    factor = torch.ones((), device=inputs["mean"].device, requires_grad=scaled_by_a_parameter)
    with pytest.raises(RuntimeError, match="no second derivative"):
        way(lambda x: factor * ppo_loss(**{**leaves, name: x * 1.0}, backend=backend).loss, leaves[name])


def test_second_derivative_by_a_factor_is_refused(inputs: Inputs, backend: str) -> None:
    """The gradient depends on what the loss was multiplied by, too."""
    leaves = with_leaves(inputs)
    factor = torch.ones((), device=inputs["mean"].device, requires_grad=True)
    loss = factor * ppo_loss(**leaves, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, leaves["mean"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), factor)


def test_second_derivative_of_a_checkpointed_loss_is_refused(inputs: Inputs, backend: str) -> None:
    """A saved tensor may be unpacked only once there."""
    leaves = with_leaves(inputs)

    def function(mean: Tensor) -> Tensor:
        def both(mean: Tensor) -> Tensor:
            log_prob = pyfast_ppo.gaussian_log_prob(leaves["actions"], mean * 1, leaves["std"], backend=backend)
            return ppo_loss(**{**leaves, "mean": mean * 1}, backend=backend).loss + log_prob.sum()

        return checkpoint(both, mean, use_reentrant=False)

    function(leaves["mean"]).backward()
    assert leaves["mean"].grad is not None
    (grad,) = torch.autograd.grad(function(leaves["mean"]), leaves["mean"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), leaves["mean"])


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_graph_is_freed_without_the_garbage_collector(inputs: Inputs, backend: str, create_graph: bool) -> None:
    """Nothing that the graph keeps leads back to it: memory of a mini-batch must not wait for a collection."""
    leaves = with_leaves(inputs)
    mean = leaves["mean"] * 1
    loss = ppo_loss(**{**leaves, "mean": mean}, backend=backend).loss
    grads = torch.autograd.grad(loss, [leaves["mean"], leaves["std"]], create_graph=create_graph)
    gone = [weakref.ref(t) for t in (mean, loss, *grads)]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        del mean, loss, grads
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        if was_enabled:
            gc.enable()


def test_reference_has_a_second_derivative(device: str) -> None:
    """The error message promises it. Against a finite difference of the first."""
    inputs = make_inputs(5, 2, dtypes=dict.fromkeys(NAMES, torch.float64), device=device)
    leaves = with_leaves(inputs)
    (grad,) = torch.autograd.grad(ppo_loss_reference(**leaves).loss, leaves["mean"], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaves["mean"])
    h = 1e-6
    shifted = {**inputs, "mean": inputs["mean"] + h}
    _, plus = call_with_autograd(ppo_loss_reference, shifted)
    _, minus = call_with_autograd(ppo_loss_reference, {**inputs, "mean": inputs["mean"] - h})
    torch.testing.assert_close(second.sum(), (plus["mean"] - minus["mean"]).sum() / (2 * h), rtol=1e-5, atol=1e-8)


# --- forward mode and torch.func --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("function", [ppo_loss, ppo_loss_and_grad])
@pytest.mark.parametrize("expanded", [False, True])
def test_forward_mode_is_refused(
    inputs: Inputs, backend: str, device: str, function: Callable, name: str, expanded: bool
) -> None:
    """A tangent must not get lost without a word; what gets no gradient may have one."""
    tangent = torch.ones_like(inputs[name])

    def call(x: Tensor, of: str = name, **options: Tensor) -> Tensor:
        changed = {**inputs, of: x, **options}
        if expanded:
            changed["std"] = changed["std"].expand_as(inputs["mean"])
        out = function(**changed, backend=backend)
        return (out if function is ppo_loss else out[0]).loss

    message = "ppo_loss has no derivative in forward mode; ppo_loss_reference has one"
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=message):
            call(forward_ad.make_dual(inputs[name], tangent))
        with pytest.raises(RuntimeError, match=message):
            call(forward_ad.make_dual(inputs[name].clone().requires_grad_(), tangent))
        assert torch.equal(
            call(inputs[name]), call(forward_ad.make_dual(inputs["returns"], inputs["returns"]), "returns")
        )
        kl_coef = torch.zeros((), device=device)
        assert torch.equal(
            call(inputs[name]), call(inputs[name], kl_coef=forward_ad.make_dual(kl_coef, torch.ones_like(kl_coef)))
        )
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(call, (inputs[name],), (tangent,))


@pytest.mark.parametrize("function", [ppo_loss, ppo_loss_and_grad])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_are_refused(
    inputs: Inputs, backend: str, device: str, function: Callable, transform: Callable
) -> None:
    """Whatever they go over, and where it is none of the arguments."""
    message = r"ppo_loss cannot be transformed by torch\.func; ppo_loss_reference can be"
    for name, x in {
        **inputs,
        "kl_coef": torch.ones((), device=device),
        "factor": torch.ones((), device=device),
    }.items():

        def call(x: Tensor, name: str = name) -> Tensor:
            changed = inputs if name == "factor" else {**inputs, name: x}
            out = function(**changed, backend=backend)
            return (out if function is ppo_loss else out[0]).loss * x.sum()

        with pytest.raises(RuntimeError, match=message):
            transform(call)(x if transform is torch.func.grad else x.expand(2, *x.shape).clone())


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_gives_the_rollout_no_tangents(compiled: bool) -> None:
    """As it gets no gradients."""
    inputs = make_inputs(6, 3)

    def call(inputs: Inputs, kl_coef: Tensor) -> Tensor:
        return ppo_loss_reference(**inputs, kl_coef=kl_coef).loss

    def tangent(names: tuple[str, ...], of_kl_coef: float = 0.0) -> Tensor:
        primals = inputs, torch.tensor(0.5)
        tangents = {name: t if name in names else torch.zeros_like(t) for name, t in inputs.items()}
        return torch.func.jvp(call, primals, (tangents, torch.tensor(of_kl_coef)))[1]

    if compiled:
        torch.compiler.reset()
        tangent = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    rollout = tuple(name for name in NAMES if name not in DIFFERENTIABLE)
    assert tangent(rollout, 1.0) == 0.0
    assert tangent(DIFFERENTIABLE) != 0.0


EXPANDED = {
    "ppo_loss_reference": lambda inputs, std: ppo_loss_reference(**{**inputs, "std": std}, kl_coef=0.5).loss,
    "gaussian_log_prob": lambda inputs, std: pyfast_ppo.gaussian_log_prob(inputs["actions"], inputs["mean"], std).sum(),
    "gaussian_entropy": lambda inputs, std: pyfast_ppo.gaussian_entropy(std).sum(),
    "gaussian_loss": lambda inputs, std: pyfast_ppo.kl.gaussian_loss(
        inputs["actions"], inputs["mean"], std, inputs["old_log_prob"]
    ).sum(),
    "gaussian_kl": lambda inputs, std: pyfast_ppo.gaussian_kl(
        inputs["mean"], std, inputs["old_mean"], inputs["old_std"]
    ).sum(),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_transforms_of_an_expanded_std(name: str) -> None:
    """torch.func, where one row stands for all: as of a row that is copied."""
    inputs = make_inputs(6, 3, dtypes=dict.fromkeys(NAMES, torch.float64))
    std, direction = inputs["std"], torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def of_view(std: Tensor) -> Tensor:
        return EXPANDED[name](inputs, std.expand(6, 3))

    def of_copy(std: Tensor) -> Tensor:
        return EXPANDED[name](inputs, std.expand(6, 3).clone())

    func = torch.func
    stds = torch.stack([std, 2 * std])
    for transformed in (
        func.grad,
        lambda f: lambda std: func.jvp(f, (std,), (direction,))[1],
        lambda f: lambda std: func.vmap(f)(stds),
        lambda f: lambda std: func.vmap(func.grad(f))(stds),
        func.hessian,
        lambda f: func.jacrev(func.jacrev(f)),
    ):
        torch.testing.assert_close(transformed(of_view)(std), transformed(of_copy)(std))


# --- autocast ---------------------------------------------------------------------------------------------------------


def test_autocast(inputs: Inputs, backend: str, device: str) -> None:
    """A network's bfloat16 output goes through like any other bfloat16 tensor; the arithmetic stays float32."""
    layer = torch.nn.Linear(3, 4, device=device)
    observations = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, torch.bfloat16):
        mean = layer(observations)
        assert mean.dtype == torch.bfloat16
        mean.retain_grad()
        out = ppo_loss(**{**with_leaves(inputs), "mean": mean}, backend=backend)
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    plain, grads = call_with_autograd(ppo_loss, {**inputs, "mean": mean.detach()}, backend=backend)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(mean.grad, grads["mean"])
    assert layer.weight.grad.abs().sum() > 0


# --- torch.compile ----------------------------------------------------------------------------------------------------


def in_a_network(backend: str, case: str) -> Callable[..., tuple]:
    """Something to compile: the loss between other operations, as in a training step."""

    def step(inputs: Inputs, scale: Tensor, coefficient: Tensor) -> tuple:
        std = inputs["std"] * scale
        if case == "expanded std":
            std = std.expand_as(inputs["mean"])
        out = ppo_loss(
            **{**inputs, "mean": inputs["mean"] * scale, "std": std},
            kl_coef=coefficient if case == "coefficient" else 0.5,
            num_original=20 if case == "num_original" else None,
            kl_direction="new_old" if case == "new_old" else "old_new",
            backend=backend,
        )
        return out.loss * 2, tuple(out)

    return step


def shaped_for(case: str, inputs: Inputs) -> Inputs:
    if case == "leading dimensions":
        return {
            name: t.view(10, 5, 4) if t.dim() == 2 else t.view(10, 5, 1) if name in VECTORS else t
            for name, t in inputs.items()
        }
    if case == "small dtypes":
        return {name: t.bfloat16() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
    return inputs


def assert_compiled_is_eager(
    compiled: Callable[..., tuple], step: Callable[..., tuple], inputs: Inputs, coefficient: Tensor
) -> None:
    results = []
    for function in (compiled, step):
        leaves = with_leaves(inputs)
        scale = torch.ones(4, device=coefficient.device, requires_grad=True)
        loss, out = function(leaves, scale, coefficient)
        loss.backward()
        assert not any(t.requires_grad for t in out[1:])
        results.append((loss.detach(), *out[1:], scale.grad, *(leaves[name].grad for name in DIFFERENTIABLE)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    ["plain", "expanded std", "leading dimensions", "num_original", "new_old", "small dtypes", "coefficient"],
)
@compiles
def test_compiled(inputs: Inputs, backend: str, device: str, case: str) -> None:
    """One graph, no break; the same numbers. aot_eager traces and differentiates all that inductor would."""
    torch.compiler.reset()
    inputs = shaped_for(case, inputs)
    coefficient = torch.tensor(0.5, device=device)
    step = in_a_network(backend, case)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_compiled_is_eager(compiled, step, inputs, coefficient)
    with torch.no_grad():
        coefficient.fill_(2.0)  # a compiled step reads it anew
    assert_compiled_is_eager(compiled, step, inputs, coefficient)


@compiles
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_compiled_by_inductor(inputs: Inputs, backend: str, device: str) -> None:
    torch.compiler.reset()
    step = in_a_network(backend, "expanded std")
    assert_compiled_is_eager(torch.compile(step, fullgraph=True), step, inputs, torch.tensor(0.5, device=device))


@compiles
@pytest.mark.parametrize("backend", ["eager"], indirect=True)
def test_compiled_by_inductor_with_a_clip_range_that_changes(inputs: Inputs, backend: str) -> None:
    """The formula, of which inductor may keep an older number."""
    torch.compiler.reset()

    inputs = {name: t.requires_grad_(name in DIFFERENTIABLE) for name, t in inputs.items()}

    def step(clip_param: float) -> tuple[Tensor, ...]:
        out = ppo_loss(**inputs, clip_param=clip_param, backend=backend)
        return (*out, *torch.autograd.grad(out.loss, [inputs[name] for name in DIFFERENTIABLE]))

    compiled = torch.compile(step)
    for clip_param in (0.1, 0.2, 0.3, 0.15, 0.05):
        for got, want in zip(compiled(clip_param), step(clip_param), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


@compiles
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_compiled_for_any_number_of_rows(backend: str, device: str) -> None:
    torch.compiler.reset()
    step = in_a_network(backend, "plain")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (50, 33):
        inputs = make_inputs(num_rows, 4, old_std_per_row=True, device=device)
        assert_compiled_is_eager(compiled, step, inputs, torch.tensor(0.5, device=device))


@compiles
@pytest.mark.parametrize("expanded", [False, True])
def test_compiled_ppo_loss_and_grad(inputs: Inputs, backend: str, expanded: bool) -> None:
    torch.compiler.reset()
    inputs = with_leaves(inputs)

    def call(inputs: Inputs) -> tuple:
        if expanded:
            inputs = {**inputs, "std": (inputs["std"] * 1.0).expand(50, 4)}
        out, grads = ppo_loss_and_grad(**inputs, backend=backend)
        return *(getattr(out, name) for name in out._fields), *grads

    # the eager backend differentiates with torch.autograd, which breaks the graph
    compiled = torch.compile(call, fullgraph=backend != "eager", backend="aot_eager")
    for got, want in zip(compiled(inputs), call(inputs), strict=True):
        assert got.shape == want.shape
        assert not got.requires_grad
        torch.testing.assert_close(got, want)


@compiles
def test_compiled_second_derivative_is_refused(inputs: Inputs, backend: str) -> None:
    torch.compiler.reset()
    leaves = with_leaves(inputs)
    loss = torch.compile(lambda i: ppo_loss(**i, backend=backend).loss, fullgraph=True, backend="aot_eager")(leaves)
    (grad,) = torch.autograd.grad(loss, leaves["mean"], create_graph=True)
    if TORCH < (2, 12):
        assert not grad.requires_grad  # so that it is left out without a word
        return
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (grad.pow(2).sum() + leaves["mean"].sum()).backward()


def op_arguments(inputs: Inputs, backend: str, **options: object) -> list:
    """The operator's arguments by their names in the schema."""
    values: dict = {**inputs, "use_clipped_value_loss": True, "kl_new_old": False, "backend": backend}
    values["num_original"] = inputs["mean"].shape[0]
    for name in ("clip_param", "value_loss_coef", "entropy_coef", "kl_coef"):
        value = options.get(name, DEFAULTS[name])
        values[name] = 0.0 if isinstance(value, Tensor) else value
        values[name + "_tensor"] = value if isinstance(value, Tensor) else None
    values |= {name: value for name, value in options.items() if name not in values}
    return [values[argument.name] for argument in torch.ops.pyfast_ppo.ppo_loss.default._schema.arguments]


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("leaves", [(), DIFFERENTIABLE, ("mean",)], ids=str)
@pytest.mark.parametrize("case", ["plain", "views", "tensor coefficients"])
def test_opcheck(inputs: Inputs, backend: str, device: str, leaves: tuple[str, ...], case: str) -> None:
    """What torch asks of an operator: schema, fake tensors, autograd registration, tracing.

    Not for the eager backend, whose formulas the compiler sees themselves.
    """
    options = {}
    if case == "views":
        inputs = {**inputs, "mean": inputs["mean"].t().contiguous().t(), "std": inputs["std"].repeat(50, 1)[:, :4]}
        inputs["values"] = inputs["values"].repeat(2, 1).t()[:, 0]
    if case == "tensor coefficients":
        names = ("clip_param", "value_loss_coef", "entropy_coef", "kl_coef")
        options = {name: torch.tensor(0.5, device=device) for name in names}
    arguments = op_arguments(with_leaves(inputs, leaves), backend, **options)
    torch.library.opcheck(torch.ops.pyfast_ppo.ppo_loss.default, arguments)


class Loss(torch.nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs).loss


@exports
@pytest.mark.parametrize("function", [ppo_loss, ppo_loss_reference])
@pytest.mark.parametrize("std_per_row", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_number_of_rows(function: Callable, std_per_row: bool, strict: bool) -> None:
    """As many as there are actions, too: whether a std is a row [A] must not be seen by its first size."""
    make = partial(make_inputs, num_actions=3, std_per_row=std_per_row, old_std_per_row=True)
    inputs, more = (tuple(make(num_rows).values()) for num_rows in (6, 3))
    rows = torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows} if t.shape[0] == 6 else {} for t in inputs)
    exported = torch.export.export(Loss(function), inputs, dynamic_shapes=(shapes,), strict=strict).module()
    for changed in (inputs, more):
        torch.testing.assert_close(exported(*changed), function(*changed).loss)


# --- equal bits -------------------------------------------------------------------------------------------------------


def results(inputs: Inputs, backend: str) -> list[Tensor]:
    out, grads = ppo_loss_and_grad(**inputs, kl_coef=0.5, backend=backend)
    return [*out, *grads]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


CASES_OF_BITS = [(5_000, 12, False, True), (3_001, 7, True, True), (20_000, 1, False, False), (700, 300, False, True)]


@pytest.mark.parametrize(("num_rows", "num_actions", "std_per_row", "old_std_per_row"), CASES_OF_BITS)
def test_same_bits(
    backend: str,
    device: str,
    restore_threads: None,
    num_rows: int,
    num_actions: int,
    std_per_row: bool,
    old_std_per_row: bool,
) -> None:
    """Every time, and on every number of threads. Sums of many rows: another order of additions would show."""
    inputs = make_inputs(num_rows, num_actions, std_per_row=std_per_row, old_std_per_row=old_std_per_row, device=device)
    want = results(inputs, backend)
    interpreted = backend == "triton" and device == "cpu"
    for _ in range(1 if interpreted else 5):
        assert_same_bits(results(inputs, backend), want)
    if backend not in NATIVE:
        return  # eager: torch's own sums depend on its threads; triton: has none
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_bits(results(inputs, backend), want)


@pytest.mark.parametrize("backend", NATIVE, indirect=True)  # the interpreter knows one thread
def test_several_python_threads_at_once(backend: str, device: str) -> None:
    cases = [make_inputs(700 + 100 * i, 5, seed=i, old_std_per_row=bool(i % 2), device=device) for i in range(4)]
    wants = [results(inputs, backend) for inputs in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(lambda i: results(cases[i % 4], backend), range(32)), wants * 8, strict=True):
                assert_same_bits(got, want)


FORK = """
import os, sys, time, torch
import pyfast_ppo
from pyfast_ppo import backends

backend = sys.argv[1]
torch.set_num_threads(3)
g = torch.Generator().manual_seed(0)
mean, actions, old_mean = (torch.randn(9000, 6, generator=g) for _ in range(3))
std, old_std = torch.rand(6, generator=g) + 0.5, torch.rand(9000, 6, generator=g) + 0.5
vectors = [torch.randn(9000, generator=g) for _ in range(5)]
rewards, dones = torch.randn(24, 3000, generator=g), torch.rand(24, 3000, generator=g) < 0.1

def results():
    out, grads = pyfast_ppo.ppo_loss_and_grad(
        mean, std, vectors[0], actions, vectors[1] - 8, old_mean, old_std, *vectors[2:], kl_coef=0.5, backend=backend)
    log_prob = pyfast_ppo.gaussian_log_prob(actions, mean, std, backend=backend)
    return [*out, *grads, log_prob, *pyfast_ppo.gae(rewards, rewards, dones, rewards[0], .9, .9, normalize=True,
                                                    backend=backend)]

def bits():  # not torch.equal: that is torch's own parallel region, which does hang in a child
    return [t.numpy().tobytes() for t in results()]

want = bits()  # the parent's threads exist from here on
for generation in range(2):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(bits() == want for _ in range(3)) else 3)
    deadline = time.monotonic() + 30
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            sys.exit("the child hangs")
        time.sleep(0.01)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"the child ended with {os.waitstatus_to_exitcode(status)}")
    assert bits() == want, "the parent after the fork"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_after_fork() -> None:
    """A child of fork() has none of its parent's OpenMP threads; a parallel region would wait for them for ever.

    The eager backend is torch itself, which may hang here; a GPU cannot be used after fork.
    """
    done = subprocess.run([sys.executable, "-c", FORK, "cpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- instruction sets -------------------------------------------------------------------------------------------------

ISA_CHILD = """
import json, sys, torch
import pyfast_ppo
from pyfast_ppo import backends

torch.set_num_threads(2)
folder = sys.argv[1]
cases = torch.load(folder + "/inputs.pt")
saved = []
for inputs, options in cases:
    out, grads = pyfast_ppo.ppo_loss_and_grad(**inputs, **options, backend="cpu")
    saved.append((list(out), list(grads)))
torch.save(saved, folder + "/outputs.pt")
print(json.dumps([row.detail for row in backends.status() if row.name == "cpu"]))
"""

ISAS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}


@pytest.mark.parametrize("isa", ISAS.get(torch.backends.cpu.get_cpu_capability(), ["baseline"]))
def test_each_instruction_set(tmp_path: Path, isa: str) -> None:
    """PYFAST_PPO_ISA lowers what is chosen when the process starts; each one is right by itself."""
    half = {"mean": torch.bfloat16, "std": torch.float16, "values": torch.float16}
    cases = []
    for i, (num_rows, num_actions) in enumerate([(1, 1), (700, 12), (300, 5), (40, 70), (2100, 1)]):
        for std_per_row, old_std_per_row in ((False, False), (False, True), (True, True)):
            for dtypes in ({}, {"values": torch.float64}, half):
                shape = {"std_per_row": std_per_row, "old_std_per_row": old_std_per_row, "dtypes": dtypes}
                options = {"kl_coef": 0.5, "kl_direction": ("old_new", "new_old")[i % 2]}
                cases.append((make_inputs(num_rows, num_actions, i, **shape), options))
    torch.save(cases, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", ISA_CHILD, str(tmp_path)],
        env={**os.environ, "PYFAST_PPO_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"({isa})" in json.loads(done.stdout)[0]
    assert "PYFAST_PPO_ISA" not in done.stderr
    for (inputs, options), (out, grads) in zip(cases, torch.load(tmp_path / "outputs.pt"), strict=True):
        got = pyfast_ppo.PPOLossOutput(out[0], torch.stack(out))
        assert_matches(got, dict(zip(DIFFERENTIABLE, grads, strict=True)), inputs, **options)


def test_unknown_instruction_set() -> None:
    code = "import warnings; warnings.simplefilter('error'); from pyfast_ppo.backends import cpu"
    environment = {**os.environ, "PYFAST_PPO_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "PYFAST_PPO_ISA='AVX2' cannot be had" in done.stderr
    assert "'baseline', 'avx2' or 'avx512'" in done.stderr


def test_cpu_backend_is_among_those_tested() -> None:
    """A broken build must not pass by testing the eager formulas alone."""
    assert "cpu" in [row.name for row in backends.status() if row.available]
