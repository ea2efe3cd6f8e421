"""Scratch memory of the GPU kernels: what is kept, and what a CUDA graph gets, whose capture is pretended here."""

from __future__ import annotations

import pytest
import torch

from pyfast_ppo.backends._scratch import Counters, Scratch, ScratchPool

CPU = torch.device("cpu")
STREAM = 7


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ScratchPool:
    """After a first call outside of a graph, then within one."""
    pool = ScratchPool()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pool.get(CPU, STREAM, 10, torch.float32, keep=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return pool


def launches_nothing(pool: ScratchPool, keep: bool, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """In a graph: a kernel that fills memory would be part of each replay."""

    def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("a kernel for a counter within the graph")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fail)
        return pool.get(CPU, STREAM, 10, torch.float32, keep)


@pytest.mark.parametrize("keep", [True, False])
def test_each_launch_of_a_graph_has_its_own(keep: bool, pool: ScratchPool, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept,) = pool.kept.values()
    found = [kept, *(launches_nothing(pool, keep, monkeypatch) for _ in range(3))]
    assert len({scratch.counter.data_ptr() for scratch in found}) == 4
    assert len({scratch.partials.data_ptr() for scratch in found}) == 4
    for scratch in found:
        assert scratch.counter.dtype is torch.int32
        assert scratch.counter.tolist() == [0]
        assert scratch.counter.data_ptr() % 16 == kept.counter.data_ptr() % 16  # or Triton would compile once more
    assert list(pool.kept.values()) == [kept]


def test_more_launches_than_counters(pool: ScratchPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They work, with a kernel more."""
    monkeypatch.setattr(pool._counters[CPU], "_num_taken", Counters.NUM - 1)
    last, *more = (pool.get(CPU, STREAM, 10, torch.float32, keep=True) for _ in range(3))
    assert last.counter.untyped_storage().data_ptr() == pool._counters[CPU]._all.untyped_storage().data_ptr()
    assert [scratch.counter.tolist() for scratch in more] == [[0], [0]]
    assert len({scratch.counter.data_ptr() for scratch in (last, *more)}) == 3


def test_launches_with_several_counters(pool: ScratchPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their numbers are, no two launches of a graph share one."""
    found = []
    for count in (1, 4, 5, 2, 9, 1):
        found.append(pool.get(CPU, STREAM, 10, torch.float32, keep=True, num_counters=count).counter)
        assert found[-1].tolist() == [0] * count
        assert found[-1].data_ptr() % 16 == found[0].data_ptr() % 16
    places = [address for t in found for address in range(t.data_ptr(), t.data_ptr() + 4 * len(t), 4)]
    assert len(places) == len(set(places)) == 22
    monkeypatch.setattr(pool._counters[CPU], "_num_taken", Counters.NUM - 1)
    counter = pool.get(CPU, STREAM, 10, torch.float32, keep=True, num_counters=5).counter
    assert counter.tolist() == [0] * 5
    assert counter.untyped_storage().data_ptr() != pool._counters[CPU]._all.untyped_storage().data_ptr()


def test_what_is_kept_is_enough_for_all_who_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who needs many numbers, and who needs many counters."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pool = ScratchPool()
    needs = [(100, 1), (10, 7), (100, 1), (10, 7)]
    found = [pool.get(CPU, STREAM, size, torch.float32, keep=True, num_counters=count) for size, count in needs]
    assert found[1] is found[2] is found[3]
    assert (found[3].size, found[3].counter.tolist()) == (100, [0] * 7)
    assert len(found[3].partials) == 100


def test_a_capture_without_a_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pool = ScratchPool()
    assert pool.get(CPU, STREAM, 10, torch.float32, keep=True).counter.tolist() == [0]
    assert pool.kept == {}
