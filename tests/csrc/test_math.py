"""csrc/math against exact values: mpmath with 80 digits, Fractions where the result is exact in binary.

Each bound is the largest error on the points tried, rounded up, over the whole range that is named. The functions run
in loops that the compiler has made SIMD code, once per instruction set: a fused multiply-add rounds differently.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ISAS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}
AVAILABLE_ISAS = ISAS.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])
CODES = {"baseline": 0, "avx2": 1, "avx512": 2}  # enum Isa
DTYPES = (np.float32, np.float64)
NUM_OUTPUTS = {"exp": 2, "log": 1, "ratio": 2, "surrogate": 5, "clipped_value": 2, "plain_value": 2, "kl": 4}

Probe = Callable[..., list[np.ndarray]]

mpmath.mp.dps = 80
exact = np.frompyfunc(lambda x: mpmath.mpf(float(x)), 1, 1)
exact_exp, exact_expm1, exact_log = (np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.expm1, mpmath.log))


@pytest.fixture(scope="session")
def library(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """With setup.py's flags."""
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
    folder = tmp_path_factory.mktemp("math")
    return ctypes.CDLL(str(build(folder / "math_probe.so", [HERE / "math_probe.cpp"], flags)))


@pytest.fixture(scope="session", params=AVAILABLE_ISAS)
def isa(request: pytest.FixtureRequest) -> int:
    return CODES[request.param]


