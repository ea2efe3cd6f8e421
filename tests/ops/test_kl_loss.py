"""kl.gaussian_loss: log-ratio, value and coefficient from one kernel, against kl.loss in float64.

kl.loss itself is held against the exact KL by quadrature in tests/test_kl.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends_here import rows_that_it_can
from hypothesis import given, settings
from hypothesis import strategies as st
from second_derivative import WAYS
from torch import Tensor
from torch.distributions import Normal

from pyfast_ppo import kl
from pyfast_ppo.reference import KL_LOSSES

SETTINGS = settings(max_examples=15, deadline=None, derandomize=True)
LOSSES = pytest.mark.parametrize("which", KL_LOSSES, ids="-".join)


def make_arguments(
    shape: tuple[int, ...],
    seed: int = 0,
    drift: float = 0.3,
    *,
    std_per_row: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """(actions, mean, std, old_log_prob), the new policy at some distance from the old one."""
    g = torch.Generator().manual_seed(seed)
    old_mean, noise, shift = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    std = torch.exp(0.3 * torch.randn(shape if std_per_row else shape[-1:], generator=g, dtype=torch.float64))
    actions = old_mean + std * noise
    old_log_prob = Normal(old_mean, std).log_prob(actions).sum(-1)
    mean = old_mean + drift * std * shift / shape[-1] ** 0.5
    return [t.to(dtype).to(device) for t in (actions, mean, std * (1.0 + 0.1 * drift), old_log_prob)]


def expected(arguments: list[Tensor], which: tuple[str, str, str], grad: Tensor, offset: float) -> list[Tensor]:
    """Value, and the gradients of mean and std in each row, of the formula in float64; ``offset`` is added to ℓ."""
    actions, mean, std, old_log_prob = (t.detach().double().cpu() for t in arguments)
    mean, std = mean.clone().requires_grad_(), std.expand(mean.shape).clone().requires_grad_()
    log_ratio = Normal(mean, std, validate_args=False).log_prob(actions).sum(-1)
    value = kl.loss(log_ratio - old_log_prob.reshape(log_ratio.shape) + offset, *which)
    value.backward(grad.double().cpu())
    return [value.detach(), mean.grad, std.grad]


def check(arguments: list[Tensor], which: tuple[str, str, str], backend: str) -> None:
    """To the rounding of ℓ, a sum of numbers as large as the log-probability, and of what follows."""
    leaves = [t.detach() for t in arguments]
    leaves[1].requires_grad_(), leaves[2].requires_grad_()
    value = kl.gaussian_loss(*leaves, *which, backend=backend)
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
    value.backward(grad)
    dtype = arguments[1].dtype
    eps = torch.finfo(dtype).eps
    rounding = 4 * eps * (float(arguments[3].abs().max()) + arguments[1].shape[-1])
    want = expected(arguments, which, grad, 0.0)
    up, down = (expected(arguments, which, grad, offset) for offset in (rounding, -rounding))
    for got, exact, high, low in zip((value, leaves[1].grad, leaves[2].grad), want, up, down, strict=True):
        allowed = (high - low).abs() + 16 * eps * (exact.abs() + exact.abs().max()) + 1e-36
        if got.shape != exact.shape:  # a std for all rows
            exact, allowed = (t.flatten(0, -2).sum(0) for t in (exact, allowed))
        assert got.dtype == dtype
        error = (got.detach().double().cpu() - exact).abs()
        assert (error <= allowed).all(), f"off by {error.max()}, allowed {allowed.flatten()[error.argmax()]}"


@LOSSES
@given(
    num_rows=st.one_of(st.integers(1, 70), st.sampled_from([256, 257, 1030])),
    num_actions=st.one_of(st.integers(1, 40), st.sampled_from([128, 129])),
    std_per_row=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_values_and_gradients(
    backend: str,
    device: str,
    which: tuple[str, str, str],
    num_rows: int,
    num_actions: int,
    std_per_row: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    shape = (rows_that_it_can(backend, num_rows, num_actions), num_actions)
    check(make_arguments(shape, seed, std_per_row=std_per_row, dtype=dtype, device=device), which, backend)


@LOSSES
def test_far_outliers_are_clamped(backend: str, device: str, which: tuple[str, str, str]) -> None:
    """ℓ = ±30 and ±200: finite values and coefficients, those of the formula."""
    arguments = make_arguments((4, 3), device=device)
    actions, mean, std, _ = arguments
    log_prob = Normal(mean, std.expand_as(mean)).log_prob(actions).sum(-1)
    arguments[3] = log_prob - torch.tensor([30.0, -30.0, 200.0, -200.0], device=device)
    check(arguments, which, backend)


@LOSSES
def test_a_nan_stays_in_its_row(backend: str, device: str, which: tuple[str, str, str]) -> None:
    arguments = make_arguments((5, 3), device=device)
    clean = kl.gaussian_loss(*arguments, *which, backend=backend)
    arguments[3] = arguments[3].clone()
    arguments[3][2] = float("nan")
    value = kl.gaussian_loss(*arguments, *which, backend=backend)
    assert value.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(value[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("old_log_prob", [float("inf"), float("-inf")])
@LOSSES
def test_an_infinite_log_ratio_shows(
    backend: str, device: str, which: tuple[str, str, str], old_log_prob: float
) -> None:
    arguments = make_arguments((6, 3), device=device)
    good = kl.gaussian_loss(*arguments, *which, backend=backend)
    arguments[3][2] = old_log_prob
    value = kl.gaussian_loss(*arguments, *which, backend=backend)
    assert not torch.isfinite(value[2])
    if which[2] == "k3":
        assert value[2] == float("inf")
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(value[rest], good[rest])


def test_exactly_zero_at_equality(backend: str, device: str) -> None:
    """k3 and its gradient, where the old log-probability is the new one's own."""
    from pyfast_ppo import gaussian_log_prob

    actions, mean, std, _ = make_arguments((50, 12), device=device)
    old_log_prob = gaussian_log_prob(actions, mean, std, backend=backend)
    mean.requires_grad_()
    value = kl.gaussian_loss(actions, mean, std, old_log_prob, backend=backend)
    value.sum().backward()
    assert not value.any()
    assert not mean.grad.any()


