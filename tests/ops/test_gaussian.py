"""Log-probability, entropy and KL against torch.distributions in float64, and against exact values near KL = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mpmath
import pytest
import torch
from backends_here import NATIVE, rows_that_it_can
from hypothesis import given, settings
from hypothesis import strategies as st
from second_derivative import WAYS
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyfast_ppo import gaussian_entropy, gaussian_kl, gaussian_log_prob

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Operation(NamedTuple):
    function: Callable[..., Tensor]
    names: tuple[str, ...]
    stock: Callable[..., Tensor]


def normal(mean: Tensor, std: Tensor) -> Normal:
    return Normal(mean, std, validate_args=False)


OPERATIONS = {
    "log_prob": Operation(
        gaussian_log_prob, ("actions", "mean", "std"), lambda a, mean, std: normal(mean, std).log_prob(a).sum(-1)
    ),
    "entropy": Operation(gaussian_entropy, ("std",), lambda std: normal(torch.zeros_like(std), std).entropy().sum(-1)),
    "kl": Operation(
        gaussian_kl,
        ("mean_p", "std_p", "mean_q", "std_q"),
        lambda mean_p, std_p, mean_q, std_q: kl_divergence(normal(mean_p, std_p), normal(mean_q, std_q)).sum(-1),
    ),
}


@pytest.fixture(scope="session", params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Operation:
    return OPERATIONS[request.param]


def make_arguments(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    std_per_row: tuple[bool, bool] = (False, False),
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4,
    device: str = "cpu",
) -> list[Tensor]:
    """Means within a few standard deviations of each other; for the entropy, whose shape is that of std, [N, A]."""
    g = torch.Generator().manual_seed(seed)
    arguments, stds_seen = [], 0
    for name, dtype in zip(names, dtypes, strict=False):
        if name.startswith("std"):
            per_row = std_per_row[stds_seen] or names == ("std",)
            stds_seen += 1
            t = torch.exp(0.5 * torch.randn(shape if per_row else shape[-1:], generator=g, dtype=torch.float64))
        else:
            t = torch.randn(shape, generator=g, dtype=torch.float64)
        arguments.append(t.to(dtype).to(device))
    return arguments


def expected(operation: Operation, arguments: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Value, and the gradient of each argument, a shared row's before its sum over rows. In float64."""
    shape = max((t.shape for t in arguments), key=len)
    leaves = [t.detach().double().cpu().expand(shape).clone().requires_grad_() for t in arguments]
    value = operation.stock(*leaves)
    value.backward(grad.double().cpu())
    return value.detach(), [leaf.grad for leaf in leaves]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, eps: float, scale: float | None = None) -> None:
    """To rounding: of the arithmetic, relative to the largest terms, and of the dtype that it is stored in."""
    assert got.shape == want.shape
    assert got.dtype == dtype
    scale = float(want.abs().max()) if scale is None else scale
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    allowed = (16 * eps + EPS[dtype]) * want.abs() + 16 * eps * scale + smallest
    error = (got.detach().double().cpu() - want).abs()
    assert (error <= allowed).all(), f"off by {error.max()}, allowed {allowed.flatten()[error.argmax()]}"