@pytest.fixture(scope="session")
def probe(library: ctypes.CDLL, isa: int) -> Probe:
    """``probe("exp", x)`` -> what exp_terms returns for each x, in the dtype of x."""

    def call(name: str, *inputs: np.ndarray) -> list[np.ndarray]:
        inputs = [np.ascontiguousarray(x) for x in np.broadcast_arrays(*inputs)]
        dtype, size = inputs[0].dtype, inputs[0].size
        outputs = [np.full(size, 7.0, dtype) for _ in range(NUM_OUTPUTS[name])]
        pointers = [(ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)) for arrays in (inputs, outputs)]
        is_double = int(dtype == np.float64)
        getattr(library, f"probe_{name}")(isa, is_double, ctypes.c_int64(size), *pointers)
        return outputs

    return call


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative to the exact value, where that is not 0; where it is, ``got`` has to be 0, too."""
    zero = want == 0
    assert not got[zero].any()
    return float(np.max(np.abs(exact(got[~zero]) - want[~zero]) / np.abs(want[~zero]), initial=mpmath.mpf(0)))


def close_to_zero(dtype: type, low: float, high: float, count: int) -> np.ndarray:
    magnitudes = np.geomspace(low, high, count)
    return np.concatenate([-magnitudes, magnitudes]).astype(dtype)


def neighbours(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.nextafter(points, -np.inf), np.nextafter(points, np.inf)]).astype(points.dtype)


# --- exp, log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp(probe: Probe, dtype: type) -> None:
    """e^x and e^x - 1 - x for |x| <= 20, down to 1e-15, and where the float polynomial changes its power of two."""
    borders = neighbours(((np.arange(-29, 29) + 0.5) * np.log(2.0)).astype(dtype))
    series = neighbours(np.array([-0.5, 0.5], dtype))
    x = np.concatenate(
        [np.linspace(-20, 20, 3001, dtype=dtype), close_to_zero(dtype, 1e-15, 1.0, 700), borders, series]
    )
    exp, expm1_minus_x = probe("exp", x)
    e = exact(x)
    bound_exp, bound_phi = (1e-7, 1e-6) if dtype == np.float32 else (2e-16, 1e-15)
    assert largest_error(exp, exact_exp(e)) < bound_exp
    assert largest_error(expm1_minus_x, exact_expm1(e) - e) < bound_phi
    assert (expm1_minus_x >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_of_zero_and_nan(probe: Probe, dtype: type) -> None:
    exp, expm1_minus_x = probe("exp", np.array([0.0, -0.0, np.nan], dtype))
    assert exp[:2].tolist() == [1.0, 1.0]
    assert expm1_minus_x[:2].tolist() == [0.0, 0.0]
    assert np.isnan(exp[2])
    assert np.isnan(expm1_minus_x[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_log(probe: Probe, dtype: type) -> None:
    """Every positive normal number: all powers of two, near 1, and around sqrt(1/2) and sqrt(2)."""
    info = np.finfo(dtype)
    g = np.random.default_rng(0)
    powers = np.ldexp(g.uniform(1, 2, 4000), g.integers(info.minexp, info.maxexp, 4000)).astype(dtype)
    near_one = (1.0 + close_to_zero(np.float64, float(info.eps), 0.3, 700)).astype(dtype)
    borders = neighbours(np.array([0.5**0.5, 2.0**0.5, 1.0, 0.5, 2.0], dtype))
    x = np.concatenate([powers, near_one, borders, np.array([info.tiny, info.max], dtype)])
    (log,) = probe("log", x)
    assert largest_error(log, exact_log(exact(x))) < (2e-7 if dtype == np.float32 else 2e-16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_of_what_has_none(probe: Probe, dtype: type) -> None:
    """A std that is 0, negative, subnormal, infinite or NaN is a fault and has to show."""
    tiny = np.finfo(dtype).tiny
    x = np.array([0.0, -0.0, -1.0, -np.inf, np.inf, np.nan, tiny / 2, np.nextafter(dtype(tiny), dtype(0))], dtype)
    (log,) = probe("log", x)
    assert np.isnan(log).all()


# --- the ratio of two standard deviations, KL -------------------------------------------------------------------------


def pairs_of_stds(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Ratios from 1 ± 1e-7 to 1e±18, and around sqrt(1/2), sqrt(2) and 1 ± 0.4, where the formulas change."""
    g = np.random.default_rng(1)
    ratios = np.concatenate(
        [
            1.0 + close_to_zero(np.float64, 1e-7 if dtype == np.float32 else 1e-15, 0.6, 1200),
            np.geomspace(1e-18, 1e18, 1200),
            neighbours(np.array([0.5**0.5, 2.0**0.5, 0.6, 1.4], dtype)).astype(np.float64),
        ]
    )
    q = np.exp(g.uniform(-7, 7, ratios.size))
    q[-12:] = 1.0
    return (q * ratios).astype(dtype), q.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_of_stds(probe: Probe, dtype: type) -> None:
    """e^{2d} - 1 and e^{2d} - 1 - 2d with d = log(p / q), relative to themselves however close p and q are."""
    p, q = pairs_of_stds(dtype)
    expm1, phi = probe("ratio", p, q)
    ratio = exact(p) / exact(q)
    want = ratio**2 - 1
    bound_expm1, bound_phi = (4e-7, 1.2e-6) if dtype == np.float32 else (1e-15, 3e-15)
    assert largest_error(expm1, want) < bound_expm1
    assert largest_error(phi, want - 2 * exact_log(ratio)) < bound_phi
    assert (phi >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_of_equal_stds(probe: Probe, dtype: type) -> None:
    """Exactly 0, whatever 1/q rounds to."""
    q = np.exp(np.random.default_rng(2).uniform(-30, 30, 5000)).astype(dtype)
    expm1, phi = probe("ratio", q, q)
    assert not expm1.any()
    assert not phi.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, -np.inf, np.nan])
