"""exp and log of one number, and one dimension of a Gaussian, in the forms of ``csrc/math`` and with its constants.

Triton has no expm1 or log1p on every device, and its exp is an approximation whose error grows with the argument. These
are polynomials in float32. Their largest errors against exact values are in ``tests/triton_kernels/test_math.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LOG_RATIO = tl.constexpr(20.0)
HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)
HALF_LOG_2PI_E = tl.constexpr(1.41893853320467274178)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
LARGEST = tl.constexpr(3.4028234663852886e38)

# Direction of the KL, the policy that was sampled, the form: the places in reference.KL_LOSSES
OLD_NEW_OLD_K1, OLD_NEW_OLD_K3 = tl.constexpr(0), tl.constexpr(1)
NEW_OLD_OLD_K1, NEW_OLD_OLD_K2, NEW_OLD_OLD_K3 = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
NEW_OLD_NEW_K1, NEW_OLD_NEW_K2, NEW_OLD_NEW_K3 = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
OLD_NEW_NEW_K1, OLD_NEW_NEW_K3 = tl.constexpr(8), tl.constexpr(9)


@triton.jit
def is_positive_normal(x):
    """Neither zero, negative, subnormal, infinite nor NaN: what a standard deviation has to be."""
    return (x >= SMALLEST_NORMAL) & (x <= LARGEST)


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def reciprocal_or_nan(x):
    """1/x, rounded correctly: a plain division is off by up to two units on a GPU, too many for ``ratio_terms``."""
    return tl.where(is_positive_normal(x), tl.div_rn(1.0, x), float("nan"))


@triton.jit
def exp_terms(x):
    """(eˣ, eˣ - 1 - x), the latter never as a difference of near-equal numbers. |x| <= MAX_LOG_RATIO or NaN."""
    # x = n ln 2 + f with |f| <= ln(2)/2; adding and subtracting 1.5 * 2^23 rounds to the nearest integer
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    f = (x - n * 0.693145752) - n * 1.42860677e-6
    # e^f = 1 + f + f^2 q, Taylor to f^7
    q = 8.33333333e-3 + f * (1.38888889e-3 + f * 1.98412698e-4)
    q = 0.5 + f * (1.66666667e-1 + f * (4.16666667e-2 + f * q))
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^n
    expm1_f = f + f * f * q
    return power + power * expm1_f, tl.where(n == 0.0, f * f * q, (power * expm1_f + (power - 1.0)) - x)


@triton.jit
def k3(expm1_minus_x, x):
    """eˣ - 1 - x from that of x clamped; beyond the clamp it grows by the distance, so that it is never negative."""
    distance = tl.abs(x) - MAX_LOG_RATIO  # not from x and the clamped x: to keep both would spill registers
    return expm1_minus_x + tl.where(distance > 0.0, distance, 0.0)


@triton.jit
def log1p_remainder(x):
    """(x - log(1 + x)) / x² for 1 + x in [sqrt(1/2), sqrt(2)): minimax to 8e-9."""
    total = 1.16315447e-1 - x * 6.90237209e-2
    total = -1.17914788e-1 + x * total
    total = 1.24062918e-1 + x * total
    total = -1.42331809e-1 + x * total
    total = 1.66684628e-1 + x * total
    total = -2.00014457e-1 + x * total
    total = 2.49999911e-1 + x * total
    total = -3.33333224e-1 + x * total
    return 0.5 + x * total


@triton.jit
def binary_exponent(x):
    """(e, m) with x = 2ᵉ m and m in [sqrt(1/2), sqrt(2)), for a positive normal x."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    return exponent.to(tl.float32), (bits - (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log_or_nan(x):
    """log x; NaN for what is not a positive normal number, so that such a std shows."""
    exponent, mantissa = binary_exponent(x)
    m1 = mantissa - 1.0
    result = exponent * 0.693147181 + (m1 - m1 * m1 * log1p_remainder(m1))
    return tl.where(is_positive_normal(x), result, float("nan"))


@triton.jit
def ratio_terms(p, q, inv_q):
    """(e²ᵈ - 1, e²ᵈ - 1 - 2d) for d = log(p/q) of two stds, accurate however close they are; see csrc/math."""
    e = (p - q) * inv_q
    ratio = p * inv_q
    exponent, mantissa = binary_exponent(ratio)
    near = exponent == 0.0
    m1 = tl.where(near, e, mantissa - 1.0)
    difference = m1 * m1 * log1p_remainder(m1)  # m1 - log(1 + m1)
    expm1 = e * (2.0 + e)
    phi = (tl.where(near, e * e, expm1 - 2.0 * m1) + 2.0 * difference) - exponent * 1.38629436
    valid = is_positive_normal(tl.where(p < ratio, p, ratio))
    return tl.where(valid, expm1, float("nan")), tl.where(valid, phi, float("nan"))


@triton.jit
def kl_terms(mean_p, mean_q, inv_std_q, ratio_expm1, ratio_phi):
    """KL(p‖q) in one dimension and its derivatives in mean_p, log std_p and log std_q (mean_q: the first, negated)."""
    m = (mean_p - mean_q) * inv_std_q
    return 0.5 * (ratio_phi + m * m), m * inv_std_q, ratio_expm1, -(ratio_expm1 + m * m)


@triton.jit
def kl_loss_terms(x, WHICH: tl.constexpr):
    """(value, coefficient) of a loss in the log-ratio x; ``WHICH`` is its place in ``reference.KL_LOSSES``."""
    clamped = tl.where(x < -MAX_LOG_RATIO, -MAX_LOG_RATIO, tl.where(x > MAX_LOG_RATIO, MAX_LOG_RATIO, x))
    r, phi = exp_terms(clamped)
    inv_r, phi_down = exp_terms(-clamped)
    k3_old = k3(phi, x)  # (r - 1) - x
    k3_new = k3(phi_down, x)  # (1/r - 1) + x
    if WHICH == OLD_NEW_OLD_K1:
        value, coefficient = -x, tl.zeros_like(x) - 1.0
    elif WHICH == OLD_NEW_OLD_K3:
        value, coefficient = k3_old, phi + clamped
    elif WHICH == NEW_OLD_OLD_K1:
        value, coefficient = r * x, r * (x + 1.0)
    elif WHICH == NEW_OLD_OLD_K2:
        value, coefficient = 0.5 * r * x * x, r * x
    elif WHICH == NEW_OLD_OLD_K3:
        value, coefficient = r * k3_new, r * x
    elif WHICH == NEW_OLD_NEW_K1:
        value, coefficient = x, x
    elif WHICH == NEW_OLD_NEW_K2:
        value, coefficient = 0.5 * x * x, x
    elif WHICH == NEW_OLD_NEW_K3:
        value, coefficient = k3_new, x
    elif WHICH == OLD_NEW_NEW_K1:
        value, coefficient = -x * inv_r, -inv_r
    else:
        tl.static_assert(WHICH == OLD_NEW_NEW_K3)
        value, coefficient = k3_new, clamped - phi_down  # 1 - 1/r
    return value, coefficient
