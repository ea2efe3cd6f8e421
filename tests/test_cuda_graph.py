"""Recording CUDA graphs, and noticing waits, with a stand-in for torch.cuda; test_captured.py has real graphs."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from pyfast_ppo import cuda_graph
from pyfast_ppo.rsl_rl import captured

DEVICE = torch.device("cuda", 1)


class Cuda:
    """What happened to the device, in order."""

    log: ClassVar[list[Any]] = []
    sync_debug_mode: ClassVar[int] = 0
    fails: ClassVar[bool] = False

    @staticmethod
    @contextlib.contextmanager
    def within(*what: object) -> Iterator[None]:
        Cuda.log.append(("enter", *what))
        try:
            yield
        finally:
            Cuda.log.append(("leave", *what))


class FakeGraph:
    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert not torch.is_inference_mode_enabled()
        Cuda.log.append(("begin", pool, capture_error_mode))

    def capture_end(self) -> None:
        Cuda.log.append("end")
        if Cuda.fails:
            Cuda.fails = False
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        Cuda.log.append("replay")


def set_sync_debug_mode(mode: str) -> None:
    warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
    Cuda.sync_debug_mode = {"default": 0, "warn": 1}[mode]


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Cuda, "log", [])
    monkeypatch.setattr(Cuda, "fails", False)
    monkeypatch.setattr(Cuda, "sync_debug_mode", 0)
    cuda_graph._stream_to_record.cache_clear()
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "Stream": lambda device: f"stream of {device}",
        "stream": lambda stream: Cuda.within(stream),
        "device": lambda device: Cuda.within(device),
        "current_device": lambda: DEVICE.index,
        "synchronize": lambda: Cuda.log.append("synchronize"),
        "empty_cache": lambda: Cuda.log.append("empty_cache"),
        "graph_pool_handle": lambda: "pool",
        "get_sync_debug_mode": lambda: Cuda.sync_debug_mode,
        "set_sync_debug_mode": set_sync_debug_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: Cuda.log.append(pool), raising=False)
    yield
    cuda_graph._stream_to_record.cache_clear()


def test_a_recording_on_the_device_of_the_work() -> None:
    """Which need not be the current one."""
    collecting = []
    first = cuda_graph.Graph(DEVICE)
    with torch.inference_mode():  # the work's, but not the recording's
        assert first.record(lambda: (collecting.append(gc.isenabled()), torch.is_inference_mode_enabled())[1])
    second = cuda_graph.Graph(DEVICE, first)
    second.record(lambda: None)
    second.replay()
    recorded = [("begin", "pool", "thread_local"), "end"]
    around = (("enter", DEVICE), ("enter", "stream of cuda:1")), (("leave", "stream of cuda:1"), ("leave", DEVICE))
    assert Cuda.log == [
        *(*around[0], "synchronize", "empty_cache", *recorded, *around[1]),
        *(*around[0], "synchronize", *recorded, *around[1], "replay"),
    ]
    assert collecting == [False]
    assert gc.isenabled()


def test_without_a_number_it_is_the_current_device() -> None:
    cuda_graph.Graph(torch.device("cuda")).record(lambda: None)
    assert Cuda.log[0] == ("enter", DEVICE)


def test_work_that_cannot_be_recorded() -> None:
    """torch before 2.12 does not clean up by itself. The reason is what the work raised."""
    Cuda.fails = True

    def work() -> None:
        raise RuntimeError("operation not permitted\nCUDA kernel errors might")

    given_up = captured.Captured[None]("The work", "cuda:1")
    assert not given_up._record(work, slot=None)
    assert given_up.reason == "it cannot be recorded (operation not permitted)"
    assert Cuda.log[4:] == [
        ("begin", "pool", "thread_local"),
        "end",
        (DEVICE.index, "pool"),
        ("begin", None, "thread_local"),  # an empty one, whose end puts the random numbers right
        "end",
        ("leave", "stream of cuda:1"),
        ("leave", DEVICE),
    ]
    assert gc.isenabled()


def wait() -> None:
    """As torch in its mode "warn"."""
    if Cuda.sync_debug_mode == 1:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=2)


def test_waits_are_noticed_and_other_warnings_are_handed_on() -> None:
    with pytest.warns(DeprecationWarning, match="old name") as others, captured.Waits() as waits:
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
        wait()
        wait()
    assert waits.where is not None
    assert waits.where.startswith(f"{__file__}:")
    assert len(others) == 1
    assert Cuda.sync_debug_mode == 0


def test_the_users_own_mode_stays() -> None:
    Cuda.sync_debug_mode = 2
    with captured.Waits():
        assert Cuda.sync_debug_mode == 2
    assert Cuda.sync_debug_mode == 2


def test_an_error_of_the_work_puts_the_mode_back() -> None:
    with pytest.raises(KeyError), captured.Waits():
        raise KeyError
    assert Cuda.sync_debug_mode == 0
