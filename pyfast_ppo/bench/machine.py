"""What the figures are measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from pyfast_ppo import __version__, backends
from pyfast_ppo.versions import installed

LIBRARIES = ("triton", "rsl-rl-lib", "skrl", "rl-games", "torchrl", "stable-baselines3")


def machine(device: str) -> dict:
    """Hardware and versions: what has to be the same for two results to belong together."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        "device": device,
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        **gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyfast_ppo": __version__,
        "backends": {s.name: s.detail for s in backends.status() if s.available},
        "libraries": {name: found for name in LIBRARIES if (found := installed(name)) is not None},
    }


def short_name(about: dict) -> str:
    """Of a machine, for files: ``nvidia-h200``, ``amd-epyc-2-cores``."""
    name = about["gpu"] if about["device"] == "cuda" else about["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that is running, "+" if it differs from it; None: this is not a checkout."""
    here = Path(__file__)

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=here.parent, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a virtual environment may lie in somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no", ":/pyfast_ppo", ":/csrc", ":/triton_kernels")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
