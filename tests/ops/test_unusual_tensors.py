"""Tensors whose numbers do not simply stand in their memory, and a default device that is not theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed
from backends_here import NATIVE
from ppo_loss_oracle import DIFFERENTIABLE, NAMES, make_inputs
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from pyfast_ppo import gae, gaussian_entropy, gaussian_kl, gaussian_log_prob, kl, ppo_loss, ppo_loss_and_grad


def operations(backend: str, device: str) -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], dict[str, Tensor]]]:
    """Each by its name: a function that returns tensors, and its arguments."""
    x = make_inputs(6, 3, device=device)
    mean, std, old_mean, old_std = (x[name] for name in ("mean", "std", "old_mean", "old_std"))
    actions, old_log_prob = x["actions"], x["old_log_prob"]
    rollout = {"rewards": mean, "values": actions, "dones": mean > 1.0, "last_values": mean[0].clone()}
    rollout |= {"time_outs": mean > 1.5, "final_values": old_mean}

    def loss(**inputs: Tensor) -> tuple[Tensor, ...]:
        out, grads = ppo_loss_and_grad(**inputs, kl_coef=0.5, backend=backend)
        return *out, *grads

    def with_backward(function: Callable[..., Tensor], names: str) -> Callable[..., tuple[Tensor, ...]]:
        def run(**inputs: Tensor) -> tuple[Tensor, ...]:
            inputs = {name: t.detach().requires_grad_(name in names.split()) for name, t in inputs.items()}
            value = function(**inputs, backend=backend)
            return value, *torch.autograd.grad(value.sum(), [inputs[name] for name in names.split()])

        return run

    distribution = {"actions": actions, "mean": mean, "std": std}
    pair = {"mean_p": mean, "std_p": std, "mean_q": old_mean, "std_q": old_std}
    return {
        "ppo_loss_and_grad": (loss, x),
        "ppo_loss": (with_backward(lambda **inputs: ppo_loss(**inputs).loss, " ".join(DIFFERENTIABLE)), x),
        "gae": (lambda **inputs: gae(**inputs, gamma=0.9, lam=0.9, normalize=True, backend=backend), rollout),
        "gaussian_log_prob": (with_backward(gaussian_log_prob, "actions mean std"), distribution),
        "gaussian_entropy": (with_backward(gaussian_entropy, "std"), {"std": std}),
        "gaussian_kl": (with_backward(gaussian_kl, "mean_p std_p mean_q std_q"), pair),
        "gaussian_loss": (
            with_backward(kl.gaussian_loss, "mean std"),
            {**distribution, "old_log_prob": old_log_prob},
        ),
    }


OPERATIONS = list(operations("eager", "cpu"))


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest, backend: str, device: str) -> tuple:
    return operations(backend, device)[request.param]


def test_default_device(operation: tuple) -> None:
    """What a kernel writes lies where its inputs lie, whatever torch.set_default_device says."""
    function, inputs = operation
    want = function(**inputs)
    with torch.device("meta"):
        got = function(**inputs)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


# --- tensors without memory -------------------------------------------------------------------------------------------


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def freed_view(t: Tensor) -> Tensor:
    whole = torch.stack([t, t])
    part = whole[1]
    whole.untyped_storage().resize_(0)
    return part


def zero_tensor(t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)


def wrapper(t: Tensor) -> Tensor:
    return TwoTensor(t, t)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are made on the CPU")
@pytest.mark.parametrize("backend", [name for name in NATIVE if name != "eager"], indirect=True)
@pytest.mark.parametrize("without_memory", [freed, freed_view, zero_tensor, fake, wrapper])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_without_memory(operation: tuple, backend: str, without_memory: Callable[[Tensor], Tensor]) -> None:
    """Named, and nothing is read from address 0."""
    function, inputs = operation
    for name in inputs:
        message = None
        try:
            function(**{**inputs, name: without_memory(inputs[name])})
        except ValueError as error:
            message = str(error)  # not the error, from which pytest would print the tensor
        assert message is not None
        assert message.startswith(f"{name} has no memory of its own")
        assert message.endswith("or its storage was freed")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_tensor_of_several_processes() -> None:
    """A DTensor. Its local tensor is taken, and the eager backend takes it as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        std = distribute_tensor(torch.full((3,), 0.5), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(ValueError, match=r"^std has no memory of its own: of a DTensor pass the local tensor"):
            gaussian_entropy(std)
        want = gaussian_entropy(torch.full((3,), 0.5))
        torch.testing.assert_close(gaussian_entropy(std.to_local()), want)
        torch.testing.assert_close(gaussian_entropy(std, backend="eager").to_local(), want)
    finally:
        torch.distributed.destroy_process_group()


# --- tensors that are not dense ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are made on the CPU")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=lambda f: f.__name__)
def test_not_dense(operation: tuple, sparse: Callable[[Tensor], Tensor]) -> None:
    function, inputs = operation
    for name, t in inputs.items():
        if t.dtype == torch.bool and sparse is torch.Tensor.to_mkldnn:  # which has none
            continue
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got layout torch\.\w+"):
            function(**{**inputs, name: sparse(t)})


# --- torch's negative bit ---------------------------------------------------------------------------------------------


def negated(t: Tensor) -> Tensor:
    """Equal to ``t``; the memory holds -t."""
    lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert lazy.is_neg()
    return lazy


def test_negative_bit(operation: tuple) -> None:
    """z.conj() and its imaginary part write nothing: the sign is a bit of the tensor."""
    function, inputs = operation
    want = function(**inputs)
    for name, t in inputs.items():
        if t.dtype == torch.bool:
            continue
        for one, other in zip(function(**{**inputs, name: negated(t)}), want, strict=True):
            assert torch.equal(one, other), name


def test_negative_bit_of_one_row(backend: str, device: str) -> None:
    """Here a view of complex numbers is contiguous."""
    inputs = make_inputs(1, 1, device=device)
    want = ppo_loss_and_grad(**inputs, backend=backend)
    for name in NAMES:
        out, grads = ppo_loss_and_grad(**{**inputs, name: negated(inputs[name])}, backend=backend)
        for one, other in zip([*out, *grads], [*want[0], *want[1]], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("name", ["clip_param", "value_loss_coef", "entropy_coef", "kl_coef"])
def test_negative_bit_of_a_coefficient(backend: str, device: str, name: str) -> None:
    inputs, coefficient = make_inputs(6, 3, device=device), torch.tensor(0.3, device=device)
    want = ppo_loss(**inputs, **{name: coefficient}, backend=backend)
    got = ppo_loss(**inputs, **{name: negated(coefficient)}, backend=backend)
    assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("name", ["gaussian_log_prob", "gaussian_entropy", "gaussian_kl", "gaussian_loss"])
def test_negative_bit_of_the_incoming_gradient(backend: str, device: str, name: str) -> None:
    inputs = {key: t.requires_grad_(key != "old_log_prob") for key, t in operations(backend, device)[name][1].items()}
    functions = {f.__name__: f for f in (gaussian_log_prob, gaussian_entropy, gaussian_kl, kl.gaussian_loss)}
    value = functions[name](**{**inputs, "std": inputs["std"].expand(6, 3)} if "std" in inputs else inputs)
    leaves = [t for key, t in inputs.items() if t.requires_grad and not (key == "actions" and name == "gaussian_loss")]
    incoming = torch.linspace(-1.0, 1.0, 6, device=device)
    want = torch.autograd.grad(value, leaves, incoming, retain_graph=True)
    for one, other in zip(torch.autograd.grad(value, leaves, negated(incoming)), want, strict=True):
        assert torch.equal(one, other)


def test_negative_bit_under_torch_compile() -> None:
    torch.compiler.reset()
    inputs = make_inputs(6, 3)
    rows = {"mean": negated(inputs["mean"]), "actions": inputs["actions"], "std": inputs["std"]}
    compiled = torch.compile(lambda x: gaussian_log_prob(**x) + gaussian_log_prob(**x), backend="aot_eager")
    torch.testing.assert_close(compiled(rows), 2 * gaussian_log_prob(**rows))
