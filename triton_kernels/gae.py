"""Generalised advantage estimation: environments side by side, time as a scan from the last step to the first.

A_t = δ_t + c_t A_{t+1} with c_t = γλ, or 0 where an episode ends, is a linear recurrence: pairs (c, δ) combine
associatively, so that a block of steps is loaded at once and scanned, instead of one step after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_E = 32
NUM_WARPS = 4  # 8 steps of 32 environments a thread
NORMALIZE_BLOCK = 1024

# the lanes of a warp are environments, so no alignment makes a load wider, and a slice must not cost a compilation
_INPUTS = ["rewards_ptr", "values_ptr", "dones_ptr", "time_outs_ptr", "final_values_ptr", "last_values_ptr"]


def block_t(num_steps: int) -> int:
    """Steps that are scanned at once; T is the same in every iteration of a training."""
    return min(32, triton.next_power_of_2(num_steps))


@triton.jit
def _then(c_later, d_later, c, d):
    """First the later steps, then the earlier ones. Where c is 0, what comes later must not matter, not even as NaN."""
    return c * c_later, tl.where(c == 0.0, d, d + c * d_later)


@triton.jit
def _merge_moments(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """(count, mean, sum of squared deviations) of two sets together (Chan et al. 1983)."""
    n = n_a + n_b
    share = tl.where(n > 0.0, tl.div_rn(n_b, tl.where(n > 0.0, n, 1.0)), 0.0)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share


@triton.jit(do_not_specialize=["num_steps", "num_envs"], do_not_specialize_on_alignment=_INPUTS)
def gae_kernel(
    rewards_ptr,  # [T, E]; so are the next four; any strides
    values_ptr,
    dones_ptr,
    time_outs_ptr,
    final_values_ptr,
    last_values_ptr,  # [E]
    advantages_ptr,  # [T, E], contiguous
    returns_ptr,
    moments_ptr,  # [3, programs]: count, mean and squared deviations of each program's advantages
    gamma,
    gamma_lam,
    num_steps,
    num_envs,
    rewards_stride_t, rewards_stride_e, values_stride_t, values_stride_e, dones_stride_t, dones_stride_e,
    time_outs_stride_t, time_outs_stride_e, final_values_stride_t, final_values_stride_e, last_values_stride,
    HAS_TIME_OUTS: tl.constexpr,
    HAS_FINAL_VALUES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    envs = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_envs = envs < num_envs
    offsets_e = envs.to(tl.int64)
    last_values = tl.load(last_values_ptr + offsets_e * last_values_stride, mask=in_envs, other=0.0).to(tl.float32)
    later = tl.zeros([BLOCK_E], tl.float32)  # the advantage of the step after the block
    count = tl.zeros([BLOCK_E], tl.float32)
    mean = tl.zeros([BLOCK_E], tl.float32)
    m2 = tl.zeros([BLOCK_E], tl.float32)
    for block in range(tl.cdiv(num_steps, BLOCK_T) - 1, -1, -1):
        # from the last step of the block to its first, so that the scan runs forwards
        steps = (block * BLOCK_T + (BLOCK_T - 1) - tl.arange(0, BLOCK_T))[:, None]
        in_steps = steps < num_steps
        mask = in_steps & in_envs[None, :]
        t, e = steps.to(tl.int64), offsets_e[None, :]
        rewards = tl.load(rewards_ptr + t * rewards_stride_t + e * rewards_stride_e, mask=mask, other=0.0)
        at = values_ptr + t * values_stride_t + e * values_stride_e
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        next_values = tl.load(at + values_stride_t, mask=mask & (steps + 1 < num_steps), other=0.0).to(tl.float32)
        next_values = tl.where(steps + 1 < num_steps, next_values, last_values[None, :])
        dones = tl.load(dones_ptr + t * dones_stride_t + e * dones_stride_e, mask=mask, other=0) != 0
        at_end = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        if HAS_TIME_OUTS:
            cut_off = tl.load(time_outs_ptr + t * time_outs_stride_t + e * time_outs_stride_e, mask=mask, other=0) != 0
            final_values = values
            if HAS_FINAL_VALUES:
                at = final_values_ptr + t * final_values_stride_t + e * final_values_stride_e
                final_values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            at_end = tl.where(cut_off, final_values, 0.0)
        delta = rewards.to(tl.float32) + gamma * tl.where(dones, at_end, next_values) - values
        factor = tl.where(dones, 0.0, gamma_lam)
        # steps beyond the end hand on what comes later, which is 0
        delta = tl.where(in_steps, delta, 0.0)
        factor, delta = tl.associative_scan((factor, delta), 0, _then)
        _, advantages = _then(0.0, later[None, :], factor, delta)
        out = t * num_envs + e
        tl.store(advantages_ptr + out, advantages, mask=mask)
        tl.store(returns_ptr + out, advantages + values, mask=mask)
        if NORMALIZE:
            block_count = tl.sum(tl.where(mask, 1.0, 0.0), 0)
            block_sum = tl.sum(tl.where(mask, advantages, 0.0), 0)
            block_mean = tl.div_rn(block_sum, tl.where(block_count > 0.0, block_count, 1.0))
            deviation = advantages - block_mean[None, :]
            block_m2 = tl.sum(tl.where(mask, deviation * deviation, 0.0), 0)
            count, mean, m2 = _merge_moments(count, mean, m2, block_count, block_mean, block_m2)
        later = tl.sum(tl.where(steps == block * BLOCK_T, advantages, 0.0), 0)
    if NORMALIZE:
        count, mean, m2 = tl.reduce((count, mean, m2), 0, _merge_moments)
        at = moments_ptr + tl.program_id(0)
        tl.store(at, count)
        tl.store(at + tl.num_programs(0), mean)
        tl.store(at + 2 * tl.num_programs(0), m2)


@triton.jit
def _moment(moments_ptr, which: tl.constexpr, start, num_moments, BLOCK_M: tl.constexpr):
    sets = start + tl.arange(0, BLOCK_M)
    return tl.load(moments_ptr + which * num_moments + sets, mask=sets < num_moments, other=0.0).to(tl.float64)


# where the size is a multiple of 16, and only there, the compiler knows that masks leave no load of 128 bits in pieces
@triton.jit(do_not_specialize=["num_moments"])
def normalize_kernel(
    advantages_ptr,  # [T, E], contiguous, changed in place
    moments_ptr,  # [3, num_moments], as gae_kernel left them
    num_moments,
    size,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(A - mean) / (std + 1e-8) with the unbiased std; each program adds up all moments, in the same order."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    advantages = tl.load(advantages_ptr + offsets, mask=offsets < size, other=0.0)
    total = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, num_moments, BLOCK_M):
        counts = _moment(moments_ptr, 0, start, num_moments, BLOCK_M)
        total += counts * _moment(moments_ptr, 1, start, num_moments, BLOCK_M)
    count = tl.full([], size, tl.float64)  # where it is 1, size is no tensor
    mean = tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, num_moments, BLOCK_M):
        counts = _moment(moments_ptr, 0, start, num_moments, BLOCK_M)
        deviations = _moment(moments_ptr, 1, start, num_moments, BLOCK_M) - mean
        total += _moment(moments_ptr, 2, start, num_moments, BLOCK_M) + counts * deviations * deviations
    std = tl.sqrt(tl.sum(total, 0) / (count - 1.0))  # one advantage alone has no std: NaN, as in torch
    normalized = (advantages - mean.to(tl.float32)) / (std + 1e-8).to(tl.float32)
    tl.store(advantages_ptr + offsets, normalized, mask=offsets < size)
