"""NVRTC, the device part of NVIDIA's compiler as a library: for versions whose nvcc no package index has.

python tests/csrc/cuda_12/nvrtc.py PACKAGES 80,90 OUT

PACKAGES: where pip put ``nvidia-cuda-nvrtc-cu12`` and ``nvidia-cuda-runtime-cu12``. Writes ``OUT/sm_80/gae.ptx`` and
``OUT/sm_80/gae.log`` for each ``.cu`` of csrc/cuda that has kernels. A process of its own for each version: all of them
call their library ``libnvrtc.so.12``.
"""

from __future__ import annotations

import argparse
import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
STANDARD_HEADERS = ["cmath", "cstdint", "cstring", "limits", "stdexcept", "string", "type_traits"]
# of nvcc's options in toolchain.py, those that concern device code
FLAGS = ["--std=c++17", "-default-device", "--ptxas-options=-v"]


class Nvrtc:
    """The library of one version, with the headers of its CUDA runtime."""

    def __init__(self, packages: Path) -> None:
        self._library = ctypes.CDLL(str(packages / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))
        self._runtime = packages / "nvidia/cuda_runtime/include"

    def version(self) -> tuple[int, int]:
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        return major.value, minor.value

    def architectures(self) -> list[int]:
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        numbers = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return list(numbers)

    def compile(self, source: Path, architecture: int) -> tuple[str, str]:
        """The PTX of a ``.cu`` file, and what ptxas said of the program that it made of it.

        Raises:
            RuntimeError: It does not compile; with the compiler's words.
        """
        headers = {
            "launch.cuh": (HERE / "launch.cuh").read_text(),
            "host_headers.h": (HERE / "host_headers.h").read_text(),
        }
        headers |= {name: '#include "host_headers.h"\n' for name in STANDARD_HEADERS}
        options = [*FLAGS, f"--gpu-architecture=sm_{architecture}"]
        options += [f"--include-path={folder}" for folder in (CSRC, CSRC / "cuda", self._runtime)]
        program = c_void_p()
        self._call(
            "nvrtcCreateProgram",
            byref(program),
            source.read_bytes(),
            str(source).encode(),
            len(headers),
            _strings(list(headers.values())),
            _strings(list(headers)),
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._text("ProgramLog", program)
            if status:
                raise RuntimeError(f"NVRTC {self.version()}, {source} for sm_{architecture}:\n{log}")
            assert self._size("CUBIN", program) > 0
            return self._text("PTX", program), log
        finally:
            self._call("nvrtcDestroyProgram", byref(program))

    def _size(self, kind: str, program: c_void_p) -> int:
        size = c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, byref(size))
        return size.value

    def _text(self, kind: str, program: c_void_p) -> str:
        buffer = ctypes.create_string_buffer(self._size(kind, program))
        self._call(f"nvrtcGet{kind}", program, buffer)
        return buffer.value.decode()

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: error {status}")


def _strings(values: list[str]) -> ctypes.Array[c_char_p]:
    return (c_char_p * len(values))(*(value.encode() for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("architectures", help="80,90")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    nvrtc = Nvrtc(args.packages)
    print("CUDA {}.{}".format(*nvrtc.version()), *nvrtc.architectures())
    for architecture in map(int, args.architectures.split(",")):
        folder = args.out / f"sm_{architecture}"
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(CSRC.glob("cuda/*.cu")):
            if source.name == "launch.cu":  # host code, and a kernel that does nothing
                continue
            ptx, log = nvrtc.compile(source, architecture)
            (folder / f"{source.stem}.ptx").write_text(ptx)
            (folder / f"{source.stem}.log").write_text(log)


if __name__ == "__main__":
    main()