def check(operation: Operation, arguments: list[Tensor], backend: str, seed: int = 0) -> None:
    """Value and all gradients, with a gradient of random sign coming in."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    value = operation.function(*leaves, backend=backend)
    eps = EPS[torch.float64 if any(t.dtype == torch.float64 for t in arguments) else torch.float32]
    arithmetic = torch.float64 if eps == EPS[torch.float64] else torch.float32
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(arithmetic)
    value.backward(grad.to(value.device))
    want, grads = expected(operation, arguments, grad)
    num_actions = arguments[0].shape[-1]
    assert_close(value, want, arithmetic, eps, scale=float(want.abs().max()) + num_actions)
    for leaf, rows in zip(leaves, grads, strict=True):
        if leaf.shape == rows.shape:
            assert_close(leaf.grad, rows, leaf.dtype, eps)
        else:  # the sum over rows is as accurate as its terms
            per_action = rows.flatten(0, -2)
            assert_close(leaf.grad, per_action.sum(0), leaf.dtype, eps, scale=float(per_action.abs().sum(0).max()))


DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(
    num_rows=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 1030])),
    num_actions=st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 300])),
    std_per_row=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(DTYPES, DTYPES, DTYPES, DTYPES),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_values_and_gradients(
    backend: str,
    device: str,
    operation: Operation,
    num_rows: int,
    num_actions: int,
    std_per_row: tuple[bool, bool],
    dtypes: tuple[torch.dtype, ...],
    seed: int,
) -> None:
    """Each gradient in its own tensor's dtype and no coarser: a bfloat16 mean must not round the actions' gradient."""
    shape = (rows_that_it_can(backend, num_rows, num_actions), num_actions)
    arguments = make_arguments(operation.names, shape, seed, std_per_row=std_per_row, dtypes=dtypes, device=device)
    check(operation, arguments, backend, seed)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 1), (1, 1, 7)])
@pytest.mark.parametrize("std_per_row", [False, True])
def test_leading_dimensions(
    backend: str, device: str, operation: Operation, shape: tuple[int, ...], std_per_row: bool
) -> None:
    arguments = make_arguments(operation.names, shape, std_per_row=(std_per_row, not std_per_row), device=device)
    check(operation, arguments, backend)


def buffered(t: Tensor) -> Tensor:
    """The same numbers as a view with gaps of NaN in both dimensions."""
    buffer = torch.full((t.shape[0] + 1, 2 * t.shape[1] + 1), float("nan"), dtype=t.dtype, device=t.device)
    buffer[1:, 1::2] = t
    return buffer[1:, 1::2]


@pytest.mark.parametrize(
    "layout", [buffered, lambda t: t.t().contiguous().t(), lambda t: t[:1].expand_as(t)], ids=["gaps", "t", "expanded"]
)
@pytest.mark.parametrize("rows", [1, 2, 19])
def test_views(backend: str, device: str, operation: Operation, layout: Callable, rows: int) -> None:
    arguments = make_arguments(operation.names, (rows, 6), std_per_row=(True, True), device=device)
    check(operation, [layout(t) for t in arguments], backend)


def test_slices_that_cannot_be_flattened(backend: str, device: str, operation: Operation) -> None:
    arguments = make_arguments(operation.names, (4, 9, 3), std_per_row=(True, True), device=device)
    check(operation, [t[:, 2:7] for t in arguments], backend)


def test_expanded_incoming_gradient(backend: str, device: str, operation: Operation) -> None:
    """What .sum() sends back is one number with strides of 0."""
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(True, True), device=device)
    leaves = [t.requires_grad_() for t in arguments]
    operation.function(*leaves, backend=backend).sum().backward()
    _, grads = expected(operation, arguments, torch.ones(20))
    for leaf, want in zip(leaves, grads, strict=True):
        assert_close(leaf.grad, want, torch.float32, EPS[torch.float32])


def test_expanded_std(backend: str, device: str, operation: Operation) -> None:
    """What an expanded std was expanded from gets its gradient."""
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(True, True), device=device)
    rows = {}
    for i, name in enumerate(operation.names):
        if name.startswith("std"):
            rows[i] = arguments[i][0].clone().requires_grad_()
            arguments[i] = (rows[i] * 1.0).expand(20, 3)
    operation.function(*arguments, backend=backend).sum().backward()
    _, grads = expected(operation, arguments, torch.ones(20))
    for i, row in rows.items():
        scale = float(grads[i].abs().sum(0).max())
        assert_close(row.grad, grads[i].sum(0), torch.float32, EPS[torch.float32], scale)


def test_the_rows_of_an_expanded_std_have_gradients_of_their_own(
    backend: str, device: str, operation: Operation
) -> None:
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(True, True), device=device)
    views = []
    for i, name in enumerate(operation.names):
        if name.startswith("std"):
            arguments[i] = (arguments[i][0].clone().requires_grad_() * 1.0).expand(20, 3)
            views.append(i)
    value = operation.function(*arguments, backend=backend).sum()
    got = torch.autograd.grad(value, [arguments[i] for i in views])
    _, grads = expected(operation, arguments, torch.ones(20))
    for i, grad in zip(views, got, strict=True):
        assert_close(grad, grads[i], torch.float32, EPS[torch.float32])


@pytest.mark.parametrize("which", range(4))
def test_one_argument_requires_a_gradient(backend: str, device: str, operation: Operation, which: int) -> None:
    arguments = make_arguments(operation.names, (20, 3), device=device)
    if which >= len(arguments):
        which = 0
    arguments[which].requires_grad_()
    operation.function(*arguments, backend=backend).sum().backward()
    _, grads = expected(operation, arguments, torch.ones(20))
    want = grads[which] if arguments[which].dim() == 2 else grads[which].sum(0)
    scale = float(grads[which].abs().sum(0).max())
    assert_close(arguments[which].grad, want, torch.float32, EPS[torch.float32], scale)


def test_nothing_requires_a_gradient(backend: str, device: str, operation: Operation) -> None:
    arguments = make_arguments(operation.names, (20, 3), device=device)
    assert not operation.function(*arguments, backend=backend).requires_grad


def test_subnormal_float16_where_the_process_flushes_subnormals(device: str) -> None:
    """They are normal numbers in float32."""
    std = torch.tensor([[5e-5, 6e-8, 1.0, 2.0**-14]], dtype=torch.float16, device=device)
    want = gaussian_entropy(std.float(), backend="eager")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        assert torch.allclose(gaussian_entropy(std), want)
    finally:
        torch.set_flush_denormal(False)


def test_entropy_of_a_row(backend: str, device: str) -> None:
    """[A] gives one number."""
    std = torch.tensor([0.5, 1.0, 3.0], device=device, requires_grad=True)
    entropy = gaussian_entropy(std, backend=backend)
    assert entropy.shape == ()
    entropy.backward()
    torch.testing.assert_close(entropy, normal(std, std).entropy().sum())
    torch.testing.assert_close(std.grad, 1 / std.detach())


# --- KL near 0 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", range(-6, 0))
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("std", [1.0, 0.37, 12.0])
@pytest.mark.parametrize("shift", [0.0, 1e-4])
def test_kl_is_accurate_near_zero(
    backend: str, device: str, exponent: int, sign: int, std: float, shift: float
) -> None:
    """In float32: relative to the KL itself, not to 1. The gradients as well."""
    std_q = torch.tensor([[std]])
    std_p = (std_q.double() * (1.0 + sign * 10.0**exponent)).float()
    mean_p, mean_q = torch.tensor([[shift]]), torch.zeros(1, 1)
    leaves = [t.to(device).requires_grad_() for t in (mean_p, std_p, mean_q, std_q)]
    kl = gaussian_kl(*leaves, backend=backend)
    kl.backward()
    with mpmath.workdps(60):
        p, q, m = (mpmath.mpf(t.item()) for t in (std_p, std_q, mean_p))
        want = mpmath.log(q / p) + (p * p + m * m) / (2 * q * q) - mpmath.mpf(1) / 2
        want_grads = [m / q**2, p / q**2 - 1 / p, -m / q**2, 1 / q - (p * p + m * m) / q**3]
    assert kl.item() >= 0.0
    assert abs(kl.item() - want) < 1e-5 * want
    for leaf, want_grad in zip(leaves, want_grads, strict=True):
        assert abs(float(leaf.grad) - want_grad) <= 1e-5 * abs(want_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kl_is_zero_at_equality(backend: str, device: str, dtype: torch.dtype) -> None:
    mean, std = make_arguments(
        ("mean", "std"), (500, 9), std_per_row=(True, True), dtypes=(dtype, dtype), device=device
    )
    leaves = [t.clone().requires_grad_() for t in (mean, std, mean, std)]
    kl = gaussian_kl(*leaves, backend=backend)
    kl.sum().backward()
    assert not kl.any()
    assert not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("ratio", [1e-30, 1e-16, 1e-6, 1e-2, 0.5, 0.70, 0.72, 1.40, 1.42, 2.0, 1e2, 1e6, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_far_from_zero(backend: str, device: str, ratio: float, dtype: torch.dtype) -> None:
    """What is exact near 1 must not cancel far from it: σ_p/σ_q - 1 has few digits of a small ratio, or none."""
    std_p = torch.tensor([[ratio]], dtype=dtype, device=device, requires_grad=True)
    std_q, zero = torch.ones_like(std_p), torch.zeros_like(std_p)
    kl = gaussian_kl(zero, std_p, zero, std_q, backend=backend)
    kl.backward()
    r = std_p.detach().double().cpu()
    rel = 1e-5 if dtype == torch.float32 else 1e-12
    assert kl.item() == pytest.approx((0.5 * (r * r - 1.0) - r.log()).item(), rel=rel)
    assert std_p.grad.item() == pytest.approx((r - 1 / r).item(), rel=rel)


# --- faults, PyTorch --------------------------------------------------------------------------------------------------


NO_STD = [float("nan"), float("inf"), 0.0, -1.0]


@pytest.mark.parametrize("value", NO_STD)
def test_std_that_is_not_positive_shows_in_its_row(
    backend: str, device: str, operation: Operation, value: float
) -> None:
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(True, True), device=device)
    good = operation.function(*arguments, backend=backend)
    for name, t in zip(operation.names, arguments, strict=True):
        if name.startswith("std"):
            bad = operation.function(*(u if u is not t else with_one(t, value) for u in arguments), backend=backend)
            assert not torch.isfinite(bad[11])
            assert torch.equal(bad[:11], good[:11])
            assert torch.equal(bad[12:], good[12:])


@pytest.mark.parametrize("value", NO_STD)
def test_std_that_is_not_positive_shows_in_its_gradient(
    backend: str, device: str, operation: Operation, value: float
) -> None:
    """Of a log-probability, an entropy and a KL alike: 1/σ of σ = -1 would be a number."""
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(True, True), device=device)

    def gradients(changed: int | None = None) -> list[Tensor]:
        leaves = [with_one(t, value) if i == changed else t.clone() for i, t in enumerate(arguments)]
        total = operation.function(*(leaf.requires_grad_() for leaf in leaves), backend=backend).sum()
        return list(torch.autograd.grad(total, leaves))

    good = gradients()
    for i, name in enumerate(operation.names):
        if name.startswith("std"):
            bad = gradients(changed=i)
            assert torch.isnan(bad[i][11, 1])
            others = torch.ones(20, 3, dtype=torch.bool)
            others[11, 1] = False
            for one, other in zip(bad, good, strict=True):
                assert torch.equal(one[others], other[others])


def with_one(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t[11, 1] = value
    return t


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("expanded_std", [False, True])
@pytest.mark.parametrize("scaled_by_a_parameter", [False, True])
def test_second_derivative_is_refused(
    backend: str, device: str, operation: Operation, way: Callable, expanded_std: bool, scaled_by_a_parameter: bool
) -> None:
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(not expanded_std,) * 2, device=device)
    factor = torch.ones((), device=device, requires_grad=scaled_by_a_parameter)
    for i, x in enumerate(arguments):

        def function(x: Tensor, i: int = i) -> Tensor:
            x = x.expand(20, 3) if expanded_std and x.dim() == 1 else x * 1.0
            value = operation.function(*arguments[:i], x, *arguments[i + 1 :], backend=backend)
            return factor * value.sum()

        with pytest.raises(RuntimeError, match="no second derivative"):
            way(function, x.requires_grad_())


def test_eager_has_a_second_derivative(operation: Operation) -> None:
    arguments = make_arguments(operation.names, (4, 3), std_per_row=(True, True), dtypes=(torch.float64,) * 4)
    arguments = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradgradcheck(lambda *args: operation.function(*args, backend="eager"), arguments)


def test_gradients_by_finite_differences(backend: str, device: str, operation: Operation) -> None:
    arguments = make_arguments(
        operation.names, (4, 3), std_per_row=(False, True), dtypes=(torch.float64,) * 4, device=device
    )
    arguments = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(lambda *args: operation.function(*args, backend=backend), arguments)


@pytest.mark.parametrize("backend", NATIVE, indirect=True)
def test_batch_of_gradients(backend: str, device: str, operation: Operation) -> None:
    """By the eager backend; a kernel, which takes one, says so."""
    leaves = [t.requires_grad_() for t in make_arguments(operation.names, (6, 3), device=device)]
    value = operation.function(*leaves, backend=backend)
    factors = torch.randn(4, *value.shape, generator=torch.Generator().manual_seed(0)).to(device)
    if backend == "eager":
        got = torch.autograd.grad(value, leaves, factors, is_grads_batched=True, retain_graph=True)
        for i, factor in enumerate(factors):
            for batch, want in zip(got, torch.autograd.grad(value, leaves, factor, retain_graph=True), strict=True):
                torch.testing.assert_close(batch[i], want)
        return
    message = r"^the incoming gradient has no memory of its own: .* a batch of gradients .* need backend='eager'"
    with pytest.raises(ValueError, match=message):
        torch.autograd.grad(value, leaves, factors, is_grads_batched=True)


def test_compiled(backend: str, device: str, operation: Operation) -> None:
    torch.compiler.reset()
    leaves = [t.requires_grad_() for t in make_arguments(operation.names, (20, 3), device=device)]
    compiled = torch.compile(
        lambda *args: operation.function(*args, backend=backend) * 2, fullgraph=True, backend="aot_eager"
    )
    value = compiled(*leaves)
    grads = torch.autograd.grad(value.sum(), leaves)
    want = operation.function(*leaves, backend=backend) * 2
    torch.testing.assert_close(value, want)
    for got, grad in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5)


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("std_per_row", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_number_of_rows(operation: Operation, std_per_row: bool, strict: bool) -> None:
    """As many as there are actions, too: whether a std is a row [A] must not be seen by its first size."""
    inputs, more = (
        tuple(make_arguments(operation.names, (num_rows, 3), std_per_row=(std_per_row,) * 2)) for num_rows in (6, 3)
    )
    rows = torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows} if t.shape[0] == 6 else {} for t in inputs)
    module = Module(operation.function)
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict).module()
    for changed in (inputs, more):
        torch.testing.assert_close(exported(*changed), operation.function(*changed))


def test_inference_tensors(backend: str, device: str, operation: Operation) -> None:
    """The rollout's means and stds, as rsl_rl keeps them, beside a new policy that has gradients."""
    arguments = make_arguments(operation.names, (20, 3), std_per_row=(True, True), device=device)
    with torch.inference_mode():
        stored = [t.clone() for t in arguments]
    for i, t in enumerate(arguments):
        mixed = [*stored[:i], t.clone().requires_grad_(), *stored[i + 1 :]]
        operation.function(*mixed, backend=backend).sum().backward()
        _, grads = expected(operation, arguments, torch.ones(20))
        assert_close(mixed[i].grad, grads[i], torch.float32, EPS[torch.float32])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_same_bits_on_any_number_of_threads(
    backend: str, device: str, operation: Operation, restore_threads: None
) -> None:
    """The gradient of a shared std is a sum over all rows."""
    arguments = [t.requires_grad_() for t in make_arguments(operation.names, (4000, 7), device=device)]

    def results() -> list[Tensor]:
        value = operation.function(*arguments, backend=backend)
        return [value.detach(), *torch.autograd.grad(value.square().sum(), arguments)]

    want = results()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for got, first in zip(results(), want, strict=True):
            assert torch.equal(got, first)


# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(operation: Operation) -> None:
    shaped_by = "mean" if "mean" in operation.names else operation.names[0]
    for i, name in enumerate(operation.names):
        arguments = make_arguments(operation.names, (6, 3), std_per_row=(True, True))

        def call(wrong: object, i: int = i, arguments: list = arguments) -> None:
            operation.function(*arguments[:i], wrong, *arguments[i + 1 :])

        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got list"):
            call([1.0])
        with pytest.raises(TypeError, match=rf"^{name} must be float32.*got torch.int64"):
            call(torch.ones(6, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=rf"^{name} must"):
            call(torch.ones(0, 3))
        with pytest.raises(ValueError, match=rf"^{name} must"):
            call(torch.ones(6, 0))
        if name != shaped_by:
            with pytest.raises(ValueError, match=rf"^{name} must have the shape .*\[6, 3\], got \[5, 3\]"):
                call(torch.ones(5, 3))
            with pytest.raises(ValueError, match=rf"^{name} is on meta, the other arguments are on cpu"):
                call(torch.ones(6, 3, device="meta"))


def test_wrong_backend(operation: Operation) -> None:
    arguments = make_arguments(operation.names, (6, 3))
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        operation.function(*arguments, backend="gpu")


def test_wrong_backend_under_torch_compile(operation: Operation) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda arguments: operation.function(*arguments, backend="gpu"), backend="aot_eager")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        compiled(make_arguments(operation.names, (20, 3), std_per_row=(True, True)))


def test_entropy_of_a_number() -> None:
    with pytest.raises(ValueError, match=r"^std must be \[A\] or \[N, A\] .* got shape \[\]"):
        gaussian_entropy(torch.tensor(0.5))
