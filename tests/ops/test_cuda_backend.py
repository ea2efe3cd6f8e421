"""The CUDA backend's own: when it cannot be used, launches that fail, its scratch memory, and what a launch costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import cuda_on_cpu
import pytest
import torch
from backends_here import KERNELS
from ppo_loss_oracle import make_inputs

from pyfast_ppo import gae, gaussian_kl, ppo_loss_and_grad
from pyfast_ppo.backends import cuda as backend
from pyfast_ppo.cli.main import main

emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulation stands in where there is no GPU")


@pytest.fixture
def machine() -> Iterator[ModuleType]:
    """The emulated machine: ``machine.pretend(driver=12040)``."""
    yield backend._cuda
    backend._cuda.pretend()


# --- when it cannot be used -------------------------------------------------------------------------------------------

NOT_BUILT_FOR_IT = "the kernels were not built for this GPU ({}); install again with PYFAST_PPO_CUDA_ARCHS=native"
REASONS = {
    "no driver": ({"driver": 0}, "there is no NVIDIA driver"),
    "old driver": (
        {"driver": 12040, "devices": 35},
        "the driver is too old: it is for CUDA 12.4, the kernels were built with CUDA 13.0; update the driver",
    ),
    "no GPU": ({"num_devices": 0}, "there is no GPU"),
    "no GPU that CUDA sees": ({"devices": 100}, "CUDA says: no CUDA-capable device is detected"),
    "another GPU": (
        {"code": 209},
        NOT_BUILT_FOR_IT.format("no kernel image is available for execution on the device"),
    ),
    "PTX that does not compile": ({"code": 218}, NOT_BUILT_FOR_IT.format("a PTX JIT compilation failed")),
    "no compiler of PTX": ({"code": 221}, NOT_BUILT_FOR_IT.format("PTX JIT compiler library not found")),
    "PTX of a newer CUDA": (
        {"code": 222},
        NOT_BUILT_FOR_IT.format("the provided PTX was compiled with an unsupported toolchain."),
    ),
    "a GPU that is full": ({"code": 2}, "CUDA says: out of memory"),
}


@emulated
@pytest.mark.parametrize("case", REASONS)
def test_reason(machine: ModuleType, case: str) -> None:
    pretence, reason = REASONS[case]
    assert machine.unavailable_reason() == ""
    machine.pretend(**pretence)
    assert machine.unavailable_reason() == reason


def test_reason_of_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What the build wrote down is what doctor says, and what an error quotes."""
    monkeypatch.setattr(backend, "_C", SimpleNamespace(cuda_note="built with PYFAST_PPO_CUDA=off"))
    monkeypatch.setattr(backend, "_cuda", None)
    monkeypatch.setattr(backend, "unavailable_reason", cuda_on_cpu.ORIGINAL["unavailable_reason"].__wrapped__)
    main(["doctor"])
    assert "cuda    unavailable built with PYFAST_PPO_CUDA=off\n" in capsys.readouterr().out
    x = torch.ones(3, 2)
    monkeypatch.setattr("pyfast_ppo.backends._selected", {})
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: built with PYFAST_PPO_CUDA=off; pass"):
        gaussian_kl(x, x, x, x, backend="cuda")


def test_reason_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = cuda_on_cpu.ORIGINAL["unavailable_reason"].__wrapped__
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == "this build of torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason() == "torch finds no GPU"


# --- launches ---------------------------------------------------------------------------------------------------------


