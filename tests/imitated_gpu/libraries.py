"""The imitated CUDA libraries, compiled for the torch that is installed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import toolchain
import torch

HERE = Path(__file__).parent
PACKAGES = Path(torch.__file__).parents[1]
COMPILER = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O1", "-shared", "-fPIC"]
# the name of each, which others load it by, its source, and flags
LIBRARIES = {
    "libcudart.so.13": ("cuda_runtime.cpp", []),
    "libcublas.so.13": ("cublas.cpp", []),
    "libcublasLt.so.13": ("cublas.cpp", ["-DIS_CUBLASLT"]),
    "libcuda.so.1": ("cuda_driver.cpp", []),
}


def why_not() -> str | None:
    """Why they cannot take the place of this torch's."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not (torch.version.cuda or "").startswith("13."):
        return f"this torch was not built with CUDA 13, which is imitated: {torch.__version__}"
    return None if headers() else "no nvcc is there, and CUDA's headers come with it"


def headers() -> list[str]:
    """Flags of the compiler. The headers in torch's own packages are not complete."""
    for nvcc in toolchain.candidates(HERE):
        with contextlib.suppress(toolchain.Unavailable):
            return [f"-I{folder}" for folder in toolchain.inspect(nvcc).include_dirs]
    return []


def build() -> list[Path]:
    """Their paths, to be loaded before torch; compiled anew if a source or torch has changed."""
    sources = b"".join((HERE / name).read_bytes() for name in sorted({source for source, _ in LIBRARIES.values()}))
    contents = hashlib.sha256(sources + repr((torch.__version__, COMPILER)).encode()).hexdigest()[:16]
    folder = HERE.parents[1] / "build" / "imitated_gpu" / contents
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, flags) in LIBRARIES.items():
        if not (folder / name).exists():
            _compile(folder, name, HERE / source, flags)
    return [folder / name for name in LIBRARIES]


def _compile(folder: Path, name: str, source: Path, flags: list[str]) -> None:
    # torch's libraries ask for symbols with the version that NVIDIA's have; so do others for those nobody calls here
    versions = folder / f"{name}.map"
    versions.write_text(f"{name} {{ global: *; }};\n")
    unfinished = folder / f"{name}.{os.getpid()}"
    command = [*COMPILER, *headers(), *flags, source, "-o", unfinished, f"-Wl,-soname,{name}"]
    command += [] if name == "libcuda.so.1" else [f"-Wl,--version-script={versions}"]
    _run(command)
    missing = _asked_of(name) - _symbols(unfinished, "--defined-only")
    if missing:
        rest = folder / f"{name}.rest.cpp"
        rest.write_text("".join(f'extern "C" int {symbol}() {{ return 801; }}\n' for symbol in sorted(missing)))
        _run([*command, rest])
    unfinished.replace(folder / name)


def _asked_of(library: str) -> set[str]:
    """What torch's and NVIDIA's libraries want of it; the rest of them says "not supported"."""
    users = [*PACKAGES.glob("torch/lib/*.so"), *PACKAGES.glob("nvidia/*/lib/*.so*")]
    users = [path for path in users if path.name not in LIBRARIES]
    return set().union(*(_symbols(path, "--undefined-only", f"@{library}") for path in users))


def _symbols(path: Path, which: str, version: str = "") -> set[str]:
    listed = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True).stdout
    return set(re.findall(rf" [UTVWBD] (\w+){re.escape(version)}", listed))


def _run(command: list[object]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")
