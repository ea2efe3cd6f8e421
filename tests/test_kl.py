"""pyfast_ppo.kl by quadrature: expectations over the actions are sums over nodes, to 1e-9, with no sampling."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pyfast_ppo import kl

NODES, WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(180))
WEIGHTS = WEIGHTS / WEIGHTS.sum()

# (mean, log std) of the new policy; the old one is N(0.3, 0.8²)
OLD = (0.3, math.log(0.8))
SHIFT, SHRINK, GROW = (0.5, OLD[1]), (0.3, OLD[1] - 0.2), (0.35, OLD[1] + 0.15)
PAIRS = pytest.mark.parametrize("new", [SHIFT, SHRINK, GROW], ids=["shift", "shrink", "grow"])

EXACT_LOSSES = [
    ("old_new", "old", "k1"),
    ("old_new", "old", "k3"),
    ("new_old", "old", "k1"),
    ("new_old", "old", "k2"),
    ("new_old", "old", "k3"),
    ("new_old", "new", "k1"),
    ("new_old", "new", "k2"),
    ("new_old", "new", "k3"),
    ("old_new", "new", "k1"),
    ("old_new", "new", "k3"),
]


def log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    z = (actions - mean) / log_std.exp()
    return -0.5 * z * z - log_std - 0.5 * math.log(2.0 * math.pi)


def parameters(values: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values)


def log_ratio_at_nodes(new: tuple[Tensor, Tensor], sampled_from: str) -> Tensor:
    """ℓ at the quadrature's nodes of the sampled policy; the actions have no gradient, as sampled ones have none."""
    old = tuple(torch.tensor(v, dtype=torch.float64) for v in OLD)
    mean, log_std = old if sampled_from == "old" else (t.detach() for t in new)
    actions = mean + log_std.exp() * NODES
    return log_prob(actions, *new) - log_prob(actions, *old)


def exact(new: tuple[Tensor, Tensor], direction: str) -> Tensor:
    old = tuple(torch.tensor(v, dtype=torch.float64) for v in OLD)
    (mean_p, log_p), (mean_q, log_q) = (old, new) if direction == "old_new" else (new, old)
    return (log_q - log_p) + 0.5 * (((log_p - log_q) * 2.0).exp() + ((mean_p - mean_q) / log_q.exp()) ** 2 - 1.0)


def gradient(function: Callable[[tuple[Tensor, Tensor]], Tensor], new: tuple[float, float]) -> Tensor:
    leaves = parameters(new)
    return torch.stack(torch.autograd.grad(function(leaves), leaves))


def mean_of_loss(direction: str, sampled_from: str, form: str) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda new: (WEIGHTS * kl.loss(log_ratio_at_nodes(new, sampled_from), direction, sampled_from, form)).sum()


# --- values -----------------------------------------------------------------------------------------------------------


@PAIRS
@pytest.mark.parametrize("sampled_from", ["old", "new"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_values(new: tuple[float, float], sampled_from: str, estimator: str) -> None:
    leaves = parameters(new)
    log_ratio = log_ratio_at_nodes(leaves, sampled_from)
    want = exact(leaves, "old_new" if sampled_from == "old" else "new_old")
    got = (WEIGHTS * kl.estimate(log_ratio, estimator, sampled_from)).sum()
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


@PAIRS
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 1.7])
def test_every_fixed_control_variate_is_unbiased(new: tuple[float, float], weight: float) -> None:
    leaves = parameters(new)
    got = (WEIGHTS * kl.control_variate(log_ratio_at_nodes(leaves, "old"), "old", weight)).sum()
    torch.testing.assert_close(got, exact(leaves, "old_new").detach(), rtol=1e-9, atol=1e-12)


