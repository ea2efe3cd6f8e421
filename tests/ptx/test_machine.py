"""The machine that runs PTX: what instructions do, and what it refuses to let pass."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ptx import Kernel, packed
from torch import Tensor

HEADER = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u32 n)
{
    .shared .align 16 .b8 buffer[512];
    ld.param.u64 %rd1, [out];
    ld.param.u32 %n, [n];
    mov.u32 %t, %tid.x;
    mov.u32 %b, %ctaid.x;
    mul.wide.u32 %rd2, %t, 4;
    add.s64 %rd3, %rd1, %rd2;
    mov.u32 %base, buffer;
    mad.lo.s32 %mine, %t, 4, %base;
"""
WRITE_OUT = "\n st.global.u32 [%rd3], %x;\n"


def run(machine: ModuleType, body: str, *, size: int = 64, grid: int = 1, threads: int = 64, seed: int = 0) -> Tensor:
    out = torch.full((size,), -1, dtype=torch.int32)
    kernel = Kernel(machine, HEADER + body + "\n ret;\n}")
    kernel.run(grid, threads, packed(kernel.parameters, [out, size]), [out], seed=seed)
    return out


def floats(machine: ModuleType, instruction: str, *constants: float) -> float:
    """What an instruction on float32 numbers gives."""
    bits = [f"0f{torch.tensor(c).view(torch.int32).item() & 0xFFFFFFFF:08X}" for c in constants]
    out = run(machine, f"{instruction} %x, {', '.join(bits)};" + WRITE_OUT, threads=1)
    return out[:1].view(torch.float32).item()


def test_integers(machine: ModuleType) -> None:
    t = torch.arange(64, dtype=torch.int32)
    assert torch.equal(run(machine, "mad.lo.s32 %x, %t, -3, 7;" + WRITE_OUT), t * -3 + 7)
    assert torch.equal(run(machine, "sub.s32 %y, %t, 9; shr.s32 %x, %y, 2;" + WRITE_OUT), (t - 9) >> 2)
    assert torch.equal(run(machine, "bfe.u32 %x, %t, 2, 3;" + WRITE_OUT), t >> 2 & 7)
    assert torch.equal(run(machine, "shl.b32 %x, %t, 33;" + WRITE_OUT), t * 0)
    assert torch.equal(
        run(machine, "sub.s32 %y, %t, 9; div.s32 %x, %y, 4;" + WRITE_OUT),
        torch.div(t - 9, 4, rounding_mode="trunc").int(),
    )
    assert run(machine, "prmt.b32 %x, 0x44332211, 0x88776655, 0xB074;" + WRITE_OUT)[0].item() & 0xFFFFFFFF == 0x00118855
    assert torch.equal(run(machine, "mov.b64 %d, {%t, 5}; mov.b64 {_, %x}, %d;" + WRITE_OUT), t * 0 + 5)
    assert torch.equal(
        run(machine, "setp.lt.s32 %p, %t, 8; selp.b32 %x, 1, 2, %p;" + WRITE_OUT), torch.where(t < 8, 1, 2).int()
    )


def test_a_register_that_a_block_declares(machine: ModuleType) -> None:
    """Without a %, as CUDA 12.9 writes it where it wants the upper half of a number."""
    body = "mov.u32 %r, 0x00070003;\n{ .reg .b16 tmp; mov.b32 {tmp, %h}, %r; }\ncvt.u32.u16 %x, %h;"
    assert (run(machine, body + WRITE_OUT) == 7).all()


def test_floats(machine: ModuleType) -> None:
    third = torch.tensor(1 / 3).item()
    product = torch.tensor(third, dtype=torch.float64).square().float().item()
    assert floats(machine, "mul.f32", third, third) == product
    assert floats(machine, "fma.rn.f32", third, third, -product) != 0.0  # one rounding, not two
    assert floats(machine, "max.f32", float("nan"), 2.0) == 2.0
    assert floats(machine, "div.rn.f32", 1.0, 3.0) == third
    assert floats(machine, "neg.f32", 0.5) == -0.5
    assert floats(machine, "copysign.f32", -1.0, 2.0) == -2.0  # the first one's sign


def test_comparisons_with_nan(machine: ModuleType) -> None:
    """Ordered ones are false, unordered ones true."""
    for how, expected in (("lt", 0), ("neu", 1), ("ne", 0), ("equ", 1), ("num", 0), ("nan", 1), ("geu", 1)):
        out = run(machine, f"setp.{how}.f32 %p, 0f7FC00000, 0f3F800000; selp.b32 %x, 1, 0, %p;" + WRITE_OUT, threads=1)
        assert out[0] == expected, how


