"""Bias and activation of hidden layers in one pass, and their gradients in another, by each backend that has them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from backends_here import AVAILABLE
from torch import Tensor

from pyfast_ppo import backends
from pyfast_ppo.ops.hidden_layers import hidden_layers

FUSING = [row.name for row in AVAILABLE if backends._module(row.name).FUSES_UPDATE]
# tails of every kind; more rows than blocks of a kernel take at once; more columns than blocks
SHAPES = [(1, 1), (3, 7), (129, 16), (1000, 19), (257, 128), (300, 130), (5000, 3), (50_000, 4), (2, 20_000)]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "relu": torch.relu, "tanh": torch.tanh}
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {  # from what the function gave, in float64
    "elu": lambda y: torch.where(y > 0.0, 1.0, y + 1.0),
    "relu": lambda y: (y > 0.0).double(),
    "tanh": lambda y: (1.0 - y) * (1.0 + y),
}


@pytest.fixture(params=FUNCTIONS)
def activation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=FUSING)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(backend: str, device: str) -> ModuleType:
    return backends.select(backend, torch.device(device))


def drawn(*shape: int, device: str, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (spread * torch.randn(shape, generator=generator)).to(device)


def unaligned(t: Tensor) -> Tensor:
    """The same numbers, 4 bytes behind a multiple of 16."""
    memory = t.new_empty(t.numel() + 4)
    first = next(i for i in range(4) if memory[i:].data_ptr() % 16 == 4)
    return memory[first : first + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_against_float64(
    kernels: ModuleType, activation: str, device: str, shape: tuple[int, int]
) -> None:
    """Within 4e-7 of each value, and of each column's sum of magnitudes."""
    x, grad = drawn(2, *shape, device=device, spread=4.0)
    bias = torch.zeros(shape[1], device=device) if shape[0] > 500 else drawn(shape[1], device=device)
    exact = FUNCTIONS[activation]((x + bias).double())
    y = kernels.add_bias_and_activate(activation, x.clone(), bias)
    assert ((y - exact).abs() <= 4e-7 * exact.abs()).all()
    grad_x, grad_bias = kernels.add_bias_and_activate_backward(activation, grad, y)
    exact_grad = grad.double() * DERIVATIVES[activation](y.double())
    near = {"tanh": 1.9e-7}.get(activation, 1.2e-7)  # roundings of each: three, two or none
    assert ((grad_x - exact_grad).abs() <= near * grad.abs()).all()
    assert ((grad_bias - exact_grad.sum(0)).abs() <= 4e-7 * exact_grad.abs().sum(0)).all()
    in_place, same_bias = kernels.add_bias_and_activate_backward(activation, grad, y, in_place=True)
    assert in_place is grad
    assert torch.equal(in_place, grad_x)
    assert torch.equal(same_bias, grad_bias)


@pytest.mark.parametrize("shape", [(300, 128), (131, 20), (4, 4)])
def test_the_same_bits_wherever_tensors_begin(
    kernels: ModuleType, activation: str, device: str, shape: tuple[int, int]
) -> None:
    """Whether four neighbours can be read at a time or not."""
    x, grad = drawn(2, *shape, device=device)
    bias = drawn(shape[1], device=device)
    y = kernels.add_bias_and_activate(activation, x.clone(), bias)
    grads = kernels.add_bias_and_activate_backward(activation, grad, y)
    for change in (unaligned, torch.clone):
        assert torch.equal(kernels.add_bias_and_activate(activation, change(x), unaligned(bias)), y)
        assert torch.equal(kernels.add_bias_and_activate(activation, unaligned(x), change(bias)), y)
        for of_grad, of_y in ((unaligned, change), (change, unaligned)):
            found = kernels.add_bias_and_activate_backward(activation, of_grad(grad), of_y(y), in_place=True)
            assert all(map(torch.equal, found, grads))


