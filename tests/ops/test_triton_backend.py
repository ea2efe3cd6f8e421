"""The Triton backend's own: when it cannot be used, its scratch memory, and what costs a compilation."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends_here import KERNELS
from ppo_loss_oracle import make_inputs

from pyfast_ppo import ppo_loss_and_grad
from pyfast_ppo.backends import triton as backend


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """``reason(version)``: why a Triton of that version (None: none) cannot be used here."""
    monkeypatch.setattr(backend, "INTERPRETED", False)

    def with_version(version: str | None) -> str | None:
        def import_module(name: str) -> object:
            if version is None:
                raise ImportError(f"No module named {name!r}")
            return SimpleNamespace(__version__=version)

        monkeypatch.setattr(importlib, "import_module", import_module)
        return backend.unavailable_reason.__wrapped__()

    return with_version


def test_why_it_cannot_be_used(reason, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(None) == "triton cannot be imported (No module named 'triton'); run `pip install triton`"
    assert reason("2.3.1") == "triton 2.3.1 is too old; run `pip install 'triton>=3.2'`"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason("3.9.0") == "this build of torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason("3.9.0") == "torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    there: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)
    assert reason("3.9.0") == "triton finds no C compiler (gcc, clang), which a launch needs; install gcc or set CC"
    there.add("clang")
    assert reason("3.10.0+git1234") is None
    monkeypatch.setenv("CC", "icx")  # what Triton then takes, whatever else is there
    assert reason("3.9.0") == "triton finds no C compiler (icx), which a launch needs; install gcc or set CC"
    there.add("icx")
    assert reason("3.9.0") is None


needs_triton = pytest.mark.skipif("triton" not in KERNELS, reason="triton is not available")


@needs_triton
def test_scratch_memory_is_kept_and_left_as_it_was() -> None:
    """One allocation for calls of any N; the counter is back at 0 after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend._scratch.kept.clear()
    for num_rows in (10, 700, 5):
        inputs = make_inputs(num_rows, 6, old_std_per_row=True, device=device)
        first = ppo_loss_and_grad(**inputs, backend="triton")
        again = ppo_loss_and_grad(**inputs, backend="triton")
        assert torch.equal(first[0].loss, again[0].loss)
    ((_, scratch),) = backend._scratch.kept.items()
    assert int(scratch.counter) == 0
    address = scratch.partials.data_ptr()
    ppo_loss_and_grad(**make_inputs(300, 4, device=device), backend="triton")
    assert next(iter(backend._scratch.kept.values())).partials.data_ptr() == address


CHILD = """
import json
from pyfast_ppo.backends import triton as backend
kernels = [backend._kernels("ppo_loss").ppo_loss_kernel, backend._kernels("gae").gae_kernel]
kernels += [backend._kernels("gae").normalize_kernel, backend._kernels("gaussian").kl_kernel]
sizes = [[p.name for p in k.params if p.do_not_specialize] for k in kernels]
print(json.dumps(sizes + [[p.name for p in k.params if p.do_not_specialize_on_alignment] for k in kernels]))
"""


@needs_triton
def test_sizes_and_slices_cost_no_compilation() -> None:
    """Triton would compile anew where an integer is 1, or it or an address a multiple of 16, for the first time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=120, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    names = list(map(set, json.loads(done.stdout)))
    loss, gae, normalize, kl = names[:4]
    assert loss == {"coefficient_tensors", "num_rows", "num_original"}
    assert gae == {"num_steps", "num_envs"}
    assert normalize == {"num_moments"}  # the width of its loads hangs on the size
    assert kl == {"num_rows"}
    loss, gae, normalize, _ = names[4:]
    assert {"old_log_prob_ptr", "advantages_ptr", "returns_ptr", "values_ptr", "old_values_ptr", "kl_coef_ptr"} <= loss
    assert not {"mean_ptr", "actions_ptr", "partials_ptr"} & loss, "their loads are 128 bits wide"
    assert {"values_ptr", "last_values_ptr"} <= gae
    assert not normalize
