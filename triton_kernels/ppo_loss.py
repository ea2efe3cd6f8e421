"""The PPO loss with its metrics and all gradients in one launch.

A program takes blocks of rows in turn, each a tile [BLOCK_N, BLOCK_A], keeps its sums in registers and leaves them in
``partials``. The program that is the last to do so adds up those of all programs, in a fixed order, and writes the
metrics and the gradient of a shared std. The same inputs thus give the same bits; nothing is added up by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    HALF_LOG_2PI,
    HALF_LOG_2PI_E,
    MAX_LOG_RATIO,
    exp_terms,
    is_finite,
    is_positive_normal,
    k3,
    kl_terms,
    log_or_nan,
    ratio_terms,
    reciprocal_or_nan,
)

# The metrics' places, in ``partials`` as in the result: those of reference.METRICS
LOSS, SURROGATE, VALUE_LOSS, ENTROPY, KL = (tl.constexpr(i) for i in range(5))
APPROX_KL, CLIP_FRACTION, MAX_RATIO, NONFINITE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
NUM_METRICS = tl.constexpr(9)
NUM_SUMS = tl.constexpr(16)  # places in a row of ``partials`` before the std's columns: the next power of two


@triton.jit
def _max_weight(first, second):
    """The share of max(first, second)'s gradient that goes to first: torch splits a tie in halves."""
    return tl.where(first > second, 1.0, tl.where(first == second, 0.5, 0.0))


@triton.jit
def surrogate_terms(log_ratio, advantage, lo, hi):
    """(ratio, loss, d loss / d log π, k3, whether outside the clip range) of each row; as csrc/math/ppo.h."""
    clamped = tl.where(log_ratio < -MAX_LOG_RATIO, -MAX_LOG_RATIO, log_ratio)
    clamped = tl.where(clamped > MAX_LOG_RATIO, MAX_LOG_RATIO, clamped)
    ratio, expm1_minus_x = exp_terms(clamped)
    ratio = tl.where(is_finite(log_ratio), ratio, float("nan"))  # so that an infinite one shows
    clipped = tl.where(ratio < lo, lo, tl.where(ratio > hi, hi, ratio))
    inside = (ratio >= lo) & (ratio <= hi)
    plain_loss = -advantage * ratio
    clipped_loss = -advantage * clipped
    passed = tl.where(inside, 1.0, _max_weight(plain_loss, clipped_loss))
    loss = tl.where(plain_loss > clipped_loss, plain_loss, clipped_loss)
    outside = tl.where((ratio < lo) | (ratio > hi), 1.0, 0.0)
    return ratio, loss, plain_loss * passed, k3(expm1_minus_x, log_ratio), outside


@triton.jit
def value_terms(value, old_value, target, clip, CLIPPED: tl.constexpr):
    """(loss, d loss / d value): max((v - R)², (v_c - R)²) with v_c = v_old + clamp(v - v_old), or (v - R)²."""
    error = value - target
    loss = error * error
    if CLIPPED:
        step = value - old_value
        clipped_step = tl.where(step < -clip, -clip, tl.where(step > clip, clip, step))
        inside = tl.where((step >= -clip) & (step <= clip), 1.0, 0.0)
        clipped_error = (old_value + clipped_step) - target
        clipped_loss = clipped_error * clipped_error
        weight = _max_weight(loss, clipped_loss)
        derivative = 2.0 * (weight * error + (1.0 - weight) * inside * clipped_error)
        loss = tl.where(loss > clipped_loss, loss, clipped_loss)
    else:
        derivative = 2.0 * error
    return loss, derivative


@triton.jit
def _as_column(vector, which: tl.constexpr):
    """[n] as column ``which`` of a matrix [n, NUM_SUMS] of zeros."""
    return tl.where(tl.arange(0, NUM_SUMS)[None, :] == which, vector[:, None], 0.0)


@triton.jit
def _entry(vector, which: tl.constexpr):
    """vector[which] of [NUM_SUMS]."""
    return tl.sum(tl.where(tl.arange(0, NUM_SUMS) == which, vector, 0.0), 0)


