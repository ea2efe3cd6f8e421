"""What the recorder sees: each operation once, with the bytes that it moves, its purpose, and a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
from torch.autograd import DeviceType

from pyfast_ppo import gae
from pyfast_ppo.bench import operations as ops
from pyfast_ppo.bench.operations import Recorder, device_seconds
from pyfast_ppo.bench.stock import COEFFICIENTS, make_mini_batch
from pyfast_ppo.ops.ppo_loss import ppo_loss_and_grad

FLOAT = 4


def recorded(work, optimizer=None, part="update", hidden_dims=()) -> list[ops.Operation]:
    recorder = Recorder("cpu", hidden_dims, part=part)
    with recorder.recording(optimizer):
        work()
    return recorder.operations


def test_on_a_gpu_times_are_the_profilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler sees no GPU here, but it runs, and is asked when it has ended."""
    asked = []
    monkeypatch.setattr(ops, "device_seconds", lambda events, count: asked.append(list(events)) or [2e-6] * count)
    recorder = Recorder("cuda", (), part="update")
    with recorder.recording():
        torch.ones(3).add(1.0)
    assert len(asked) == 1
    assert any(event.name() == "aten::add" and not event.is_user_annotation() for event in asked[0])
    assert all(event.is_user_annotation() for event in asked[0] if event.name().startswith(ops._RANGE))
    assert [(o.name, o.seconds) for o in recorder.operations] == [("ones", 2e-6), ("add", 2e-6)]


def test_each_operation_once_with_its_bytes():
    a, b, rows = torch.randn(8, 4), torch.randn(8, 4), torch.tensor([1, 3])

    def work():
        c = (a + b).t()  # a view is no operation
        torch.empty(100)  # nor is an allocation
        c.copy_(b.t())
        return c.sum(), b[rows]

    found = recorded(work)
    assert [(o.name, o.moved_bytes // FLOAT) for o in found] == [
        ("add", 3 * 32),
        ("copy_", 2 * 32),
        ("sum", 32 + 1),
        ("index", 2 * 2 * 4),  # the rows that it takes, not all that there are
    ]
    assert all(o.seconds > 0.0 for o in found)


def test_of_an_expanded_tensor_only_what_there_is():
    row = torch.randn(4)
    [found] = recorded(lambda: row.expand(100, 4).mul(2.0))
    assert found.moved_bytes == FLOAT * (4 + 400)


def test_flops_of_a_product():
    a, b, bias = torch.randn(6, 5), torch.randn(5, 7), torch.randn(7)
    found = recorded(lambda: (a @ b, torch.addmm(bias, a, b)))
    assert [(o.line, o.flops) for o in found] == [(ops.MATRIX, 2 * 6 * 5 * 7)] * 2


def test_flops_of_a_layer_in_inference_mode():
    layer = nn.Linear(5, 7)
    with torch.inference_mode():
        [found] = recorded(lambda: layer(torch.randn(6, 5)))[1:]  # after the draw
    assert (found.name, found.line, found.flops) == ("linear", ops.MATRIX, 2 * 6 * 5 * 7)


def test_an_operation_that_hands_out_nothing_writes_too():
    p = nn.Parameter(torch.zeros(10))
    p.grad = torch.ones(10)
    optimizer = torch.optim.Adam([p], lr=torch.tensor(0.1), fused=True)
    optimizer.step()
    [found] = [o for o in recorded(optimizer.step, optimizer) if o.name == "_fused_adam_"]
    read = 4 * 10 + 1 + 1  # parameter, gradient and two moments; the step's counter and the rate
    assert found.moved_bytes == FLOAT * (read + 4 * 10)


def test_kernels_of_pyfast_ppo_are_one_operation_each():
    batch = make_mini_batch(64, 3, True, 0)
    rollout = (*torch.randn(2, 5, 8).unbind(), torch.zeros(5, 8, dtype=torch.bool), torch.randn(8))

    def work():
        ppo_loss_and_grad(*batch, **COEFFICIENTS, backend="cpu")
        gae(*rollout, 0.99, 0.95, backend="cpu")

    by_name = {o.name: o for o in recorded(work)}
    assert list(by_name) == ["ppo_loss", "gae"]
    inputs = 64 * (4 * 3 + 5) + 3
    moved = inputs + 64 * (3 + 1) + 3 + 9  # and nine metrics
    assert by_name["ppo_loss"].moved_bytes == FLOAT * moved
    assert by_name["ppo_loss"].line == ops.LOSS


def test_purpose():
    net = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.randn(32, 4)

    def update():
        optimizer.zero_grad()
        loss = net(x[torch.randperm(32)]).square().mean()
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    update()  # the first step makes the moments
    found = recorded(update, optimizer, hidden_dims=(16,))
    lines = {o.name: o.line for o in found if o.line != ops.OPTIMIZER and o.name != "sum"}
    assert lines == {
        **dict.fromkeys(("randperm", "index"), ops.MINI_BATCHES),
        **dict.fromkeys(("addmm", "mm"), ops.MATRIX),
        **dict.fromkeys(("elu", "elu_backward"), ops.ACTIVATION),
        **dict.fromkeys(("pow", "mean", "_local_scalar_dense", "ones_like", "div", "mul"), ops.LOSS),
    }
    sums = [o.line for o in found if o.name == "sum"]
    assert sorted(sums) == sorted([ops.ACTIVATION, ops.LOSS])  # biases of the hidden layer and of the last
    stepping = [o for o in found if o.line == ops.OPTIMIZER]
    assert len(stepping) > 10 and not any(o.is_sync for o in stepping)  # Adam's own reads are made on the CPU only
    assert [o.name for o in found if o.is_sync] == ["_local_scalar_dense"]


@pytest.mark.parametrize(("part", "line"), [("act", ops.ACTING), ("compute_returns", ops.RETURNS)])
def test_part_says_what_it_is_for(part, line):
    x = torch.randn(4)
    found = recorded(lambda: x.exp()[torch.tensor([0])], part=part)
    assert {o.line for o in found} == {line}


def test_nothing_is_seen_outside_of_the_parts_and_everything_is_put_back():
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(3))], lr=0.1)
    clip, step = nn.utils.clip_grad_norm_, optimizer.step
    assert recorded(lambda: torch.randn(3).exp(), optimizer, part=None) == []
    with pytest.raises(ZeroDivisionError):
        recorded(lambda: 1 / 0, optimizer)
    assert nn.utils.clip_grad_norm_ is clip
    assert optimizer.step == step and "step" not in vars(optimizer)


