"""Which code runs: the table of backends, and an installation whose compiled extension is missing or does not fit."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfast_ppo
from pyfast_ppo import backends

CPU, META = torch.device("cpu"), torch.device("meta")
NAMES = ["cuda", "triton", "cpu", "eager"]


def test_status_has_a_line_for_each() -> None:
    """In the order of preference; who cannot run says why, who can says with what."""
    rows = backends.status()
    assert [row.name for row in rows] == NAMES
    for row in rows:
        assert row.available == (row.reason is None)
        assert row.available == bool(row.detail)
        assert row.available or is_one_sentence(row.reason)


def is_one_sentence(reason: str) -> bool:
    """Something that doctor can print behind a dash and an exception can quote: one line, no trace, no full stop."""
    return bool(reason) and "\n" not in reason and len(reason) < 300 and not reason.endswith(".")


def test_cpu_and_eager_are_available() -> None:
    """A build without the compiled extension must not pass these tests."""
    assert {"cpu", "eager"} <= {row.name for row in backends.status() if row.available}


def test_cpu_says_what_it_uses() -> None:
    detail = next(row.detail for row in backends.status() if row.name == "cpu")
    assert any(isa in detail for isa in ("avx512", "avx2", "baseline"))
    assert f"{torch.get_num_threads()} threads" in detail
    if sys.platform == "linux":
        assert "openmp" in detail, "the kernels do not run on torch's threads: two pools would fight for the cores"


def test_select() -> None:
    """Triton's interpreter, which runs on the CPU in these tests, is never the best there is."""
    assert backends.select(None, CPU).name == "cpu"
    assert backends.select("cpu", CPU).name == "cpu"
    assert backends.select("eager", CPU).name == "eager"
    assert backends.select(None, META).name == "eager"
    assert backends.select("eager", META).name == "eager"


def test_tensors_on_the_cpu_do_not_wake_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a GPU backend makes a CUDA context: memory on a GPU, and no fork after it."""
    asked = []
    real = backends.unavailable_reason
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: asked.append(name) or real(name))
    assert backends._find(None, "cpu", torch.float32).name == "cpu"
    assert asked == ["cpu"]
    backends._find(None, "meta", torch.float32)
    assert asked == ["cpu", "eager"]


def test_select_of_the_wrong_device() -> None:
    with pytest.raises(ValueError, match=r"^backend 'cpu' runs on cpu tensors, the arguments are on meta"):
        backends.select("cpu", META)


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "torch"])
def test_select_of_no_backend(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^backend must be one of 'cuda', 'triton', 'cpu', 'eager' .* got '{name}'"):
        backends.select(name, CPU)


@pytest.mark.parametrize("name", NAMES)
def test_select_of_an_unavailable_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason stands in the error, and nothing else is run in its place."""
    monkeypatch.setattr(backends, "_selected", {})
    reason = backends.unavailable_reason(name)
    if reason is None:
        reason = "it is switched off"
        monkeypatch.setattr(backends, "unavailable_reason", lambda _: reason)
    with pytest.raises(RuntimeError) as caught:
        backends.select(name, CPU)
    assert f"backend {name!r} is not available: {reason}" in str(caught.value)
    assert "backend=None" in str(caught.value)


