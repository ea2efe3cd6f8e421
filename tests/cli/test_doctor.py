"""The report names versions, hardware and backends."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

import pyfast_ppo
from pyfast_ppo import backends


@dataclass
class Status:
    name: str
    available: bool
    reason: str | None
    detail: str


def test_each_backend_is_available_or_has_a_reason(run_command, monkeypatch):
    rows = [Status("cpu", True, None, "avx512"), Status("cuda", False, "no CUDA device", "")]
    monkeypatch.setattr(backends, "status", lambda: rows)
    outcome = run_command("doctor")
    assert outcome.code == 0
    lines = [line.split(maxsplit=2) for line in outcome.out.splitlines()]
    assert ["cpu", "available", "avx512"] in lines
    assert ["cuda", "unavailable", "no CUDA device"] in lines


def test_real_backends_are_all_listed(run_command):
    out = run_command("doctor").out.partition("Backends")[2]
    listed = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert listed == [status.name for status in backends.status()]


def test_versions(run_command, monkeypatch):
    version = importlib.metadata.version

    def without_triton(package):
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_triton)
    lines = [line.split(maxsplit=1) for line in run_command("doctor").out.splitlines()]
    assert ["pyfast_ppo", pyfast_ppo.__version__] in lines
    assert ["python", platform.python_version()] in lines
    assert ["torch", torch.__version__] in lines
    assert ["triton", "not installed"] in lines


def test_cuda_devices_or_their_absence(run_command):
    names = [line.split()[0] for line in run_command("doctor").out.splitlines() if line.strip()]
    expected = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert all(name in names for name in [*expected, "cpu"])
    assert ("no device" in run_command("doctor").out) == (not expected)