def test_ratio_with_what_is_no_std(probe: Probe, dtype: type, bad: float) -> None:
    p, q = np.array([bad, 1.0, bad], dtype), np.array([1.0, bad, bad], dtype)
    for out in probe("ratio", p, q):
        assert np.isnan(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_at_the_ends_of_the_numbers(probe: Probe, dtype: type) -> None:
    """A subnormal std is none, whatever it is divided by. Of two that are, the ratio may leave the normal numbers."""
    info = np.finfo(dtype)
    subnormal, small, large = info.tiny / 2, info.tiny * 4, info.max / 4
    expm1, phi = probe("ratio", np.array([subnormal] * 3, dtype), np.array([small, 1.0, subnormal], dtype))
    assert np.isnan([expm1, phi]).all()
    expm1, phi = probe("ratio", np.array([large], dtype), np.array([small], dtype))
    assert (np.array([expm1, phi]) == np.inf).all()
    expm1, phi = probe("ratio", np.array([small], dtype), np.array([large], dtype))
    if dtype == np.float32:
        assert np.isnan([expm1, phi]).all()
    else:
        assert expm1 == -1.0
        assert phi[0] == pytest.approx(-1.0 - 2.0 * (np.log(small) - np.log(large)), rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl(probe: Probe, dtype: type) -> None:
    """KL(p‖q) and its derivatives with respect to mean_p, log std_p, log std_q."""
    p, q = pairs_of_stds(dtype)
    keep = (p / q > 1e-6) & (p / q < 1e6)
    p, q = p[keep], q[keep]
    g = np.random.default_rng(3)
    mean_q = g.standard_normal(p.size).astype(dtype)
    shift = g.choice([0.0, 1e-6, 1e-3, 1.0, 30.0], p.size) * g.standard_normal(p.size) * q
    mean_p = (mean_q + shift).astype(dtype)
    value, d_mean_p, d_log_std_p, d_log_std_q = probe("kl", mean_p, p, mean_q, q)
    ratio, m = exact(p) / exact(q), (exact(mean_p) - exact(mean_q)) / exact(q)
    bound = 1e-6 if dtype == np.float32 else 3e-15
    want = (ratio**2 - 1 - 2 * exact_log(ratio) + m**2) / 2
    assert largest_error(value, want) < bound
    assert (value >= 0).all()
    assert largest_error(d_mean_p, m / exact(q)) < bound
    assert largest_error(d_log_std_p, ratio**2 - 1) < bound
    # a sum of two terms that may cancel: relative to them
    error = np.abs(exact(d_log_std_q) - (1 - ratio**2 - m**2)) / (np.abs(ratio**2 - 1) + m**2)
    assert float(np.max(error)) < bound


# --- the surrogate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_surrogate(probe: Probe, dtype: type) -> None:
    """Ratio, loss, derivative and k3 for log-ratios up to ±100; beyond ±20 exp is that of ±20."""
    g = np.random.default_rng(4)
    near = g.uniform(-0.6, 0.6, 2000)
    far = np.concatenate([np.linspace(-20, 20, 400), np.linspace(-100, 100, 100)])
    log_ratio = np.concatenate([near, far, close_to_zero(np.float64, 1e-7, 1e-2, 200)]).astype(dtype)
    advantage = g.standard_normal(log_ratio.size).astype(dtype)
    lo, hi = dtype(0.8), dtype(1.2)
    ratio, loss, d_log_prob, approx_kl, outside = probe("surrogate", log_ratio, advantage, lo, hi)
    e = exact(log_ratio)
    clamped = np.array([max(min(x, mpmath.mpf(20)), mpmath.mpf(-20)) for x in e])
    r = exact_exp(clamped)
    assert ((r - float(lo) != 0) & (r - float(hi) != 0)).all()
    low, high, a = mpmath.mpf(float(lo)), mpmath.mpf(float(hi)), exact(advantage)
    clipped = np.array([max(min(x, high), low) for x in r])
    unclipped_counts = (-a * r > -a * clipped) | ((r >= low) & (r <= high))
    bound = 1.5e-7 if dtype == np.float32 else 4e-16
    assert largest_error(ratio, r) < bound
    assert largest_error(loss, np.maximum(-a * r, -a * clipped)) < bound
    assert largest_error(d_log_prob, np.where(unclipped_counts, -a * r, mpmath.mpf(0))) < bound
    assert outside.tolist() == [float(x < low or x > high) for x in r]
    want_kl = exact_expm1(clamped) - clamped + np.abs(e - clamped)
    assert largest_error(approx_kl, want_kl) < (1e-6 if dtype == np.float32 else 1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_ratio", [np.nan, np.inf, -np.inf])
def test_surrogate_of_a_log_ratio_that_is_not_finite(probe: Probe, dtype: type, log_ratio: float) -> None:
    advantage = np.array([-1.0, 0.0, 1.0], dtype)
    ratio, loss, d_log_prob, approx_kl, _ = probe("surrogate", dtype(log_ratio), advantage, dtype(0.8), dtype(1.2))
    for out in (ratio, loss, d_log_prob):
        assert np.isnan(out).all()
    assert (np.isnan(approx_kl) if np.isnan(log_ratio) else approx_kl == np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_k3_grows_with_the_distance(probe: Probe, dtype: type) -> None:
    """On either side, to infinity: e^x is clamped."""
    log_ratio = np.concatenate([np.linspace(0, 30, 200), np.geomspace(30, 1e30, 200), [np.inf]]).astype(dtype)
    for sign in (1, -1):
        approx_kl = probe("surrogate", sign * log_ratio, dtype(1.0), dtype(0.8), dtype(1.2))[3]
        assert (np.diff(approx_kl[:-1]) >= 0).all()
        assert approx_kl[-1] == np.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_surrogate_at_the_bounds(probe: Probe, dtype: type) -> None:
    """At a bound the gradient flows as inside: clamp passes it, and the two halves of max's tie add up."""
    advantage = np.array([-2.0, 2.0], dtype)
    for log_ratio in (0.4, -0.4):
        ratio = probe("surrogate", dtype(log_ratio), dtype(1.0), dtype(0.1), dtype(9.0))[0][0]
        for lo, hi in ((ratio, dtype(9.0)), (dtype(0.1), ratio)):
            _, loss, d_log_prob, _, outside = probe("surrogate", dtype(log_ratio), advantage, lo, hi)
            assert d_log_prob.tolist() == (-advantage * ratio).tolist()
            assert loss.tolist() == (-advantage * ratio).tolist()
            assert not outside.any()
        # one number further in, the ratio is outside: only where clipping makes it better does the gradient stop
        _, _, d_log_prob, _, outside = probe(
            "surrogate", dtype(log_ratio), advantage, dtype(0.1), np.nextafter(ratio, dtype(0))
        )
        assert d_log_prob.tolist() == [float(2 * ratio), 0.0]
        assert outside.all()
        _, _, d_log_prob, _, outside = probe(
            "surrogate", dtype(log_ratio), advantage, np.nextafter(ratio, dtype(9)), dtype(9.0)
        )
        assert d_log_prob.tolist() == [0.0, float(-2 * ratio)]
        assert outside.all()


# --- the value loss ---------------------------------------------------------------------------------------------------


def exact_value_terms(value: Fraction, old: Fraction, target: Fraction, clip: Fraction) -> tuple[Fraction, Fraction]:
    """torch's rules: a tie of max gives each half of the gradient, clamp passes it at its bounds."""
    step = max(min(value - old, clip), -clip)
    error, clipped_error = value - target, old + step - target
    first = (
        Fraction(1) if error**2 > clipped_error**2 else Fraction(1, 2) if error**2 == clipped_error**2 else Fraction(0)
    )
    passes = 1 if -clip <= value - old <= clip else 0
    return max(error**2, clipped_error**2), 2 * (first * error + (1 - first) * passes * clipped_error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_value_loss_is_exact(probe: Probe, dtype: type) -> None:
    """On a grid of eighths, on which nothing rounds and ties of every kind occur."""
    eighths = np.arange(-8, 9) / 8
    value, old, target, clip = (x.ravel() for x in np.meshgrid(eighths, [0.0, 0.5], eighths, [0.0, 0.125, 0.25, 1.0]))
    loss, d_value = probe("clipped_value", *(x.astype(dtype) for x in (value, old, target, clip)))
    want = [exact_value_terms(*map(Fraction, row)) for row in zip(value, old, target, clip, strict=True)]
    assert loss.tolist() == [float(w[0]) for w in want]
    assert d_value.tolist() == [float(w[1]) for w in want]
    ties = sum(
        2 * abs(w[1]) == 2 * abs(Fraction(v) - Fraction(t)) != 0 for w, v, t in zip(want, value, target, strict=True)
    )
    assert ties > 10, "the grid has no tie outside of the clip range"


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_value_loss_is_exact(probe: Probe, dtype: type) -> None:
    eighths = (np.arange(-8, 9) / 8).astype(dtype)
    value, target = (x.ravel() for x in np.meshgrid(eighths, eighths))
    loss, d_value = probe("plain_value", value, target)
    assert loss.tolist() == ((value - target) ** 2).tolist()
    assert d_value.tolist() == (2 * (value - target)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_loss_shows_what_is_not_finite(probe: Probe, dtype: type, which: int, bad: float) -> None:
    inputs = [dtype(0.5), dtype(0.25), dtype(1.0), dtype(0.2)]
    inputs[which] = dtype(bad)
    loss, _ = probe("clipped_value", *(np.array([x], dtype) for x in inputs))
    assert not np.isfinite(loss).any()


# --- small floating-point types ---------------------------------------------------------------------------------------

SMALL = {"half": torch.float16, "bfloat16": torch.bfloat16}


def as_bits(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.int16).numpy().view(np.uint16)


def convert(library: ctypes.CDLL, isa: int, name: str, x: np.ndarray, dtype: type) -> np.ndarray:
    out = np.empty(x.size, dtype)
    getattr(library, name)(
        isa, ctypes.c_int64(x.size), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data)
    )
    return out


@pytest.mark.parametrize("small", SMALL)
def test_widening_every_small_number(library: ctypes.CDLL, isa: int, small: str) -> None:
    """All 65536, subnormals and infinities among them, to the bit; NaN to NaN."""
    bits = np.arange(65536, dtype=np.uint16)
    got = convert(library, isa, f"probe_{small}_to_float", bits, np.float32)
    want = torch.from_numpy(bits.view(np.int16)).view(SMALL[small]).float().numpy()
    nan = np.isnan(want)
    assert np.isnan(got[nan]).all()
    assert (got[~nan].view(np.uint32) == want[~nan].view(np.uint32)).all()


@pytest.mark.parametrize("small", SMALL)
def test_narrowing_rounds_to_nearest_even(library: ctypes.CDLL, isa: int, small: str) -> None:
    """Every small number, every midpoint between two of them, and the floats on both sides of each."""
    numbers = torch.arange(0x7FFF + 1, dtype=torch.int32).to(torch.int16).view(SMALL[small]).double().numpy()
    numbers = numbers[np.isfinite(numbers)]
    largest = numbers[-1] + (numbers[-1] - numbers[-2]) / 2  # from here on infinity is nearer
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, [largest]])
    with np.errstate(over="ignore"):
        points = neighbours(points.astype(np.float32))
    points = np.concatenate(
        [points, -points, np.array([1e-45, 1e-40, 1e30, 3e38, np.inf, -np.inf, 0.0, -0.0], np.float32)]
    )
    got = convert(library, isa, f"probe_float_to_{small}", points, np.uint16)
    want = as_bits(torch.from_numpy(points).to(SMALL[small]))
    assert (got == want).all(), points[got != want][:5]


@pytest.mark.parametrize("small", SMALL)
def test_narrowing_nan(library: ctypes.CDLL, isa: int, small: str) -> None:
    """Whatever its payload: dropping bits must not turn it into an infinity."""
    bits = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001, 0x7F801000], np.uint32)
    got = convert(library, isa, f"probe_float_to_{small}", bits.view(np.float32), np.uint16)
    assert torch.from_numpy(got.view(np.int16)).view(SMALL[small]).isnan().all()