@pytest.mark.parametrize(
    ("place", "bytes_asked", "complaint"),
    [
        (0, 256, None),
        (0, 264, "264 bytes"),
        (0, 0, "prefetch of 0 bytes"),
        (8, 16, "not a multiple of 16"),
        (16, 256, "outside of the tensors"),
    ],
)
def test_prefetch(machine: ModuleType, place: int, bytes_asked: int, complaint: str | None) -> None:
    """Within the tensor of 64 numbers, in sixteens of bytes."""
    body = f"add.s64 %at, %rd1, {place}; cp.async.bulk.prefetch.L2.global [%at], {bytes_asked};"
    if complaint is None:
        run(machine, body)
    else:
        with pytest.raises(RuntimeError, match=complaint):
            run(machine, body)


def test_lanes_that_branch_apart_meet_again(machine: ModuleType) -> None:
    body = """
    and.b32 %odd, %t, 1;
    setp.eq.s32 %p, %odd, 0;
    @%p bra $even;
    mov.u32 %x, 100;
    bra.uni $together;
    $even:
    mov.u32 %x, 200;
    $together:
    shfl.sync.bfly.b32 %x, %x, 1, 31, -1;
    """
    out = run(machine, body + WRITE_OUT)
    assert torch.equal(out, torch.where(torch.arange(64) % 2 == 0, 100, 200).int())


@pytest.mark.parametrize(
    ("instruction", "source"),
    [
        ("bfly.b32 %x, %t, 5, 31, -1", lambda lane: lane ^ 5),
        ("idx.b32 %x, %t, 3, 31, -1", lambda lane: 3),
        ("up.b32 %x, %t, 2, 0, -1", lambda lane: lane - 2 if lane >= 2 else lane),
        ("down.b32 %x, %t, 4, 31, -1", lambda lane: lane + 4 if lane + 4 <= 31 else lane),
        ("bfly.b32 %x, %t, 1, 6175, -1", lambda lane: lane ^ 1),  # segments of 8 lanes
    ],
)
def test_shuffles(machine: ModuleType, instruction: str, source) -> None:
    out = run(machine, f"shfl.sync.{instruction};" + WRITE_OUT, threads=32)
    assert out[:32].tolist() == [source(lane) for lane in range(32)]