@pytest.mark.parametrize("name", [row.name for row in backends.status() if not row.available])
def test_operations_with_an_unavailable_backend(name: str) -> None:
    x, row, vector = torch.ones(3, 2), torch.ones(2), torch.ones(3)
    reason = backends.unavailable_reason(name)
    calls = [
        lambda: pyfast_ppo.ppo_loss(x, row, vector, x, vector, x, row, vector, vector, vector, backend=name),
        lambda: pyfast_ppo.ppo_loss_and_grad(x, row, vector, x, vector, x, row, vector, vector, vector, backend=name),
        lambda: pyfast_ppo.gaussian_log_prob(x, x, row, backend=name),
        lambda: pyfast_ppo.gaussian_entropy(x, backend=name),
        lambda: pyfast_ppo.gaussian_kl(x, row, x, row, backend=name),
        lambda: pyfast_ppo.gae(x, x, x, row, 0.9, 0.9, backend=name),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available") as caught:
            call()
        assert reason in str(caught.value)


@pytest.mark.parametrize("name", [row.name for row in backends.status() if row.available])
def test_float64(name: str) -> None:
    """Computed, or refused by name; never quietly in float32."""
    find = getattr(backends._find, "__wrapped__", backends._find)
    module = importlib.import_module(f"pyfast_ppo.backends.{name}")
    device_type = module.DEVICE_TYPE or "cpu"
    if torch.float64 in module.COMPUTES_IN:
        assert find(name, device_type, torch.float64) is module
    else:
        with pytest.raises(TypeError, match=rf"^backend '{name}' computes in float32, an argument is float64"):
            find(name, device_type, torch.float64)
        assert torch.float64 in find(None, device_type, torch.float64).COMPUTES_IN


# --- without the compiled extension -----------------------------------------------------------------------------------

CHILD = """
import json, sys, types
from importlib import metadata
from pathlib import Path

wish = sys.argv[1]
distributions = metadata.distributions

class File:  # as importlib.metadata.PackagePath
    suffix = ".so"
    def match(self, pattern):
        return pattern == "pyfast_ppo/_C.*"
    def locate(self):
        return Path(sys.argv[2])

def fake(**query):
    if query.get("name") != "pyfast-ppo":
        return distributions(**query)
    if wish == "not installed":
        return []
    import pyfast_ppo._version
    version = "0.0.0" if wish == "elsewhere, of another version" else pyfast_ppo._version.__version__
    egg_info = types.SimpleNamespace(files=None, version=version)  # left by a build in the checkout
    installed = types.SimpleNamespace(files=[File()] if wish.startswith("elsewhere") else [], version=version)
    return [egg_info, installed]

metadata.distributions = fake
import torch
import pyfast_ppo
from pyfast_ppo import backends

x, row, vector = torch.ones(3, 2), torch.ones(2, requires_grad=True), torch.ones(3)
tensors = (x, row, vector, x, vector, x, row.detach(), vector, vector, vector)
out = pyfast_ppo.ppo_loss(*tensors)
out.loss.backward()
_, returns = pyfast_ppo.gae(x, x, x, x[0], 0.9, 0.9)
log_prob = pyfast_ppo.gaussian_log_prob(x, x, row)
if wish == "not installed":
    torch.compile(lambda: pyfast_ppo.ppo_loss(*tensors).loss, fullgraph=True, backend="aot_eager")().backward()
try:
    pyfast_ppo.ppo_loss(*tensors, backend="cpu")
    error = None
except RuntimeError as caught:
    error = str(caught)
cpu = next(row for row in backends.status() if row.name == "cpu")
print(json.dumps({
    "path": pyfast_ppo.__file__,
    "selected": backends.select(None, torch.device("cpu")).name,
    "available": cpu.available,
    "reason": cpu.reason,
    "error": error,
    "loss": out.loss.item(),
    "log_prob": log_prob.sum().item(),
    "grad_std": row.grad.tolist(),
}))
"""


@pytest.fixture
def copy_of_the_package(tmp_path: Path) -> Path:
    """The Python files alone, as in a checkout that was never built."""
    package = Path(pyfast_ppo.__file__).parent
    shutil.copytree(package, tmp_path / "pyfast_ppo", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return tmp_path


def import_in(folder: Path, wish: str) -> dict:
    extension = importlib.import_module("pyfast_ppo._C").__file__
    done = subprocess.run(
        [sys.executable, "-c", CHILD, wish, extension],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert Path(result["path"]).is_relative_to(folder)
    return result


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("not installed", "because pyfast-ppo is not installed"),
        ("installed without", "the compiled extension is not there"),
        ("elsewhere, of another version", "the installed extension is of version 0.0.0"),
        ("broken", "the compiled extension does not load"),
        ("elsewhere, of other sources", "the compiled extension is of other sources than those in csrc"),
    ],
)
def test_without_the_extension(copy_of_the_package: Path, wish: str, says: str) -> None:
    """The package works all the same, by its formulas in PyTorch, and says in one sentence why and what to do."""
    if "other sources" in wish:
        (copy_of_the_package / "csrc").mkdir()
        (copy_of_the_package / "csrc" / "changed.cpp").touch()
    if wish == "broken":
        name = Path(importlib.import_module("pyfast_ppo._C").__file__).name
        (copy_of_the_package / "pyfast_ppo" / name).write_bytes(b"not a library")
    result = import_in(copy_of_the_package, wish)
    assert result["selected"] == "eager"
    assert not result["available"]
    assert says in result["reason"]
    assert "pip install ." in result["reason"]
    assert is_one_sentence(result["reason"])
    assert f"backend 'cpu' is not available: {result['reason']}" in result["error"]
    x, row, vector = torch.ones(3, 2), torch.ones(2, requires_grad=True), torch.ones(3)
    out = pyfast_ppo.ppo_loss(x, row, vector, x, vector, x, row.detach(), vector, vector, vector, backend="cpu")
    out.loss.backward()
    assert result["loss"] == pytest.approx(out.loss.item(), rel=1e-6)
    passes = 2 if wish == "not installed" else 1  # eagerly and compiled
    assert result["grad_std"] == pytest.approx((passes * row.grad).tolist(), rel=1e-6)


def test_extension_of_the_installed_package(copy_of_the_package: Path) -> None:
    """Who runs Python in a checkout imports the checkout; the extension of the installed package serves it, too."""
    result = import_in(copy_of_the_package, "elsewhere")
    assert result["selected"] == "cpu"
    assert result["reason"] is None