def test_known_moments_of_a_shift_of_the_mean() -> None:
    """K nats: k2 has the mean K + K²/2; Var k1 = 2K, Var k3 = e^{2K} - 1 - 2K; c* = 2K / (e^{2K} - 1)."""
    leaves = parameters((OLD[0] + 0.5 * math.exp(OLD[1]), OLD[1]))
    k = 0.125
    log_ratio = log_ratio_at_nodes(leaves, "old").detach()

    def moments(x: Tensor) -> tuple[float, float]:
        mean = (WEIGHTS * x).sum()
        return mean.item(), (WEIGHTS * (x - mean) ** 2).sum().item()

    assert moments(kl.estimate(log_ratio, "k2"))[0] == pytest.approx(k + k * k / 2, rel=1e-9)
    assert moments(kl.estimate(log_ratio, "k1")) == pytest.approx((k, 2 * k), rel=1e-9)
    assert moments(kl.estimate(log_ratio, "k3")) == pytest.approx((k, math.expm1(2 * k) - 2 * k), rel=1e-9)
    best = 2 * k / math.expm1(2 * k)
    least = moments(kl.control_variate(log_ratio, weight=best))[1]
    for other in (best - 0.05, best + 0.05, 0.0, 1.0):
        assert moments(kl.control_variate(log_ratio, weight=other))[1] > least


def test_best_weight_is_found_without_bias() -> None:
    """The weight of each sample comes from the others. Over 4,000 sets of 8 samples the mean is the KL, within 4σ."""
    g = torch.Generator().manual_seed(0)
    k = 0.5  # mean shift by one std
    sets = []
    for _ in range(4000):
        z = torch.randn(8, generator=g, dtype=torch.float64)
        sets.append(kl.control_variate(z - 0.5).mean())
    sets = torch.stack(sets)
    assert abs(sets.mean() - k) < 4 * sets.std() / len(sets) ** 0.5
    many = torch.randn(20_000, generator=g, dtype=torch.float64) - 0.5
    spread = kl.control_variate(many).std()
    assert spread < 0.98 * kl.estimate(many, "k3").std()
    assert spread < 0.98 * kl.estimate(many, "k1").std()


def weights_of_others(x: Tensor) -> Tensor:
    """c* for each sample from all others, one after the other, in float64."""
    others = [torch.cat([x[:i], x[i + 1 :]]).double() for i in range(len(x))]
    pairs = [(t - t.mean(), t.expm1() - t.expm1().mean()) for t in others]
    return torch.stack([(a * b).sum() / b.square().sum() for a, b in pairs])


@pytest.mark.parametrize("mean", [0.5, 1.0, 2.0, -2.0])
@pytest.mark.parametrize("spread", [0.1, 1e-3])
@pytest.mark.parametrize("samples", [3, 64])
def test_best_weight_of_samples_far_from_zero(mean: float, spread: float, samples: int) -> None:
    """In float32: moments about 0 lose the spread beside the mean. Of a sequence's one step the weight is the same."""
    x = mean + spread * torch.randn(samples, generator=torch.Generator().manual_seed(7))
    want = weights_of_others(x)
    for got in (kl.control_variate(x), kl.sequence_loss(x[:, None], "old_new", "old", weight=None)):
        torch.testing.assert_close((got.double() + x) / x.double().expm1(), want, rtol=5e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [-3.0, 1e-5, 0.1, 0.3, 1.0, 3.0, 25.0])
def test_samples_that_are_equal_have_no_best_weight(x: float, dtype: torch.dtype) -> None:
    """Their variance is rounding, whatever their number."""
    for samples in (3, 10, 100, 4096):
        log_ratio = torch.full((samples,), x, dtype=dtype)
        assert torch.equal(kl.control_variate(log_ratio), -log_ratio)
        mask = torch.arange(3) < torch.arange(1, samples + 1)[:, None]
        steps = torch.where(mask, log_ratio[:, None], torch.nan)
        assert torch.equal(
            kl.sequence_loss(steps, mask=mask, weight=None), kl.sequence_loss(steps, mask=mask, weight=0.0)
        )


@pytest.mark.parametrize("sampled_from", ["old", "new"])
def test_k3_is_accurate_near_zero(sampled_from: str) -> None:
    """In float32, relative to itself: e^x - 1 - x is no difference of near-equal numbers."""
    log_ratio = torch.tensor([0.0, 1e-6, -1e-4, 1e-2, -0.3, 0.7, 3.0])
    got = kl.estimate(log_ratio, "k3", sampled_from)
    for one, x in zip(got.tolist(), log_ratio.tolist(), strict=True):
        with mpmath.workdps(50):
            x = mpmath.mpf(x if sampled_from == "old" else -x)
            assert abs(one - float(mpmath.expm1(x) - x)) <= 1e-6 * abs(one)