SLOPES = {  # at -20, -1e-20, -0, 0, 1e-20, 1e30 and infinity
    "elu": [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "relu": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    "tanh": [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
}


def test_the_smallest_and_the_largest(kernels: ModuleType, activation: str, device: str) -> None:
    x = torch.tensor([[-torch.inf, -1e30, -100.0, -20.0, -1e-20, -0.0, 0.0, 1e-20, 1e30, torch.inf, torch.nan]])
    y = kernels.add_bias_and_activate(activation, x.clone().to(device), torch.zeros(x.shape[1], device=device))
    assert torch.equal(y[:, :-1].cpu(), FUNCTIONS[activation](x)[:, :-1])
    assert y[0, -1].isnan()
    grad = torch.ones_like(y)
    grad_x, _ = kernels.add_bias_and_activate_backward(activation, grad, y)
    assert torch.equal(grad_x[0, 3:10].cpu(), torch.tensor(SLOPES[activation]))
    as_torch = {"elu": torch.nan, "relu": 1.0, "tanh": torch.nan}[activation]  # at NaN
    torch.testing.assert_close(grad_x[0, -1].cpu(), torch.tensor(as_torch), equal_nan=True)


@pytest.mark.parametrize("activation", ["elu", "tanh"])
def test_near_zero_nothing_cancels(kernels: ModuleType, activation: str, device: str) -> None:
    near = torch.logspace(-10, 1.2, 4000, device=device)
    for x in (near.unsqueeze(0), -near.unsqueeze(0)):
        y = kernels.add_bias_and_activate(activation, x.clone(), torch.zeros(x.shape[1], device=device))
        exact = FUNCTIONS[activation](x.double())
        assert ((y - exact) / exact).abs().max() < 4e-7


def test_tanh_stays_within_its_bounds(kernels: ModuleType, device: str) -> None:
    x = torch.linspace(0.0, 30.0, 100_001, device=device).unsqueeze(0)
    y = kernels.add_bias_and_activate("tanh", x.clone(), torch.zeros(x.shape[1], device=device))
    assert (y <= 1.0).all()
    assert (y[0, 1:] >= y[0, :-1] - 1.2e-7).all()
    assert torch.equal(kernels.add_bias_and_activate("tanh", -x, torch.zeros(x.shape[1], device=device)), -y)


@pytest.mark.parametrize("num_cols", [64, 67])
def test_what_is_not_finite_stays_in_its_column(
    kernels: ModuleType, activation: str, device: str, num_cols: int
) -> None:
    """And shows there, in whichever row it is: of the incoming gradient, or of the layer's output."""
    faults = {3: torch.nan, 40: torch.inf, 41: -torch.inf}
    y, grad = drawn(2, 700, num_cols, device=device)
    y = FUNCTIONS[activation](y.abs())  # where the slope is not 0
    for row, (col, fault) in zip((0, 333, 699), faults.items(), strict=True):
        grad[row, col] = fault
    (grad if activation == "relu" else y)[500, 50] = torch.nan
    grad_x, grad_bias = kernels.add_bias_and_activate_backward(activation, grad, y)
    for row, (col, fault) in zip((0, 333, 699), faults.items(), strict=True):
        for found in (grad_x[row, col], grad_bias[col]):
            torch.testing.assert_close(found.cpu(), torch.tensor(fault), equal_nan=True)
    assert grad_x[500, 50].isnan()
    assert grad_bias[50].isnan()
    assert int((~grad_x.isfinite()).sum()) == int((~grad_bias.isfinite()).sum()) == 4


def test_layers_after_each_other_against_float64(kernels: ModuleType, activation: str, device: str) -> None:
    """As autograd has them."""
    sizes = [6, 33, 16, 8]
    x = drawn(500, sizes[0], device=device).requires_grad_()
    parameters = []
    for inputs, outputs in pairwise(sizes):
        parameters.append(drawn(outputs, inputs, device=device, spread=inputs**-0.5).requires_grad_())
        parameters.append(drawn(outputs, device=device).requires_grad_())
    leaves = [x, *parameters]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = exact_leaves[0]
    for weight, bias in zip(exact_leaves[1::2], exact_leaves[2::2], strict=True):
        exact = FUNCTIONS[activation](F.linear(exact, weight, bias))
    out = hidden_layers(kernels, activation, *leaves)
    grad = drawn(500, sizes[-1], device=device)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(exact, exact_leaves, grad.double())
    for found, wanted in zip(ours, theirs, strict=True):
        assert (found - wanted).abs().max() < 3e-6 * wanted.abs().max()


def test_autocast(kernels: ModuleType, device: str) -> None:
    """Products stay float32 forward and backward, as the kernels take them."""
    leaves = [drawn(*shape, device=device).requires_grad_() for shape in ((40, 6), (33, 6), (33,), (16, 33), (16,))]
    grad = drawn(40, 16, device=device)
    out = hidden_layers(kernels, "elu", *leaves)
    want = [out, *torch.autograd.grad(out, leaves, grad)]
    with torch.autocast(device, torch.bfloat16):
        under = hidden_layers(kernels, "elu", *leaves)
        got = [under, *torch.autograd.grad(under, leaves, grad)]
        assert torch.is_autocast_enabled(device)
    assert all(map(torch.equal, got, want))


def test_what_kernels_do_not_take(kernels: ModuleType, device: str) -> None:
    """Memory is read and written by address: anything else would be read as float32."""
    x, weight, bias = drawn(40, 6, device=device), drawn(8, 6, device=device), drawn(8, device=device)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=r"^x must be contiguous float32 of 320 elements"):
            hidden_layers(kernels, "elu", *(t.to(dtype) for t in (x, weight, bias)))
        with pytest.raises(ValueError, match=r"^bias must be contiguous float32 of 8 elements"):
            hidden_layers(kernels, "elu", x, weight, bias.to(dtype))
    with pytest.raises(ValueError, match=r"^bias must be contiguous float32 of 8 elements"):
        hidden_layers(kernels, "elu", x, weight, drawn(16, device=device)[::2])
    with pytest.raises(ValueError, match=r"^bias must be contiguous float32 of 8 elements"):
        hidden_layers(kernels, "elu", x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"^the activation must be elu, relu or tanh, got gelu"):
        hidden_layers(kernels, "gelu", x, weight, bias)
    y, grad = drawn(2, 40, 8, device=device)
    for wrong in (grad.double(), grad.bfloat16(), grad.t().contiguous().t(), grad[:20]):
        with pytest.raises(ValueError, match=r"^the incoming gradient must be contiguous float32 of 320 elements"):
            kernels.add_bias_and_activate_backward("elu", wrong, y)


@pytest.mark.skipif("cpu" not in FUSING, reason="the C++ kernels are not here")
def test_the_same_bits_for_any_number_of_threads(activation: str, restore_threads: None) -> None:
    x, grad = drawn(2, 5000, 37, device="cpu")
    kernels, results = backends.select("cpu", torch.device("cpu")), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = kernels.add_bias_and_activate(activation, x.clone(), torch.ones(37))
        results.append((y, *kernels.add_bias_and_activate_backward(activation, grad, y)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
