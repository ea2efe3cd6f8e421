"""The CUDA sources with CUDA 12, the oldest and the last of it, without its nvcc, which no package index has.

Device code: compiled by CUDA 12's NVRTC, which is nvcc's device compiler and ptxas as a library, and run as PTX on the
CPU (tests/ptx). Host code: compiled by the nvcc that is here, with the headers of CUDA 12, and linked with its runtime.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
VERSIONS = {"12.0": (80,), "12.9": (120,)}  # and what is compiled for
CASES = r"loss A=(12|19)|gae T=(24|70)|gaussian A=12"
LARGEST_ERROR = 5e-5
# Bytes: NVRTC 12.9 keeps up to three registers in local memory in the loss kernels that read one element at a time, for
# Blackwell; 12.8, the first that knows it: 72 bytes, and 8 in two others. nvcc 13: none (test_cuda_machine_code.py).
LARGEST_STACK = 16
HAS_CUDART_STATIC = "12.9"


def cannot_run(reason: str) -> NoReturn:
    message = f"CUDA 12 is NOT tested here: {reason}"
    if os.environ.get("CI"):
        pytest.fail(message)
    warnings.warn(message, stacklevel=2)  # pytest shows warnings without being asked, reasons of skips it does not
    pytest.skip(message)


def load_toolchain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchain", CSRC / "cuda" / "toolchain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()


class Packages(NamedTuple):
    version: str
    folder: Path

    @property
    def runtime(self) -> Path:
        return self.folder / "nvidia" / "cuda_runtime"


@pytest.fixture(scope="module", params=VERSIONS)
def packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packages]:
    """What pip has of a CUDA 12; 25 MB for 12.0, 95 MB for 12.9."""
    folder = tmp_path_factory.mktemp("packages")
    names = [f"nvidia-cuda-{part}-cu12=={request.param}.*" for part in ("nvrtc", "runtime")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--target", folder, *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        cannot_run(f"pip install {' '.join(names)} failed:\n{done.stdout[-4000:]}")
    yield Packages(request.param, folder)
    shutil.rmtree(folder)  # pytest keeps the folders of three sessions, and these are large


class DeviceCode(NamedTuple):
    known: list[int]  # architectures
    folders: dict[int, Path]  # of PTX and what ptxas said, by architecture


@pytest.fixture(scope="module")
def device_code(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> DeviceCode:
    out, numbers = tmp_path_factory.mktemp("device-code"), VERSIONS[packages.version]
    command = [sys.executable, HERE / "cuda_12" / "nvrtc.py", packages.folder, ",".join(map(str, numbers)), out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    name, version, *known = done.stdout.split()
    assert (name, version) == ("CUDA", packages.version)
    return DeviceCode([int(number) for number in known], {number: out / f"sm_{number}" for number in numbers})


def test_every_kernel(device_code: DeviceCode) -> None:
    """All that stand in the sources are there; in registers, but for a few, and two blocks of the loss fit."""
    used = r"'(\w+)' for 'sm_\d+'\s.*\s.*?(\d+) bytes stack frame.*\s.*?Used (\d+) registers"
    for number, folder in device_code.folders.items():
        for source in sorted(CSRC.glob("cuda/*.cu")):
            written = set(re.findall(r"(\w+_kernel)\(", source.read_text()))
            if source.name == "launch.cu":  # its kernel does nothing
                continue
            programs = re.findall(used, (folder / f"{source.stem}.log").read_text())
            assert programs
            for kernel in written:
                assert any(kernel in name for name, _, _ in programs), f"{kernel} for sm_{number}"
            for name, stack, registers in programs:
                by_elements = "ppo_loss_kernel" in name and "Lb0E" in name
                assert int(stack) <= (LARGEST_STACK if by_elements else 0), f"{name} for sm_{number}"
                if "15ppo_loss_kernelIf" in name:
                    assert int(registers) <= 80, f"{name} for sm_{number}"


def test_results(device_code: DeviceCode) -> None:
    """Of the PTX, in any order of warps and blocks: as float64 has them."""
    script = HERE.parent / "ptx" / "on_ptx.py"
    folder = list(device_code.folders.values())[-1]
    command = [sys.executable, script, "cuda", "--ptx", folder, "--cases", CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = json.loads(done.stdout)["cases"]
    assert len(cases) >= 15
    for name, case in cases.items():
        assert case["error"] < LARGEST_ERROR, name
        assert case["same"], name


def find_nvcc(tmp_path: Path) -> toolchain.Nvcc:
    """The one of this machine, which in CI is downloaded where there is none, as for the build."""
    if os.environ.get("CI") or any(toolchain.candidates(tmp_path)):
        return toolchain.get_nvcc(tmp_path / "toolkit", even_without_driver=True)
    cannot_run("there is no nvcc")


def test_architectures(packages: Packages, device_code: DeviceCode) -> None:
    """toolchain.py leaves out what this CUDA does not know, and says so where it is asked for."""
    names = frozenset(f"{kind}_{number}" for number in device_code.known for kind in ("sm", "compute"))
    nvcc = toolchain.Nvcc(Path("nvcc"), tuple(map(int, packages.version.split("."))), "", names, [], Path())
    chosen = toolchain.choose_architectures([], nvcc)
    if packages.version == "12.0":
        assert chosen == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
        with pytest.raises(SystemExit, match=r"asks for sm_120, which nvcc 12\.0"):
            toolchain.choose_architectures(["sm_120"], nvcc)
    else:
        assert chosen == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]


def test_host_code(packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's functions are as the launchers expect them, and all that they need is in its static library."""
    nvcc = find_nvcc(tmp_path)
    includes = [packages.runtime / "include"]
    if packages.version == "12.0":  # nvcc's own headers name a type that is new in 12.1
        (tmp_path / "before").mkdir()
        header = "typedef struct CUkern_st* cudaKernel_t;\n#include_next <cuda_runtime.h>\n"
        (tmp_path / "before/cuda_runtime.h").write_text(header)
        includes.insert(0, tmp_path / "before")
    # nothing of the device code is looked at here
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", " ".join([*(f"-I{folder}" for folder in includes), "-Xcicc -O0"]))
    objects = toolchain.compile_all(nvcc, ["compute_80"], CSRC, tmp_path)
    assert len(objects) == len(list(CSRC.glob("cuda/*.cu")))
    if packages.version != HAS_CUDART_STATIC:
        return
    cudart, target = packages.runtime / "lib" / "libcudart_static.a", tmp_path / "linked.so"
    headers = [f"-I{folder}" for folder in (CSRC, *includes, *nvcc.include_dirs)]  # CUDA's crt/ is the compiler's
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-shared", "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined"]
    command = ["c++", *flags, *headers, HERE / "cuda_12" / "linked.cpp", *objects, cudart, "-pthread", "-ldl", "-lrt"]
    subprocess.run([*command, "-o", target], check=True)
    linked = ctypes.CDLL(str(target))
    linked.unavailable_reason.restype = ctypes.c_char_p
    assert linked.runtime_version() // 10 == 1209
    reason = linked.unavailable_reason().decode()
    assert reason in ("", "there is no NVIDIA driver", "there is no GPU") or "not built for this GPU" in reason