@pytest.mark.parametrize("sampled_from", ["old", "new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_outliers_grows(sampled_from: str, dtype: torch.dtype) -> None:
    """On either side, though eˣ is clamped: no outlier makes a mean of k3 smaller."""
    log_ratio = torch.cat([torch.linspace(0, 30, 100), torch.logspace(1.5, 30, 100), torch.tensor([torch.inf])])
    for sign in (1, -1):
        got = kl.estimate(sign * log_ratio.to(dtype), "k3", sampled_from)
        assert (got.diff()[:-1] >= 0.0).all()
        assert got[-1] == torch.inf


# --- gradients --------------------------------------------------------------------------------------------------------


@PAIRS
@pytest.mark.parametrize("case", EXACT_LOSSES, ids=" ".join)
def test_exact_gradients(new: tuple[float, float], case: tuple[str, str, str]) -> None:
    got = gradient(mean_of_loss(*case), new)
    torch.testing.assert_close(got, gradient(lambda t: exact(t, case[0]), new), rtol=1e-9, atol=1e-11)


@PAIRS
def test_gradients_of_the_claims_often_made(new: tuple[float, float]) -> None:
    """Old samples: ½ℓ² has neither gradient; k3 plus ℓ ∇log π has not that of F. New samples: plain k1 has none."""
    f, r = (gradient(lambda t, d=d: exact(t, d), new) for d in ("old_new", "new_old"))

    def plain(function: Callable[[Tensor], Tensor], sampled_from: str) -> Tensor:
        return gradient(lambda t: (WEIGHTS * function(log_ratio_at_nodes(t, sampled_from))).sum(), new)

    k2 = plain(lambda x: 0.5 * x * x, "old")
    assert (k2 - f).norm() > 0.01 * f.norm()
    assert (k2 - r).norm() > 0.01 * r.norm()
    advice = plain(lambda x: torch.expm1(x) - x + x.detach() * x, "old")
    assert (advice - f).norm() > 0.5 * f.norm()
    assert plain(lambda x: x, "new").norm() < 1e-10
    # k3 of new samples has the gradient of the other direction
    torch.testing.assert_close(plain(lambda x: torch.expm1(-x) + x, "new"), f, rtol=1e-9, atol=1e-11)


def test_the_advice_is_about_twice_the_gradient_for_small_steps() -> None:
    new = (OLD[0] + 0.01, OLD[1])
    f = gradient(lambda t: exact(t, "old_new"), new)
    advice = gradient(
        lambda t: (WEIGHTS * (lambda x: torch.expm1(x) - x + x.detach() * x)(log_ratio_at_nodes(t, "old"))).sum(), new
    )
    assert float(advice[0] / f[0]) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("case", EXACT_LOSSES, ids=" ".join)
def test_outliers_stay_finite(case: tuple[str, str, str]) -> None:
    log_ratio = torch.tensor([-100.0, 0.0, 100.0], requires_grad=True)
    value = kl.loss(log_ratio, *case)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(log_ratio.grad).all()
    assert case[2] != "k3" or (kl.loss(1e10 * log_ratio, *case) >= 0.0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("case", EXACT_LOSSES, ids=" ".join)
def test_an_infinite_log_ratio(case: tuple[str, str, str], sign: float) -> None:
    """The value is infinite, as kl.gaussian_loss has it, and the gradient is the coefficient."""
    far, infinite = (torch.tensor([sign * x], dtype=torch.float64, requires_grad=True) for x in (1e100, torch.inf))
    value, want = kl.loss(infinite, *case), torch.inf * kl.loss(far, *case)
    if sign < 0.0 and case[0] == "new_old" and case[2] == "k1":  # -∞, of a slope that is -∞, too
        assert value.isnan().all()
    else:
        assert torch.equal(value, want)
    (gradient,), (at_far,) = (torch.autograd.grad(kl.loss(t, *case).sum(), t) for t in (infinite, far))
    assert torch.equal(gradient, torch.where(at_far.abs() > 1e50, torch.inf * at_far, at_far))


# --- sequences --------------------------------------------------------------------------------------------------------

# Two steps with two actions each. The second step's state is the first's action; the policies are tables of logits.
OLD_LOGITS = torch.tensor([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]], dtype=torch.float64)
NEW_LOGITS = OLD_LOGITS + torch.tensor([[0.4, 0.0], [-0.3, 0.2], [0.1, -0.5]], dtype=torch.float64)
PATHS = [(a, b) for a in range(2) for b in range(2)]


def paths_under(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the steps [4, 2], the state of each step [4, 2])."""
    log_p = torch.log_softmax(logits, -1)
    states = torch.tensor([(0, 1 + a) for a, _ in PATHS])
    actions = torch.tensor(PATHS)
    return log_p[states, actions], states


def sequence_kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = paths_under(p)[0].sum(-1), paths_under(q)[0].sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("sampled_from", ["old", "new"])
@pytest.mark.parametrize("with_step_kl", [False, True])
def test_sequences_by_enumeration(sampled_from: str, with_step_kl: bool) -> None:
    """All four sequences with their probabilities: value and gradient of the KL of whole sequences."""
    direction = "old_new" if sampled_from == "old" else "new_old"
    new = NEW_LOGITS.clone().requires_grad_()
    pair = (OLD_LOGITS, new) if direction == "old_new" else (new, OLD_LOGITS)
    want = sequence_kl(*pair)
    (want_grad,) = torch.autograd.grad(want, new)
    new_steps, states = paths_under(new)
    old_steps, _ = paths_under(OLD_LOGITS)
    weights = (old_steps if sampled_from == "old" else new_steps.detach()).sum(-1).exp()
    step_kl = kl.categorical(*pair)[states] if with_step_kl else None
    term = kl.sequence_loss(new_steps - old_steps, direction, sampled_from, step_kl=step_kl)
    got = (weights * term).sum()
    (grad,) = torch.autograd.grad(got, new)
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sampled_from", ["old", "new"])
@pytest.mark.parametrize("weight", [0.6, 1.0, None])
def test_control_variates_of_sequences_by_enumeration(sampled_from: str, weight: float | None) -> None:
    """Over all triples of sequences: with a weight from the other two, value and gradient stay exact as well."""
    direction = "old_new" if sampled_from == "old" else "new_old"
    new = NEW_LOGITS.clone().requires_grad_()
    want = sequence_kl(*((OLD_LOGITS, new) if direction == "old_new" else (new, OLD_LOGITS)))
    (want_grad,) = torch.autograd.grad(want, new)
    new_steps, _ = paths_under(new)
    old_steps, _ = paths_under(OLD_LOGITS)
    probabilities = (old_steps if sampled_from == "old" else new_steps.detach()).sum(-1).exp()
    got = torch.zeros((), dtype=torch.float64)
    values = set()
    for triple in itertools.product(range(len(PATHS)), repeat=3):
        chosen = list(triple)
        term = kl.sequence_loss((new_steps - old_steps)[chosen], direction, sampled_from, weight=weight).mean()
        values.add(round(term.item(), 9))
        got = got + probabilities[chosen].prod() * term
    (grad,) = torch.autograd.grad(got, new)
    assert len(values) > 4
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-13)


def test_the_control_variate_makes_the_spread_of_sequences_smaller() -> None:
    """Of the value, and of the gradient in one mean: 50 Gaussian steps of 0.02 nats."""
    g = torch.Generator().manual_seed(5)
    shift = torch.full((4000, 1), 0.2, dtype=torch.float64, requires_grad=True)  # one for each sequence
    actions = shift.detach() + torch.randn(4000, 50, generator=g, dtype=torch.float64)
    log_ratio = shift * actions - 0.5 * shift * shift
    spread = {}
    for weight in (0.0, 1.0, None):
        terms = kl.sequence_loss(log_ratio, weight=weight)
        (gradients,) = torch.autograd.grad(terms.sum(), shift, retain_graph=True)
        spread[weight] = terms.std().item(), gradients.std().item()
        assert terms.mean().item() == pytest.approx(50 * 0.02, abs=4 * spread[weight][0] / math.sqrt(4000))
    assert spread[None][0] <= spread[1.0][0] < 0.25 * spread[0.0][0]
    assert spread[None][1] < 0.9 * spread[0.0][1]


def test_padding_does_not_matter() -> None:
    g = torch.Generator().manual_seed(1)
    log_ratio, step_kl = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5, 2])[:, None]
    for options in ({}, {"step_kl": step_kl}, {"weight": 1.0}, {"weight": None}):
        results = []
        for padding in (0.0, float("nan"), 1e30):
            x = torch.where(mask, log_ratio, padding).requires_grad_()
            filled = {k: torch.where(mask, t, padding) if isinstance(t, Tensor) else t for k, t in options.items()}
            value = kl.sequence_loss(x, mask=mask, **filled)
            value.sum().backward()
            assert not x.grad[~mask].any()
            results.append((value.detach(), x.grad[mask]))
        for got, want in zip(results[1:], results[:1] * 2, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- exact forms ------------------------------------------------------------------------------------------------------


def test_categorical() -> None:
    """Against torch.distributions in float64, with its gradients; with categories that cannot happen."""
    g = torch.Generator().manual_seed(2)
    p, q = (torch.randn(50, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    got, want = kl.categorical(p, q), kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got.sum(), (p, q)), torch.autograd.grad(want.sum(), (p, q)), strict=True):
        torch.testing.assert_close(one, other)
    impossible = p.detach().clone()
    impossible[:, 2] = -torch.inf
    impossible.requires_grad_()
    got = kl.categorical(impossible, q)
    torch.testing.assert_close(got, kl_divergence(Categorical(logits=impossible), Categorical(logits=q)).detach())
    got.sum().backward()
    assert torch.isfinite(impossible.grad).all()
    assert torch.isinf(kl.categorical(q, impossible)).all()


def exact_categorical(p: Tensor, q: Tensor) -> list[Tensor]:
    """(KL, gradients of p's logits and of q's) with 50 digits: p, -p (log(q/p) + KL) and q - p. One row."""
    with mpmath.workdps(50):
        p, q = ([mpmath.exp(x) for x in row.tolist()] for row in (p, q))
        p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))
        log_ratios = [mpmath.log(b / a) for a, b in zip(p, q, strict=True)]
        value = -mpmath.fsum(a * d for a, d in zip(p, log_ratios, strict=True))
        of_p = [-a * (d + value) for a, d in zip(p, log_ratios, strict=True)]
        return [torch.tensor([float(x) for x in row], dtype=torch.float64)
                for row in ([value], of_p, [b - a for a, b in zip(p, q, strict=True)])]  # fmt: skip


@pytest.mark.parametrize("categories", [3, 18])
@pytest.mark.parametrize("step", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("shared", [0.0, 0.9, -30.0])
def test_categorical_is_accurate_near_zero(shared: float, step: float, categories: int) -> None:
    """In float32, each row relative to itself, and so its gradients; the usual form loses all digits, and its sign.

    Whatever all logits of q share, though it rounds how they differ from p's: beside 0.9 by up to 28% of a KL of 5e-13.
    """
    g = torch.Generator().manual_seed(3)
    p = torch.randn(20, categories, generator=g)
    q = (p + step * torch.randn(20, categories, generator=g) + shared).requires_grad_()
    p.requires_grad_()
    got = kl.categorical(p, q)
    assert (got >= 0.0).all()
    assert not kl.categorical(p, p).any()
    for value, *rows in zip(got, *torch.autograd.grad(got.sum(), (p, q), retain_graph=True), p, q, strict=True):
        exact = exact_categorical(*rows[2:])
        for one, want in zip((value.reshape(1), *rows[:2]), exact, strict=True):
            assert (one - want).abs().max() <= (2e-6 if step < 0.5 else 1e-5) * want.abs().max()


def test_categorical_where_only_some_rows_are_close() -> None:
    """Values, first and second derivatives in float64, at once and compiled; masks are no distance."""
    g = torch.Generator().manual_seed(8)
    p = torch.randn(6, 4, generator=g, dtype=torch.float64)
    q = p + torch.tensor([0.1, 3.0] * 3)[:, None] * torch.randn(6, 4, generator=g, dtype=torch.float64)
    p, q = p.requires_grad_(), q.requires_grad_()
    assert torch.autograd.gradcheck(kl.categorical, (p, q))
    assert torch.autograd.gradgradcheck(kl.categorical, (p, q))
    compiled = torch.compile(kl.categorical, fullgraph=True, backend="aot_eager")
    masked = [torch.cat([t[:, :2], torch.full_like(t[:, :1], -torch.inf), t[:, 2:]], -1) for t in (p, q)]
    for function in (kl.categorical, compiled):
        for pair in ((p, q), masked):
            got, want = function(*pair), kl.categorical(p, q)
            torch.testing.assert_close(got, want)
            gradients = (torch.autograd.grad(t.sum(), (p, q)) for t in (got, want))
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3], ids=str)
def test_what_is_no_distribution(logits: list[float], dtype: torch.dtype) -> None:
    """NaN in its row, and in no other."""
    fine = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 2.0]], dtype=dtype)
    wrong = torch.stack([torch.tensor(logits, dtype=dtype), fine[0]])
    for pair in ((wrong, fine), (fine, wrong)):
        assert kl.categorical(*pair).isnan().tolist() == [True, False]
        assert kl.multi_categorical(*(t.repeat(1, 2) for t in pair), [3, 3]).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-1e3, -1e9, -3e38, -math.inf])
def test_what_p_cannot_do_does_not_matter(logit: float, dtype: torch.dtype) -> None:
    """Whether it is masked with -inf or a number so low that p is rounded to 0: q may be anything there."""
    rest = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=dtype)
    want = kl.categorical(*rest)
    for other in (logit, -1e4, -1e9, -math.inf):
        p, q = (torch.cat([t, t.new_tensor([x])]).requires_grad_() for t, x in zip(rest, (logit, other), strict=True))
        got = kl.categorical(p, q)
        torch.testing.assert_close(got, want)
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(got, (p, q)))
    possible = torch.tensor([0.3, -0.2, -50.0], dtype=dtype)
    assert kl.categorical(possible, torch.tensor([0.1, 0.4, -math.inf], dtype=dtype)) == torch.inf


def test_multi_categorical() -> None:
    g = torch.Generator().manual_seed(4)
    p, q = torch.randn(2, 9, 7, generator=g, dtype=torch.float64)
    got = kl.multi_categorical(p, q, [3, 4])
    torch.testing.assert_close(got, kl.categorical(p[:, :3], q[:, :3]) + kl.categorical(p[:, 3:], q[:, 3:]))


# --- small dtypes -----------------------------------------------------------------------------------------------------


def assert_rounded(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """``got`` is ``want``, rounded, or the largest number of ``dtype``."""
    assert got.dtype == dtype
    largest = torch.finfo(dtype).max
    torch.testing.assert_close(got, want.clamp(-largest, largest).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


SMALL = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
LOG_RATIOS = [0.0, 1e-3, -0.01, 0.1, 0.5, -2.0, 5.0, -8.0, 12.0, -13.0, 25.0, -30.0, 400.0, -400.0]


@SMALL
@pytest.mark.parametrize("sampled_from", ["old", "new"])
def test_small_dtypes(dtype: torch.dtype, sampled_from: str) -> None:
    """Computed in float32: the clamp is one of float16, too, and small log-ratios keep their digits."""
    x = torch.tensor(LOG_RATIOS, dtype=dtype)
    for estimator in ("k1", "k2", "k3"):
        want = kl.estimate(x.double(), estimator, sampled_from)
        assert_rounded(kl.estimate(x, estimator, sampled_from), want, dtype)
    for weight in (0.0, 1.0, None):
        got = kl.control_variate(x, sampled_from, weight)
        assert_rounded(got, kl.control_variate(x.float(), sampled_from, weight), dtype)


@SMALL
@pytest.mark.parametrize("case", kl.KL_LOSSES)
def test_losses_of_small_dtypes(dtype: torch.dtype, case: tuple[str, str, str]) -> None:
    x = torch.tensor(LOG_RATIOS, dtype=dtype, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    value, want = kl.loss(x, *case), kl.loss(wide, *case)
    assert_rounded(value.detach(), want.detach(), dtype)
    value.backward(torch.ones_like(value))
    want.sum().backward()
    assert_rounded(x.grad, wide.grad, dtype)


@SMALL
@pytest.mark.parametrize("sampled_from", ["old", "new"])
def test_sequences_of_small_dtypes(dtype: torch.dtype, sampled_from: str) -> None:
    """The control variate of weight 0 is 0, also where e^ℓ is beyond float16."""
    direction = {"old": "old_new", "new": "new_old"}[sampled_from]
    x = torch.tensor([[0.5, -13.0, 1.0], [12.0, 0.25, -1.0]], dtype=dtype, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    value, want = kl.sequence_loss(x, direction, sampled_from), kl.sequence_loss(wide, direction, sampled_from)
    assert_rounded(value.detach(), want.detach(), dtype)
    value.sum().backward()
    want.sum().backward()
    assert_rounded(x.grad, wide.grad, dtype)


@SMALL
def test_sequences_beyond_a_small_dtype(dtype: torch.dtype) -> None:
    """The largest number, with the gradient of what it stands for; what is infinite is no number."""
    x = torch.full((1, 2), -30.0, dtype=dtype, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    value, want = (kl.sequence_loss(t, weight=1.0) for t in (x, wide))
    assert_rounded(value.detach(), want.detach(), dtype)
    for scale in (1.0, 1e-4):
        (grad,) = torch.autograd.grad(scale * value.sum(), x, retain_graph=True)
        (want_grad,) = torch.autograd.grad(scale * want.sum(), wide, retain_graph=True)
        torch.testing.assert_close(grad, want_grad.to(dtype), rtol=0.01, atol=0.0)
    steps = torch.full((1, 3000), 40.0, dtype=dtype, requires_grad=True)
    value = kl.sequence_loss(torch.zeros_like(steps), "old_new", "old", step_kl=steps)
    assert_rounded(value.detach(), torch.tensor([120_000.0]), dtype)
    value.sum().backward()
    assert torch.equal(steps.grad, torch.ones_like(steps))
    assert kl.sequence_loss(torch.tensor([[0.0, torch.inf]], dtype=dtype), "old_new", "old") == -torch.inf


@SMALL
@pytest.mark.parametrize("step", [1.0, 0.1, 0.02])
def test_categorical_of_small_dtypes(dtype: torch.dtype, step: float) -> None:
    """Near equality nothing cancels in 8 bits; of several distributions the sum is rounded once."""
    g = torch.Generator().manual_seed(6)
    p = torch.randn(40, 16, generator=g).to(dtype).requires_grad_()
    q = (p.detach() + step * torch.randn(40, 16, generator=g)).to(dtype).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (p, q)]
    for function in (kl.categorical, lambda p, q: kl.multi_categorical(p, q, [4] * 4)):
        got, want = function(p, q), function(*wide)
        assert_rounded(got.detach(), want.detach(), dtype)
        grads, want_grads = torch.autograd.grad(got.sum(), (p, q)), torch.autograd.grad(want.sum(), wide)
        for one, other in zip(grads, want_grads, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    impossible = p.detach().clone()
    impossible[:, 2] = -torch.inf
    assert torch.isinf(kl.categorical(q, impossible)).all()
    assert kl.categorical(p, q.double()).dtype == torch.float64


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [kl.estimate, kl.control_variate, kl.loss, kl.sequence_loss])
def test_what_is_no_tensor_of_floats(function: Callable) -> None:
    for wrong in ([0.1], 0.1, np.zeros(3), None):
        with pytest.raises(TypeError, match=f"^log_ratio must be a tensor, got {type(wrong).__name__}"):
            function(wrong)
    with pytest.raises(TypeError, match=r"^log_ratio must be float32, .* got torch.int64"):
        function(torch.zeros(3, dtype=torch.int64))


def test_sequences_with_what_is_no_tensor() -> None:
    x = torch.zeros(3)
    for wrong in ([True] * 3, np.ones(3)):
        with pytest.raises(TypeError, match=f"^mask must be a tensor, got {type(wrong).__name__}"):
            kl.sequence_loss(x, mask=wrong)
        with pytest.raises(TypeError, match=f"^step_kl must be a tensor, got {type(wrong).__name__}"):
            kl.sequence_loss(x, step_kl=wrong)


def test_logits_that_are_no_tensor_of_floats() -> None:
    with pytest.raises(TypeError, match=r"^logits_q must be a tensor, got list"):
        kl.categorical(torch.zeros(3), [0.0] * 3)
    with pytest.raises(TypeError, match=r"^logits_p must be a tensor, got list"):
        kl.multi_categorical([0.0] * 3, torch.zeros(3), [1, 2])


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"^estimator must be one of 'k1', 'k2', 'k3', got 'k4'"):
        kl.estimate(x, "k4")
    with pytest.raises(ValueError, match=r"^sampled_from must be one of 'old', 'new', got 'both'"):
        kl.estimate(x, "k1", "both")
    with pytest.raises(ValueError, match=r"^direction must be one of"):
        kl.loss(x, "forward")
    for sampled_from in ("old", "new"):
        with pytest.raises(ValueError, match=r"^form 'k2' has not the gradient of KL\(old‖new\)"):
            kl.loss(x, "old_new", sampled_from, "k2")
    with pytest.raises(ValueError, match=r"^log_ratio must be \[\.\.\., T\], got a 0-dim tensor"):
        kl.sequence_loss(x[0])
    with pytest.raises(ValueError, match="products of ratios"):
        kl.sequence_loss(x, "new_old", "old")
    with pytest.raises(ValueError, match=r"^mask must have the shape \[4\], got \[3\]"):
        kl.sequence_loss(x, mask=torch.ones(3))
    with pytest.raises(ValueError, match="at least 3 samples"):
        kl.control_variate(x[:2])
    with pytest.raises(ValueError, match="at least 2 sequences"):
        kl.sequence_loss(x, weight=None)
    with pytest.raises(ValueError, match=r"^logits_p must have 5 = sum of sizes in its last dimension, got 4"):
        kl.multi_categorical(x, x, [2, 3])
    for wrong in ([2.7, 2], 4, ["2", 2]):
        message = re.escape(f"sizes must be a list of integers, as MultiDiscrete.nvec, got {wrong!r}")
        with pytest.raises(TypeError, match=message):
            kl.multi_categorical(x, x, wrong)
    assert kl.multi_categorical(x, x, np.array([1, 3])) == 0.0
    for logits, sizes in ((x[:0], []), (x, [5, -1])):
        message = f"sizes must be one or more positive numbers, got {sizes}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            kl.multi_categorical(logits, logits, sizes)


@pytest.mark.parametrize("function", [kl.categorical, lambda p, q: kl.multi_categorical(p, q, [1, 3])])
def test_logits_that_do_not_fit(function: Callable) -> None:
    """Other leading dimensions broadcast, categories do not."""
    x = torch.zeros(5, 4)
    for name, pair in (("logits_p", (x[0, 0], x)), ("logits_q", (x, x[0, 0])), ("logits_q", (x, x[:, :0]))):
        with pytest.raises(ValueError, match=rf"^{name} must be \[\.\.\., C\] with at least one category, got shape"):
            function(*pair)
    for q in (x[:, :1], x[:, :3]):
        with pytest.raises(ValueError, match=rf"^logits_q must have 4 categories, as logits_p has, got {q.shape[-1]}"):
            function(x, q)
    with pytest.raises(ValueError, match=r"^logits_q must have leading dimensions that fit .*\[5, 4\], got \[3, 4\]"):
        function(x, x[:3])
    with pytest.raises(ValueError, match=r"^logits_q is on meta, logits_p on cpu"):
        function(x, x.to("meta"))
    for other in (x[0], x[:1], x.expand(3, 5, 4)):
        assert function(x, other).shape == function(other, x).shape == (*other.shape[:-2], 5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x[0]), function(x, x[0]))
