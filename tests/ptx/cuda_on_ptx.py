"""The CUDA kernels as nvcc compiles them for a GPU that is not there, as the ``cuda`` backend for CPU tensors.

The launchers are those of tests/csrc/emulation; what they launch is not the C++ but the PTX, in ``machine.cpp``.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ptx import Kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[2] / "csrc" / "cuda"))

import cuda_on_cpu
import toolchain

from pyfast_ppo.backends import cuda as backend
from pyfast_ppo.backends._scratch import ScratchPool

CSRC = Path(__file__).parents[2] / "csrc"


def compiled(source: Path, nvcc: str, capability: int) -> str:
    """The PTX of a .cu file; kept under build/ for as long as no source changes."""
    flags = [f for f in toolchain.FLAGS if not f.startswith(("-X", "-fPIC", "-compress"))]
    command = [nvcc, *flags, f"-arch=compute_{capability}", "-ptx", f"-I{CSRC}", str(source)]
    files = [p for p in sorted(CSRC.rglob("*")) if p.suffix in (".cu", ".cuh", ".h")]
    contents = hashlib.sha256(b"".join(p.read_bytes() for p in files) + repr(command).encode()).hexdigest()[:16]
    target = CSRC.parent / "build" / "ptx" / f"{source.stem}-{capability}-{contents}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", target], check=True)
    return target.read_text()


def plain(mangled: str) -> str:
    """A mangled name without what nvcc puts into the name of an unnamed namespace, and a C++ compiler does not."""
    return re.sub(r"\d+_GLOBAL__N__\w{8}_\d+_\w+?_cu_\w{8}|12_GLOBAL__N_1", "<unnamed>", mangled)


class Memory(TorchDispatchMode):
    """Takes note of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in [*args, *(out if isinstance(out, (tuple, list)) else [out])]:
            if isinstance(value, Tensor):
                self.tensors.append(value)
        return out


class CudaOnPtx:
    """Takes the place of CUDA's launcher, while ``with`` it: tensors made there are the memory that kernels may use.

    Attributes:
        seed: Of the order in which warps and blocks take turns.
        launches: In order: (name, PTX kernel, counts of the run).
        change: Applied to each PTX kernel before it runs.

    Args:
        machine: The module made of ``machine.cpp``.
        capability: What nvcc compiles for.
        ptx: A folder with what another compiler made of the sources: ``gae.ptx`` for ``gae.cu``.
    """

    def __init__(self, machine: ModuleType, capability: int = 90, ptx: Path | None = None) -> None:
        nvcc = shutil.which("nvcc")
        assert nvcc is not None or ptx is not None
        self.seed = 0
        self.launches: list[tuple[str, Kernel, Any]] = []
        self.change = lambda kernel: kernel
        self.memory = Memory()
        emulated = cuda_on_cpu.install()
        self._names = _functions(emulated)
        self._kernels = {}
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        texts = [path.read_text() for path in sorted(ptx.glob("*.ptx"))] if ptx else []
        for text in texts or [compiled(source, nvcc, capability) for source in sources]:
            for name in re.findall(r"\.entry\s+(\w+)", text):
                self._kernels[plain(name)] = Kernel(machine, text, name)
        emulated.launch_with(self._run)

    def __enter__(self) -> CudaOnPtx:
        self.memory.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.__exit__(*error)

    def forget_tensors(self) -> None:
        """Kernels may use none of those that were made so far."""
        self.memory.tensors.clear()
        self.forget_scratch()

    def forget_scratch(self) -> None:
        backend._scratch = ScratchPool()

    def _run(self, address: int, blocks: int, threads: int, arguments: list[bytes]) -> None:
        name = self._names[address]
        kernel = self.change(self._kernels[name])
        data = bytearray(max(p.offset + p.size for p in kernel.parameters.values()))
        for parameter, argument in zip(kernel.parameters.values(), arguments, strict=True):
            assert parameter.size == len(argument), name
            data[parameter.offset : parameter.offset + parameter.size] = argument
        tensors = [t for t in self.memory.tensors if t.device.type == "cpu"]
        counts = kernel.run(blocks, threads, bytes(data), tensors, seed=self.seed)
        readable = re.search(r"((?:[a-z]+_)*kernel)", name)
        self.launches.append((readable[1] if readable else name, kernel, counts))


def _functions(module: ModuleType) -> dict[int, str]:
    """Address -> plain mangled name of the functions in a module that is loaded."""
    path = module.__file__
    listed = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    symbols = {name: int(at, 16) for at, name in re.findall(r"^(\w+) [tTW] (\w+)$", listed, flags=re.MULTILINE)}
    with open("/proc/self/maps") as maps:
        start = min(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(path)))
    return {start + at: plain(name) for name, at in symbols.items()}