def test_shapes_and_views(backend: str, device: str) -> None:
    which = ("old_new", "old", "k3")
    arguments = make_arguments((4, 5, 3), device=device)
    check(arguments, which, backend)
    arguments[3] = arguments[3].unsqueeze(-1)  # [..., 1], as rsl_rl keeps it
    check(arguments, which, backend)
    wide = [torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), device=device) for t in arguments[:2]]
    for buffer, t in zip(wide, arguments, strict=False):
        buffer[..., ::2] = t
    check([wide[0][..., ::2], wide[1][..., ::2], *arguments[2:]], which, backend)
    flat = make_arguments((19, 2), device=device)
    flat[3] = flat[3].unsqueeze(-1)
    check(flat, which, backend)


def test_actions_and_old_policy_get_no_gradient(backend: str, device: str) -> None:
    """A sampled action counts as given."""
    arguments = [t.requires_grad_() for t in make_arguments((6, 3), device=device)]
    kl.gaussian_loss(*arguments, backend=backend).sum().backward()
    assert arguments[0].grad is None or not arguments[0].grad.any()
    assert arguments[3].grad is None or not arguments[3].grad.any()
    assert arguments[1].grad.any()
    assert arguments[2].grad.any()


def test_the_same_bits_twice(backend: str, device: str) -> None:
    def run() -> list[Tensor]:
        arguments = make_arguments((rows_that_it_can(backend, 3000, 7), 7), device=device)
        arguments[1].requires_grad_(), arguments[2].requires_grad_()
        value = kl.gaussian_loss(*arguments, backend=backend)
        value.sum().backward()
        return [value, arguments[1].grad, arguments[2].grad]

    assert all(map(torch.equal, run(), run()))


def test_wrong_arguments_are_named() -> None:
    actions, mean, std, old_log_prob = make_arguments((6, 3))
    with pytest.raises(ValueError, match=r"^old_log_prob must have the shape \[6\] or \[6, 1\], got \[5\]"):
        kl.gaussian_loss(actions, mean, std, old_log_prob[:5])
    with pytest.raises(ValueError, match=r"^actions must"):
        kl.gaussian_loss(actions[:, :2], mean, std, old_log_prob)
    with pytest.raises(ValueError, match=r"form 'k2' has not the gradient of KL\(old‖new\).*use 'k1' or 'k3'"):
        kl.gaussian_loss(actions, mean, std, old_log_prob, form="k2")
    with pytest.raises(ValueError, match=r"^direction must be one of"):
        kl.gaussian_loss(actions, mean, std, old_log_prob, "forward")


@pytest.mark.parametrize("way", WAYS)
def test_a_second_derivative_is_refused(way: Callable) -> None:
    actions, mean, std, old_log_prob = (t.requires_grad_() for t in make_arguments((6, 3)))
    for i, x in ((1, mean), (2, std)):

        def function(x: Tensor, i: int = i) -> Tensor:
            given = [actions, mean, std, old_log_prob]
            given[i] = x * 1.0
            return kl.gaussian_loss(*given, backend="cpu").sum()

        with pytest.raises(RuntimeError, match="no second derivative"):
            way(function, x)


def test_under_torch_compile() -> None:
    arguments = make_arguments((16, 3))
    arguments[1].requires_grad_()
    compiled = torch.compile(kl.gaussian_loss, fullgraph=True, backend="aot_eager")
    value = compiled(*arguments)
    torch.testing.assert_close(value, kl.gaussian_loss(*arguments), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(value.sum(), arguments[1])
    (want,) = torch.autograd.grad(kl.gaussian_loss(*arguments).sum(), arguments[1])
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)