# --- on a GPU, by the profiler's events -------------------------------------------------------------------------------


@dataclass
class Event:
    """As torch's profiler has them."""

    _name: str
    _start: int
    _duration: int
    _correlation: int = 0
    _device: DeviceType = DeviceType.CPU
    _is_annotation: bool = False

    def name(self):
        return self._name

    def start_ns(self):
        return self._start

    def duration_ns(self):
        return self._duration

    def correlation_id(self):
        return self._correlation

    def device_type(self):
        return self._device

    def is_user_annotation(self):
        return self._is_annotation


def test_kernels_go_to_the_operation_that_launched_them():
    gpu = DeviceType.CUDA
    events = [
        Event("pyfast_ppo operation 0", 0, 50),
        Event("aten::mm", 5, 40, 7),
        Event("cudaLaunchKernel", 10, 5, 1),
        Event("cuLaunchKernelEx", 30, 5, 2),
        Event("pyfast_ppo operation 1", 60, 20),  # of a view: the number is the next operation's, too
        Event("pyfast_ppo operation 1", 100, 20),
        Event("cudaMemcpyAsync", 105, 5, 3),
        Event("cudaLaunchKernel", 130, 5, 4),  # in between: nobody's
        Event("cutlass_gemm", 107, 300, 1, gpu),  # runs while the host is elsewhere; its name is no launch's
        Event("reduce", 1400, 200, 2, gpu),
        Event("Memcpy HtoD", 1700, 50, 3, gpu),
        Event("other", 1800, 900, 4, gpu),
        # annotations are drawn on the device, too, and their numbers are no launches'
        Event("pyfast_ppo operation 0", 1000, 600, 3, gpu, True),
        Event("Optimizer.step#Adam.step", 1000, 50_000, 1, gpu, True),
    ]
    assert device_seconds(events, 2) == pytest.approx([500e-9, 50e-9])