@triton.jit
def _in_memory(pointer, given_as_tensor, which: tl.constexpr):
    """A coefficient's present value if it was given as a tensor, else 0."""
    return tl.load(pointer, mask=(given_as_tensor & (1 << which)) != 0, other=0.0).to(tl.float32)


# may be slices, which begin anywhere: read 32 bits at a time in any case, so that must not cost a compilation
_VECTORS = ["values_ptr", "old_log_prob_ptr", "advantages_ptr", "returns_ptr", "old_values_ptr"]
_COEFFICIENTS = ["clip_param_ptr", "value_loss_coef_ptr", "entropy_coef_ptr", "kl_coef_ptr"]


@triton.jit(
    do_not_specialize=["coefficient_tensors", "num_rows", "num_original"],
    do_not_specialize_on_alignment=_VECTORS + _COEFFICIENTS,
)
def ppo_loss_kernel(
    mean_ptr,  # [N, A]
    std_ptr,  # [A] or [N, A]
    values_ptr,  # [N]
    actions_ptr,  # [N, A]
    old_log_prob_ptr,  # [N]
    old_mean_ptr,  # [num_original or N, A]
    old_std_ptr,  # [A] or [num_original or N, A]
    advantages_ptr,  # [N]
    returns_ptr,  # [N]
    old_values_ptr,  # [N]
    clip_param_ptr,  # 0-dim, read if bit 0 of coefficient_tensors is set; so are the next three
    value_loss_coef_ptr,
    entropy_coef_ptr,
    kl_coef_ptr,
    clip_param,  # the numbers; 0 where the pointer counts
    value_loss_coef,
    entropy_coef,
    kl_coef,
    clip_low,  # 1 - clip_param and 1 + clip_param, rounded once; 1 where the pointer counts
    clip_high,
    coefficient_tensors,
    metrics_ptr,  # [NUM_METRICS]
    grad_mean_ptr,  # [N, A]
    grad_std_ptr,  # as std, contiguous
    grad_values_ptr,  # [N]
    partials_ptr,  # [programs, NUM_SUMS + BLOCK_A]
    counter_ptr,  # programs that are done: 0 before and after
    num_rows,
    num_original,
    A: tl.constexpr,
    MEAN_STRIDE: tl.constexpr,  # elements from row to row; constants, so that the width of loads is known
    STD_STRIDE: tl.constexpr,  # 0: one row for all
    ACTIONS_STRIDE: tl.constexpr,
    OLD_MEAN_STRIDE: tl.constexpr,
    OLD_STD_STRIDE: tl.constexpr,  # 0: one row for all
    CLIP_VALUE: tl.constexpr,
    KL_NEW_OLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    clip_in_memory = _in_memory(clip_param_ptr, coefficient_tensors, 0)
    clip_param += clip_in_memory
    lo, hi = clip_low - clip_in_memory, clip_high + clip_in_memory
    clip_fault = tl.where(clip_param >= 0.0, 0.0, float("nan")).to(tl.float64)  # shows in every log-ratio
    row_weight = 1.0 / num_rows.to(tl.float32)
    original_weight = 1.0 / num_original.to(tl.float32)
    value_weight = row_weight * (value_loss_coef + _in_memory(value_loss_coef_ptr, coefficient_tensors, 1))
    entropy_weight = original_weight * (entropy_coef + _in_memory(entropy_coef_ptr, coefficient_tensors, 2))
    kl_weight = original_weight * (kl_coef + _in_memory(kl_coef_ptr, coefficient_tensors, 3))

    cols = tl.arange(0, BLOCK_A)
    col_mask = cols < A
    if STD_STRIDE == 0:
        shared_std = tl.load(std_ptr + cols, mask=col_mask, other=1.0).to(tl.float32)
        shared_inv_std = reciprocal_or_nan(shared_std)
        log_normalizer = tl.sum(log_or_nan(shared_std), 0).to(tl.float64) + A * HALF_LOG_2PI + clip_fault
    else:
        log_normalizer = clip_fault + A * HALF_LOG_2PI
    if OLD_STD_STRIDE == 0:
        shared_old_std = tl.load(old_std_ptr + cols, mask=col_mask, other=1.0).to(tl.float32)
        if KL_NEW_OLD:
            shared_inv_old_std = reciprocal_or_nan(shared_old_std)

    surrogate_sum = tl.zeros([BLOCK_N], tl.float32)
    value_sum = tl.zeros([BLOCK_N], tl.float32)
    log_std_sum = tl.zeros([BLOCK_N], tl.float32)
    kl_sum = tl.zeros([BLOCK_N], tl.float32)
    approx_kl_sum = tl.zeros([BLOCK_N], tl.float32)
    outside_sum = tl.zeros([BLOCK_N], tl.float32)
    nonfinite_sum = tl.zeros([BLOCK_N], tl.float32)
    max_ratio = tl.zeros([BLOCK_N], tl.float32)
    if STD_STRIDE == 0:
        d_log_std_sum = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)

    for tile in range(program, tl.cdiv(num_rows, BLOCK_N), num_programs):
        first = (tile + tl.full([], 0, tl.int64)) * BLOCK_N  # the interpreter's loops count in Python's own integers
        rows = tl.arange(0, BLOCK_N)
        in_rows = first + rows < num_rows
        original = first + rows < num_original
        mask = in_rows[:, None] & col_mask[None, :]
        kl_mask = original[:, None] & col_mask[None, :]
        mean = tl.load(
            mean_ptr + first * MEAN_STRIDE + rows[:, None] * MEAN_STRIDE + cols[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        actions = tl.load(
            actions_ptr + first * ACTIONS_STRIDE + rows[:, None] * ACTIONS_STRIDE + cols[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        old_mean = tl.load(
            old_mean_ptr + first * OLD_MEAN_STRIDE + rows[:, None] * OLD_MEAN_STRIDE + cols[None, :],
            mask=kl_mask,
            other=0.0,
        ).to(tl.float32)
        if STD_STRIDE == 0:
            std, inv_std = shared_std[None, :], shared_inv_std[None, :]
        else:
            std = tl.load(
                std_ptr + first * STD_STRIDE + rows[:, None] * STD_STRIDE + cols[None, :], mask=mask, other=1.0
            ).to(tl.float32)
            inv_std = reciprocal_or_nan(std)
        if OLD_STD_STRIDE == 0:
            old_std = shared_old_std[None, :]
        else:
            old_std = tl.load(
                old_std_ptr + first * OLD_STD_STRIDE + rows[:, None] * OLD_STD_STRIDE + cols[None, :],
                mask=kl_mask,
                other=1.0,
            ).to(tl.float32)
        values = tl.load(values_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)
        old_log_prob = tl.load(old_log_prob_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)
        advantages = tl.load(advantages_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)
        returns = tl.load(returns_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)
        old_values = tl.load(old_values_ptr + first + rows, mask=in_rows, other=0.0).to(tl.float32)

        # --- the distribution: one element each
        z = (actions - mean) * inv_std
        # by a selection: the product at its end would be fused with the sum's first addition, in each lane another one,
        # and what the lanes of a row hold as its sum would differ in the last place
        term = tl.where(mask, 0.5 * z * z, 0.0)
        if STD_STRIDE != 0:
            log_std = log_or_nan(std)
            term += log_std
            log_std_sum += tl.sum(tl.where(kl_mask, log_std, 0.0), 1)
        if KL_NEW_OLD:
            if OLD_STD_STRIDE == 0:
                inv_old_std = shared_inv_old_std[None, :]
            else:
                inv_old_std = reciprocal_or_nan(old_std)
            ratio_expm1, ratio_phi = ratio_terms(std, old_std, inv_old_std)
            kl, kl_d_mean, kl_d_log_std, _ = kl_terms(mean, old_mean, inv_old_std, ratio_expm1, ratio_phi)
        else:
            ratio_expm1, ratio_phi = ratio_terms(old_std, std, inv_std)
            kl, kl_d_old_mean, _, kl_d_log_std = kl_terms(old_mean, mean, inv_std, ratio_expm1, ratio_phi)
            kl_d_mean = -kl_d_old_mean
        not_finite = (old_mean - old_mean) + tl.where(is_positive_normal(old_std), 0.0, float("nan"))
        row_not_finite = tl.sum(tl.where(kl_mask, not_finite, 0.0), 1)

        # --- the losses: one row each
        log_ratio = (-tl.sum(term, 1).to(tl.float64) - (log_normalizer + old_log_prob.to(tl.float64))).to(tl.float32)
        ratio, surrogate, d_log_prob, approx_kl, outside = surrogate_terms(log_ratio, advantages, lo, hi)
        value_loss, d_value = value_terms(values, old_values, returns, clip_param, CLIP_VALUE)
        tl.store(
            grad_values_ptr + first + rows,
            (value_weight * d_value).to(grad_values_ptr.dtype.element_ty),
            mask=in_rows,
        )
        finite = is_finite(log_ratio) & is_finite(advantages) & is_finite(values)
        finite = finite & is_finite(old_values) & is_finite(returns) & (row_not_finite == 0.0)
        coefficient = tl.where(in_rows, row_weight * d_log_prob, 0.0)
        surrogate_sum += tl.where(in_rows, surrogate, 0.0)
        value_sum += tl.where(in_rows, value_loss, 0.0)
        kl_sum += tl.sum(tl.where(kl_mask, kl, 0.0), 1)
        approx_kl_sum += tl.where(in_rows, approx_kl, 0.0)
        outside_sum += tl.where(in_rows, outside, 0.0)
        nonfinite_sum += tl.where(in_rows & (finite == 0), 1.0, 0.0)
        max_ratio = tl.where(in_rows & (ratio > max_ratio), ratio, max_ratio)

        # --- the gradients: one element each
        weighted = coefficient[:, None] * z
        # where its weight is 0, a KL that overflows must not reach the gradients
        kl_d_mean = tl.where(kl_weight != 0.0, tl.where(kl_mask, kl_weight * kl_d_mean, 0.0), 0.0)
        kl_d_log_std = tl.where(kl_weight != 0.0, tl.where(kl_mask, kl_weight * kl_d_log_std, 0.0), 0.0)
        grad_mean = inv_std * weighted + kl_d_mean
        d_log_std = (weighted * z - coefficient[:, None]) + kl_d_log_std
        offsets = first * A + rows[:, None] * A + cols[None, :]
        tl.store(grad_mean_ptr + offsets, grad_mean.to(grad_mean_ptr.dtype.element_ty), mask=mask)
        if STD_STRIDE == 0:
            d_log_std_sum += tl.where(mask, d_log_std, 0.0)
        else:
            grad_std = (d_log_std - tl.where(original, entropy_weight, 0.0)[:, None]) * inv_std
            tl.store(grad_std_ptr + offsets, grad_std.to(grad_std_ptr.dtype.element_ty), mask=mask)

    # --- this program's sums
    table = _as_column(surrogate_sum, SURROGATE)
    table += _as_column(value_sum, VALUE_LOSS) + _as_column(log_std_sum, ENTROPY)
    table += _as_column(kl_sum, KL) + _as_column(approx_kl_sum, APPROX_KL)
    table += _as_column(outside_sum, CLIP_FRACTION) + _as_column(nonfinite_sum, NONFINITE)
    which = tl.arange(0, NUM_SUMS)
    sums = tl.where(which == MAX_RATIO, tl.max(max_ratio, 0), tl.sum(table, 0))
    row = partials_ptr + program * (NUM_SUMS + BLOCK_A)
    tl.store(row + which, sums)
    if STD_STRIDE == 0:
        tl.store(row + NUM_SUMS + cols, tl.sum(d_log_std_sum, 0))

    # --- the last program adds up those of all; what only it needs is read again: kept, it would push registers out
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1:
        tl.store(counter_ptr, 0)
        _finish(
            std_ptr, metrics_ptr, grad_std_ptr, partials_ptr,
            value_loss_coef + _in_memory(value_loss_coef_ptr, coefficient_tensors, 1),
            entropy_coef + _in_memory(entropy_coef_ptr, coefficient_tensors, 2),
            kl_coef + _in_memory(kl_coef_ptr, coefficient_tensors, 3),
            num_rows, num_original, num_programs, A, STD_STRIDE == 0, BLOCK_A,
        )  # fmt: skip


@triton.jit
def _finish(
    std_ptr, metrics_ptr, grad_std_ptr, partials_ptr,
    value_loss_coef, entropy_coef, kl_coef, num_rows, num_original, num_programs,
    A: tl.constexpr, SHARED_STD: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Metrics and the gradient of a shared std from the sums of all programs.

    Nothing else runs meanwhile, so that two tiles of rows are on their way at once. Programs add in a tree of float32,
    as each did with its rows; what follows is one number per sum, in float64.
    """
    BLOCK_P: tl.constexpr = 128 if BLOCK_A <= 32 else (4096 // BLOCK_A if BLOCK_A <= 4096 else 1)
    which, cols = tl.arange(0, NUM_SUMS), tl.arange(0, BLOCK_A)
    table = tl.zeros([BLOCK_P, NUM_SUMS], tl.float32)
    max_ratio = tl.zeros([BLOCK_P], tl.float32)
    if SHARED_STD:
        std = tl.load(std_ptr + cols, mask=cols < A, other=1.0).to(tl.float32)
        d_log_std = tl.zeros([BLOCK_P, BLOCK_A], tl.float32)
    for start in range(0, num_programs, 2 * BLOCK_P):
        for half in tl.static_range(2):
            programs = start + half * BLOCK_P + tl.arange(0, BLOCK_P)
            exists = programs < num_programs
            rows = partials_ptr + programs * (NUM_SUMS + BLOCK_A)
            # .cg: past the first-level cache, which does not see what other multiprocessors wrote
            table += tl.load(rows[:, None] + which[None, :], mask=exists[:, None], other=0.0, cache_modifier=".cg")
            ratio = tl.load(rows + MAX_RATIO, mask=exists, other=0.0, cache_modifier=".cg")
            max_ratio = tl.maximum(max_ratio, ratio)
            if SHARED_STD:
                at = rows[:, None] + NUM_SUMS + cols[None, :]
                d_log_std += tl.load(at, mask=exists[:, None], other=0.0, cache_modifier=".cg")
    sums = tl.where(which == MAX_RATIO, tl.max(max_ratio, 0), tl.sum(table, 0)).to(tl.float64)
    of_original = (which == ENTROPY) | (which == KL)
    of_each_row = tl.where(of_original, 1.0 / num_original.to(tl.float64), 1.0 / num_rows.to(tl.float64))
    metrics = sums * tl.where(which >= MAX_RATIO, 1.0, of_each_row)
    if SHARED_STD:
        metrics = tl.where(which == ENTROPY, tl.sum(log_or_nan(std), 0), metrics)
    metrics += tl.where(which == ENTROPY, A * HALF_LOG_2PI_E, 0.0)
    metrics += tl.where(which == MAX_RATIO, 0.0 * _entry(metrics, APPROX_KL), 0.0)  # NaN if a ratio was
    weights = tl.where(which == SURROGATE, 1.0, tl.where(which == VALUE_LOSS, value_loss_coef, 0.0))
    weights += tl.where(which == ENTROPY, -entropy_coef, tl.where(which == KL, kl_coef, 0.0))
    # with a coefficient of 0 a KL that overflowed is left out; one of faulty rows shows
    kl_counts = tl.where(kl_coef != 0.0, 1.0, _entry(metrics, NONFINITE)) > 0.0
    last = tl.where(kl_counts, KL, ENTROPY)
    loss = tl.sum(tl.where((which >= SURROGATE) & (which <= last), weights * metrics, 0.0), 0)
    metrics = tl.where(which == LOSS, loss, metrics)
    tl.store(metrics_ptr + which, metrics.to(tl.float32), mask=which < NUM_METRICS)
    if SHARED_STD:
        grad_std = (tl.sum(d_log_std, 0) - entropy_coef) / std
        tl.store(grad_std_ptr + cols, grad_std.to(grad_std_ptr.dtype.element_ty), mask=cols < A)