def test_matrices_of_shared_memory(machine: ModuleType) -> None:
    """ldmatrix gives lane t the numbers 2 (t mod 4) and the next of row t / 4, whatever order the rows have."""
    body = """
    mul.lo.u32 %two, %t, 2;
    add.s32 %next, %two, 1;
    cvt.u16.u32 %low, %two;
    cvt.u16.u32 %high, %next;
    mov.b32 %pair, {%low, %high};
    st.shared.b32 [%mine], %pair;
    bar.sync 0;
    xor.b32 %row, %t, 7;
    and.b32 %row, %row, 7;
    mad.lo.s32 %from, %row, 16, %base;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%x}, [%from];
    """
    out = run(machine, body + WRITE_OUT, threads=32)[:32]
    lane = torch.arange(32)
    first = 8 * (7 - lane // 4) + 2 * (lane % 4)
    assert torch.equal(out, (first | (first + 1) << 16).int())


NEIGHBOUR = """
    st.shared.u32 [%mine], %t;
    {barrier}
    xor.b32 %other, %t, {distance};
    mad.lo.s32 %from, %other, 4, %base;
    ld.shared.u32 %x, [%from];
"""


def test_shared_memory_with_a_barrier(machine: ModuleType) -> None:
    for seed in range(5):
        out = run(machine, NEIGHBOUR.format(barrier="bar.sync 0;", distance=32) + WRITE_OUT, seed=seed)
        assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    within = run(machine, NEIGHBOUR.format(barrier="bar.warp.sync -1;", distance=1) + WRITE_OUT)
    assert torch.equal(within, torch.arange(64, dtype=torch.int32) ^ 1)


@pytest.mark.parametrize("distance", [1, 32])  # in the same warp, in another
@pytest.mark.parametrize("seed", range(3))
def test_shared_memory_without_a_barrier(machine: ModuleType, distance: int, seed: int) -> None:
    with pytest.raises(RuntimeError, match=r"(race in shared memory|nobody wrote)[\s\S]*at: "):
        run(machine, NEIGHBOUR.format(barrier="", distance=distance) + WRITE_OUT, seed=seed)
    # nor is it enough that a warp waits for itself, or that its lanes have shuffled
    wait = "bar.warp.sync -1;" if distance == 32 else "shfl.sync.idx.b32 %y, %t, 0, 31, -1;"
    with pytest.raises(RuntimeError, match=r"race in shared memory|nobody wrote"):
        run(machine, NEIGHBOUR.format(barrier=wait, distance=distance) + WRITE_OUT, seed=seed)


def test_write_after_read_without_a_barrier(machine: ModuleType) -> None:
    body = NEIGHBOUR.format(barrier="bar.sync 0;", distance=32) + "add.s32 %y, %t, 1; {} st.shared.u32 [%mine], %y;"
    run(machine, body.format("bar.sync 0;") + WRITE_OUT)
    with pytest.raises(
        RuntimeError, match=r"race in shared memory: (write of what thread .* reads|read of what thread .* writes)"
    ):
        run(machine, body.format("") + WRITE_OUT)


def test_shared_memory_that_nobody_wrote(machine: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="nobody wrote"):
        run(machine, "ld.shared.u32 %x, [%mine];" + WRITE_OUT)
    with pytest.raises(RuntimeError, match="beyond shared memory"):
        run(machine, "st.shared.u32 [%mine+512], %t;")


def test_addresses(machine: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="outside of the tensors, 4 bytes from"):
        run(machine, "mov.u32 %x, 1;" + WRITE_OUT, size=63)
    with pytest.raises(RuntimeError, match="not a multiple of 16"):
        run(machine, "st.global.v4.u32 [%rd1+4], {%t, %t, %t, %t};", threads=1)


# each block leaves a number; the last to count adds them up
LAST_BLOCK = """
    setp.ne.s32 %other, %t, 0;
    mul.wide.u32 %rd4, %b, 4;
    add.s64 %rd5, %rd1, %rd4;
    add.s32 %y, %b, 1;
    setp.ne.s32 %writer, %t, {writer};
    @%writer bra $written;
    st.global.u32 [%rd5+16], %y;
    $written:
    {barrier}
    mov.u32 %done, 0;
    @%other bra $counted;
    atom.acq_rel.gpu.inc.u32 %done, [%rd1], 3;
    $counted:
    setp.ne.s32 %early, %done, 3;
    or.pred %leave, %other, %early;
    @%leave bra $end;
    ld.global.v4.u32 {{%a0, %a1, %a2, %a3}}, [%rd1+16];
    add.s32 %x, %a0, %a1;
    add.s32 %x, %x, %a2;
    add.s32 %x, %x, %a3;
    st.global.u32 [%rd1+32], %x;
    $end:
"""


def filled(machine: ModuleType, body: str, seed: int) -> int:
    out = torch.zeros(12, dtype=torch.int32)
    kernel = Kernel(machine, HEADER + body + "\n ret;\n}")
    kernel.run(4, 64, packed(kernel.parameters, [out, 12]), [out], seed=seed, blocks_side_by_side=4)
    return int(out[8])


@pytest.mark.parametrize("seed", range(4))
def test_what_blocks_see_of_each_other(machine: ModuleType, seed: int) -> None:
    """An atomic with acquire and release, behind a barrier if another thread wrote; nothing less."""
    assert filled(machine, LAST_BLOCK.format(writer=33, barrier="bar.sync 0;"), seed) == 10
    with pytest.raises(RuntimeError, match="race in global memory: read of what thread 33"):
        filled(machine, LAST_BLOCK.format(writer=33, barrier=""), seed)
    without_counting = LAST_BLOCK.format(writer=0, barrier="bar.sync 0;")
    without_counting = without_counting.replace("atom.acq_rel.gpu.inc.u32 %done, [%rd1], 3;", "mov.u32 %done, %b;")
    with pytest.raises(RuntimeError, match="race in global memory"):
        for attempt in range(20):  # block 3 has to come before another one
            filled(machine, without_counting, seed + 4 * attempt)


def test_threads_that_wait_for_each_other(machine: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="wait"):
        run(machine, "setp.lt.s32 %p, %t, 8; @%p bra $there; bar.sync 0; $there: shfl.sync.idx.b32 %x, %t, 0, 31, -1;")


def test_what_is_not_known(machine: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"unknown instruction sin\.approx\.f32"):
        run(machine, "sin.approx.f32 %x, %y;")
    with pytest.raises(ValueError, match="only barrier 0"):
        run(machine, "bar.sync 1, 32;")
