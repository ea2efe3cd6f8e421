"""The tile [BLOCK_N, BLOCK_A] that a program takes, of the loss and of the Gaussians' functions."""

from __future__ import annotations

import triton


def block_shape(num_actions: int) -> dict[str, int]:
    """Tile and warps for A actions. A alone decides, so that N never causes a compilation.

    A thread holds 8 elements where four neighbours are one 128-bit load, so two rows or fewer. Where A is no multiple
    of 4, neighbours go to different threads, each of which then has as many rows as elements: 4, or the rows' terms
    would not fit into its registers. No tile has more rows than threads, so that a row's single numbers, of which masks
    leave no wide load, are read without gaps.
    """
    block_a = triton.next_power_of_2(num_actions)
    threads = 128
    elements = threads * (8 if num_actions % 4 == 0 else 4)
    block_n = max(1, min(elements // block_a, threads))
    return {"BLOCK_N": block_n, "BLOCK_A": block_a, "num_warps": min(32, max(4, block_n * block_a // 512 * 2))}
