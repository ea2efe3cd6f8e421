"""Show versions, hardware and which backends are available; for each that is not, why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

from pyfast_ppo import __version__

PACKAGES = ("torch", "triton", "rsl-rl-lib", "numpy", "gymnasium", "mujoco")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0."""
    own = [("pyfast_ppo", __version__), ("python", platform.python_version())]
    _print_section("Versions", own + [(name, _version(name)) for name in PACKAGES])
    _print_section("Hardware", _hardware())
    _print_section("Backends", _backends())
    return 0


def _hardware() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{_cpu_name()}, {os.cpu_count()} cores seen, torch uses {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{device.name}, compute capability {device.major}.{device.minor}, {memory}"))
    if len(rows) == 1:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        rows.append(("cuda", f"no device (torch is {built})"))
    return rows


def _backends() -> list[tuple[str, str]]:
    from pyfast_ppo import backends

    rows = []
    for status in backends.status():
        state = f"available   {status.detail}" if status.available else f"unavailable {status.reason}"
        rows.append((status.name, state.rstrip()))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _print_section(title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    print()