@emulated
def test_a_launch_that_fails(machine: ModuleType) -> None:
    """An exception that names the kernel; the next launch works."""
    inputs = make_inputs(20, 4)
    machine.pretend(launch=9)
    message = r"invalid configuration argument \(cudaErrorInvalidConfiguration\)"
    with pytest.raises(RuntimeError, match=f"^ppo_loss_kernel: {message}"):
        ppo_loss_and_grad(**inputs, backend="cuda")
    with pytest.raises(RuntimeError, match=f"^ppo_loss_wide_kernel: {message}"):
        ppo_loss_and_grad(**make_inputs(2, 2000), backend="cuda")
    x = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=f"^gae_kernel: {message}"):
        gae(x, x, x, x[0], 0.9, 0.9, backend="cuda")
    with pytest.raises(RuntimeError, match=f"^gaussian_kernel: {message}"):
        gaussian_kl(x, x, x, x, backend="cuda")
    with pytest.raises(RuntimeError, match=f"^add_bias_and_activate_kernel: {message}"):
        backend.add_bias_and_activate("elu", x, x[0])
    with pytest.raises(RuntimeError, match=f"^add_bias_and_activate_backward_kernel: {message}"):
        backend.add_bias_and_activate_backward("elu", x, x)
    machine.pretend()
    assert torch.isfinite(ppo_loss_and_grad(**inputs, backend="cuda")[0].loss)


@pytest.mark.parametrize(("device", "guards"), [("cuda:0", []), ("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_launches_on_the_device_of_the_tensors(device: str, guards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch's current device is; that stays what it was."""
    entered, called = [], []

    @contextlib.contextmanager
    def guard(wanted: torch.device) -> Iterator[None]:
        entered.append(str(wanted))
        yield
        assert called, "left before the launch"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", guard)
    backend._launch(lambda *args: called.append(args), torch.device(device), 1, 2)
    assert called == [(1, 2)]
    assert entered == guards


@pytest.mark.skipif("cuda" not in KERNELS, reason="the CUDA backend is not available")
def test_scratch_memory_is_kept_and_left_as_it_was() -> None:
    """One allocation for calls of any N; the counter is back at 0 after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend._scratch.kept.clear()
    for num_rows in (10, 700, 5):
        inputs = make_inputs(num_rows, 6, old_std_per_row=True, device=device)
        first = ppo_loss_and_grad(**inputs, backend="cuda")
        again = ppo_loss_and_grad(**inputs, backend="cuda")
        assert torch.equal(first[0].loss, again[0].loss)
        assert all(map(torch.equal, first[1], again[1]))
    ((_, scratch),) = backend._scratch.kept.items()
    assert int(scratch.counter) == 0
    address = scratch.partials.data_ptr()
    ppo_loss_and_grad(**make_inputs(300, 4, device=device), backend="cuda")
    assert next(iter(backend._scratch.kept.values())).partials.data_ptr() == address


@pytest.mark.skipif("cuda" not in KERNELS, reason="the CUDA backend is not available")
def test_scratch_memory_of_hidden_layers() -> None:
    """The loss's, with a counter for every 32 columns; whoever needs more of either, all are back at 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend._scratch.kept.clear()
    ppo_loss_and_grad(**make_inputs(10, 40, device=device), backend="cuda")
    sizes = []
    for shape in [(700, 33), (10, 130), (10, 5), (9000, 33)]:
        y = torch.ones(shape, device=device)
        _, grad_bias = backend.add_bias_and_activate_backward("elu", y, y)
        assert (grad_bias == shape[0]).all()
        ((_, scratch),) = backend._scratch.kept.items()
        assert not scratch.counter.any()
        sizes.append((scratch.size, len(scratch.counter)))
    assert sizes == sorted(sizes)
    assert [count for _, count in sizes] == [2, 5, 5, 5]


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_dlpack_does_not_show(dtype: torch.dtype) -> None:
    """A subclass of Tensor is read through its methods, with the same result."""

    class Tagged(torch.Tensor):
        pass

    inputs = make_inputs(50, 12, old_std_per_row=True, dtypes=dict.fromkeys(("mean", "std", "values"), dtype))
    out, grads = ppo_loss_and_grad(**inputs, backend="cuda")
    tagged, tagged_grads = ppo_loss_and_grad(**{k: v.as_subclass(Tagged) for k, v in inputs.items()}, backend="cuda")
    assert torch.equal(out.loss, tagged.loss.as_subclass(torch.Tensor))
    assert all(torch.equal(a, b.as_subclass(torch.Tensor)) for a, b in zip(grads, tagged_grads, strict=True))
