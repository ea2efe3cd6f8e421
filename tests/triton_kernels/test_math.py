"""triton_kernels/math.py against exact values (mpmath, 80 digits), over the whole range that is named.

The bounds are those of csrc/math's float32 functions (tests/csrc/test_math.py), whose formulas and constants they are.
"""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from pyfast_ppo.backends import triton as backend
from pyfast_ppo.reference import KL_LOSSES, METRICS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 4096

math = backend._kernels("math")
exp_terms, log_or_nan, ratio_terms, kl_terms = math.exp_terms, math.log_or_nan, math.ratio_terms, math.kl_terms
reciprocal_or_nan = math.reciprocal_or_nan

mpmath.mp.dps = 80
exact = np.frompyfunc(lambda x: mpmath.mpf(float(x)), 1, 1)
exact_exp, exact_expm1, exact_log = (np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.expm1, mpmath.log))


@triton.jit
def probe(
    which: tl.constexpr, a_ptr, b_ptr, c_ptr, d_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, n, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    a = tl.load(a_ptr + at, mask=mask, other=1.0)
    b = tl.load(b_ptr + at, mask=mask, other=1.0)
    c = tl.load(c_ptr + at, mask=mask, other=1.0)
    d = tl.load(d_ptr + at, mask=mask, other=1.0)
    out2, out3 = a, a
    if which == "exp":
        out0, out1 = exp_terms(a)
    elif which == "log":
        out0 = log_or_nan(a)
        out1 = a
    elif which == "ratio":
        out0, out1 = ratio_terms(a, b, reciprocal_or_nan(b))
    elif which == "kl":
        inv_q = reciprocal_or_nan(d)
        expm1, phi = ratio_terms(b, d, inv_q)
        out0, out1, out2, out3 = kl_terms(a, c, inv_q, expm1, phi)
    tl.store(out0_ptr + at, out0, mask=mask)
    tl.store(out1_ptr + at, out1, mask=mask)
    tl.store(out2_ptr + at, out2, mask=mask)
    tl.store(out3_ptr + at, out3, mask=mask)


def call(which: str, *inputs: np.ndarray) -> list[np.ndarray]:
    inputs = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(DEVICE) for x in inputs]
    inputs += [inputs[0]] * (4 - len(inputs))
    outputs = [torch.full_like(inputs[0], 7.0) for _ in range(4)]
    n = inputs[0].numel()
    probe[(triton.cdiv(n, BLOCK),)](which, *inputs, *outputs, n, BLOCK=BLOCK)
    return [out.cpu().numpy() for out in outputs]


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative to the exact value, where that is not 0; where it is, ``got`` has to be 0, too."""
    zero = want == 0
    assert not got[zero].any()
    return float(np.max(np.abs(exact(got[~zero]) - want[~zero]) / np.abs(want[~zero]), initial=mpmath.mpf(0)))


def both_signs(low: float, high: float, count: int) -> np.ndarray:
    magnitudes = np.geomspace(low, high, count)
    return np.concatenate([-magnitudes, magnitudes])


def test_places_are_those_of_the_reference() -> None:
    """The kernels cannot import its lists."""
    kernels = backend._kernels("ppo_loss")
    assert [getattr(kernels, name.upper()).value for name in METRICS] == list(range(kernels.NUM_METRICS.value))
    places = [getattr(math, "_".join(loss).upper()).value for loss in KL_LOSSES]
    assert places == list(range(len(KL_LOSSES)))


def test_exp() -> None:
    """e^x and e^x - 1 - x for |x| <= 20, down to 1e-15; exactly 1 and 0 at 0."""
    x = np.concatenate([np.linspace(-20, 20, 3001), both_signs(1e-15, 1.0, 700), [0.0]]).astype(np.float32)
    exp, expm1_minus_x, _, _ = call("exp", x)
    assert largest_error(exp, exact_exp(exact(x))) < 1e-7
    assert largest_error(expm1_minus_x, exact_expm1(exact(x)) - exact(x)) < 1e-6
    assert (expm1_minus_x >= 0).all()
    assert exp[-1] == 1.0
    assert np.isnan(call("exp", np.array([np.nan]))[0]).all()


def test_log() -> None:
    """Every positive normal number; NaN for everything else."""
    g = np.random.default_rng(0)
    info = np.finfo(np.float32)
    x = np.concatenate([
        np.ldexp(g.uniform(1, 2, 3000), g.integers(info.minexp, info.maxexp, 3000)),
        1.0 + both_signs(float(info.eps), 0.3, 500),
        [info.tiny, info.max, 0.5**0.5, 2.0**0.5, 1.0, 2.0],
    ]).astype(np.float32)  # fmt: skip
    assert largest_error(call("log", x)[0], exact_log(exact(x))) < 2e-7
    bad = np.array([0.0, -0.0, -1.0, -np.inf, np.inf, np.nan, info.tiny / 2], np.float32)
    assert np.isnan(call("log", bad)[0]).all()


def test_ratio_of_stds() -> None:
    """e^{2d} - 1 and e^{2d} - 1 - 2d, relative to themselves however close the two are."""
    g = np.random.default_rng(1)
    ratios = np.concatenate([1.0 + both_signs(1e-7, 0.6, 900), np.geomspace(1e-18, 1e18, 900), [1.0]])
    q = np.exp(g.uniform(-7, 7, ratios.size))
    p, q = (q * ratios).astype(np.float32), q.astype(np.float32)
    expm1, phi, _, _ = call("ratio", p, q)
    ratio = exact(p) / exact(q)
    assert largest_error(expm1, ratio**2 - 1) < 4e-7
    assert largest_error(phi, ratio**2 - 1 - 2 * exact_log(ratio)) < 1.2e-6
    assert (phi >= 0).all()
    for out in call("ratio", q, q)[:2]:
        assert not out.any()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, -np.inf, np.nan])
def test_ratio_with_what_is_no_std(bad: float) -> None:
    for out in call("ratio", np.array([bad, 1.0, bad]), np.array([1.0, bad, bad]))[:2]:
        assert np.isnan(out).all()


def test_ratio_at_the_ends_of_the_numbers() -> None:
    """A subnormal std is none, whatever it is divided by. Of two that are, the ratio may leave the normal numbers."""
    info = np.finfo(np.float32)
    subnormal, small, large = info.tiny / 2, info.tiny * 4, info.max / 4
    for out in call("ratio", np.array([subnormal, subnormal, small]), np.array([small, 1.0, large]))[:2]:
        assert np.isnan(out).all()
    for out in call("ratio", np.array([large]), np.array([small]))[:2]:
        assert (out == np.inf).all()


def test_kl() -> None:
    g = np.random.default_rng(3)
    ratios = np.concatenate([1.0 + both_signs(1e-7, 0.6, 300), np.geomspace(1e-5, 1e5, 300)])
    q = np.exp(g.uniform(-5, 5, ratios.size))
    p, q = (q * ratios).astype(np.float32), q.astype(np.float32)
    p, q = p[p != q], q[p != q]
    mean_q = g.standard_normal(p.size).astype(np.float32)
    shift = g.choice([0.0, 1e-6, 1e-3, 1.0, 30.0], p.size) * g.standard_normal(p.size) * q
    mean_p = (mean_q + shift).astype(np.float32)
    value, d_mean_p, d_log_std_p, d_log_std_q = call("kl", mean_p, p, mean_q, q)
    ratio, m = exact(p) / exact(q), (exact(mean_p) - exact(mean_q)) / exact(q)
    assert largest_error(value, (ratio**2 - 1 - 2 * exact_log(ratio) + m**2) / 2) < 1e-6
    assert (value >= 0).all()
    assert largest_error(d_mean_p, m / exact(q)) < 1e-6
    assert largest_error(d_log_std_p, ratio**2 - 1) < 1e-6
    error = np.abs(exact(d_log_std_q) - (1 - ratio**2 - m**2)) / (np.abs(ratio**2 - 1) + m**2)
    assert float(np.max(error)) < 1e-6
