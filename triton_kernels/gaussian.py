"""Log-probability, entropy and KL of diagonal Gaussians, one number per row, and their gradients.

One tile [BLOCK_N, BLOCK_A] per program. A std of one row has stride 0; its gradient leaves each program as a partial
sum [A], in the row of ``grad_std`` that belongs to the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import HALF_LOG_2PI, HALF_LOG_2PI_E, kl_loss_terms, kl_terms, log_or_nan, ratio_terms, reciprocal_or_nan


@triton.jit
def _tile(num_rows, A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr):
    """(first row, rows within the tile, columns, which rows exist, which elements exist)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_A)
    in_rows = first + rows < num_rows
    return first, rows, cols, in_rows, in_rows[:, None] & (cols < A)[None, :]


@triton.jit
def _load(ptr, first, rows, cols, mask, A: tl.constexpr, STRIDE: tl.constexpr, other):
    if STRIDE == 0:
        # as a vector: a matrix of equal rows is aligned whatever A is, and the compiler gives all others its layout
        loaded = tl.load(ptr + cols, mask=cols < A, other=other)[None, :]
    else:
        at = ptr + first * STRIDE + rows[:, None] * STRIDE + cols[None, :]
        loaded = tl.load(at, mask=mask, other=other)
    return loaded.to(tl.float32)


@triton.jit
def _store(ptr, first, rows, cols, mask, gradient, A: tl.constexpr, SHARED: tl.constexpr):
    if SHARED:
        total = tl.sum(tl.where(mask, gradient, 0.0), 0)
        tl.store(ptr + tl.program_id(0).to(tl.int64) * A + cols, total, mask=cols < A)
    else:
        at = ptr + first * A + rows[:, None] * A + cols[None, :]
        tl.store(at, gradient.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _log_probs(
    actions_ptr, mean_ptr, std_ptr, first, rows, cols, mask,
    A: tl.constexpr, ACTIONS_STRIDE: tl.constexpr, MEAN_STRIDE: tl.constexpr, STD_STRIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N]."""
    actions = _load(actions_ptr, first, rows, cols, mask, A, ACTIONS_STRIDE, 0.0)
    mean = _load(mean_ptr, first, rows, cols, mask, A, MEAN_STRIDE, 0.0)
    std = _load(std_ptr, first, rows, cols, mask, A, STD_STRIDE, 1.0)
    z = (actions - mean) * reciprocal_or_nan(std)
    return -tl.sum(0.5 * z * z + log_or_nan(std), 1) - A * HALF_LOG_2PI


@triton.jit(do_not_specialize=["num_rows"])
def log_prob_kernel(
    actions_ptr, mean_ptr, std_ptr, out_ptr, num_rows,
    A: tl.constexpr, ACTIONS_STRIDE: tl.constexpr, MEAN_STRIDE: tl.constexpr, STD_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    total = _log_probs(
        actions_ptr, mean_ptr, std_ptr, first, rows, cols, mask, A, ACTIONS_STRIDE, MEAN_STRIDE, STD_STRIDE
    )
    tl.store(out_ptr + first + rows, total, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["old_log_prob_ptr"])
def kl_loss_kernel(
    old_log_prob_ptr, actions_ptr, mean_ptr, std_ptr, value_ptr, coefficient_ptr, num_rows,
    A: tl.constexpr, ACTIONS_STRIDE: tl.constexpr, MEAN_STRIDE: tl.constexpr, STD_STRIDE: tl.constexpr,
    WHICH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    log_prob = _log_probs(
        actions_ptr, mean_ptr, std_ptr, first, rows, cols, mask, A, ACTIONS_STRIDE, MEAN_STRIDE, STD_STRIDE
    )
    old_log_prob = tl.load(old_log_prob_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)
    value, coefficient = kl_loss_terms(log_prob - old_log_prob, WHICH)
    tl.store(value_ptr + first + rows, value, mask=in_rows)
    tl.store(coefficient_ptr + first + rows, coefficient, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["grad_ptr"])
def log_prob_backward_kernel(
    grad_ptr, actions_ptr, mean_ptr, std_ptr, grad_mean_ptr, grad_std_ptr, num_rows,
    A: tl.constexpr, ACTIONS_STRIDE: tl.constexpr, MEAN_STRIDE: tl.constexpr, STD_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    grad = tl.load(grad_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    actions = _load(actions_ptr, first, rows, cols, mask, A, ACTIONS_STRIDE, 0.0)
    mean = _load(mean_ptr, first, rows, cols, mask, A, MEAN_STRIDE, 0.0)
    inv_std = reciprocal_or_nan(_load(std_ptr, first, rows, cols, mask, A, STD_STRIDE, 1.0))
    z = (actions - mean) * inv_std
    _store(grad_mean_ptr, first, rows, cols, mask, grad * z * inv_std, A, False)
    _store(grad_std_ptr, first, rows, cols, mask, grad * (z * z - 1.0) * inv_std, A, STD_STRIDE == 0)


@triton.jit(do_not_specialize=["num_rows"])
def entropy_kernel(
    std_ptr, out_ptr, num_rows,
    A: tl.constexpr, STD_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    std = _load(std_ptr, first, rows, cols, mask, A, STD_STRIDE, 1.0)
    tl.store(out_ptr + first + rows, tl.sum(log_or_nan(std), 1) + A * HALF_LOG_2PI_E, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["grad_ptr"])
def entropy_backward_kernel(
    grad_ptr, std_ptr, grad_std_ptr, num_rows,
    A: tl.constexpr, STD_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    grad = tl.load(grad_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    std = _load(std_ptr, first, rows, cols, mask, A, STD_STRIDE, 1.0)
    _store(grad_std_ptr, first, rows, cols, mask, grad * reciprocal_or_nan(std), A, False)


@triton.jit(do_not_specialize=["num_rows"])
def kl_kernel(
    mean_p_ptr, std_p_ptr, mean_q_ptr, std_q_ptr, out_ptr, num_rows,
    A: tl.constexpr, MEAN_P_STRIDE: tl.constexpr, STD_P_STRIDE: tl.constexpr,
    MEAN_Q_STRIDE: tl.constexpr, STD_Q_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    mean_p = _load(mean_p_ptr, first, rows, cols, mask, A, MEAN_P_STRIDE, 0.0)
    std_p = _load(std_p_ptr, first, rows, cols, mask, A, STD_P_STRIDE, 1.0)
    mean_q = _load(mean_q_ptr, first, rows, cols, mask, A, MEAN_Q_STRIDE, 0.0)
    std_q = _load(std_q_ptr, first, rows, cols, mask, A, STD_Q_STRIDE, 1.0)
    inv_q = reciprocal_or_nan(std_q)
    expm1, phi = ratio_terms(std_p, std_q, inv_q)
    value, _, _, _ = kl_terms(mean_p, mean_q, inv_q, expm1, phi)
    total = tl.sum(tl.where(mask, value, 0.0), 1)  # the selection as in ppo_loss_kernel: no product before the sum
    tl.store(out_ptr + first + rows, total, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["grad_ptr"])
def kl_backward_kernel(
    grad_ptr, mean_p_ptr, std_p_ptr, mean_q_ptr, std_q_ptr, grad_mean_p_ptr, grad_std_p_ptr, grad_std_q_ptr, num_rows,
    A: tl.constexpr, MEAN_P_STRIDE: tl.constexpr, STD_P_STRIDE: tl.constexpr,
    MEAN_Q_STRIDE: tl.constexpr, STD_Q_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    first, rows, cols, in_rows, mask = _tile(num_rows, A, BLOCK_N, BLOCK_A)
    grad = tl.load(grad_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    mean_p = _load(mean_p_ptr, first, rows, cols, mask, A, MEAN_P_STRIDE, 0.0)
    std_p = _load(std_p_ptr, first, rows, cols, mask, A, STD_P_STRIDE, 1.0)
    mean_q = _load(mean_q_ptr, first, rows, cols, mask, A, MEAN_Q_STRIDE, 0.0)
    std_q = _load(std_q_ptr, first, rows, cols, mask, A, STD_Q_STRIDE, 1.0)
    inv_q = reciprocal_or_nan(std_q)
    expm1, phi = ratio_terms(std_p, std_q, inv_q)
    _, d_mean_p, d_log_std_p, d_log_std_q = kl_terms(mean_p, mean_q, inv_q, expm1, phi)
    _store(grad_mean_p_ptr, first, rows, cols, mask, grad * d_mean_p, A, False)
    _store(grad_std_p_ptr, first, rows, cols, mask, grad * d_log_std_p / std_p, A, STD_P_STRIDE == 0)
    _store(grad_std_q_ptr, first, rows, cols, mask, grad * d_log_std_q * inv_q, A, STD_Q_STRIDE == 0)
