"""Compiles csrc/cuda for setup.py: finds nvcc, or fetches it, or says in one sentence why there are no CUDA kernels.

``PYFAST_PPO_CUDA``        ``auto`` (default): with CUDA where it can be done, else a CPU build that knows why.
                           ``on``: with CUDA, or the build stops. ``off``: without.
``PYFAST_PPO_CUDA_ARCHS``  what to compile for: ``90``, ``8.0;9.0+PTX``, ``native``.
``MAX_JOBS``               how many compilers run at a time; unset: as many as there are cores.

Standard library only: this runs in the isolated environment of a build, where there is no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

OLDEST_NVCC = (12, 0)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
FLAGS += ["--expt-relaxed-constexpr"]  # csrc/math takes its constants from std::numeric_limits, here as on the host
USUAL_TOOLKIT = Path("/usr/local/cuda")
DRIVER_IN_PROC = Path("/proc/driver/nvidia")

# What is downloaded where there is no nvcc: one minor version, because the headers and the compiler belong together.
# 13.2 is the first whose headers agree with glibc 2.42; its programs run with every driver for CUDA 13.
DOWNLOADED = "13.2"
DOWNLOADED_MAJOR = 13
PACKAGES = ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl"]
INSTALL_A_TOOLKIT = "install the CUDA toolkit (12.0 or newer), set CUDA_HOME to its folder and build again"


class BuildStopped(SystemExit):
    """The build ends with this message; no traceback stands between the reader and the sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")


class Unavailable(Exception):
    """Why the CUDA part can't be built here, and what mends it."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(f"{reason}; {mend}")
        self.reason = reason


class Nvcc(NamedTuple):
    """A compiler and the parts of its toolkit that the extension needs."""

    path: Path
    version: tuple[int, int]
    release: str  # all of `nvcc --version`: part of what an object was made of
    known: frozenset[str]  # sm_80, compute_80 ...
    include_dirs: list[str]
    cudart: Path  # libcudart_static.a

    @property
    def name(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"


class CudaBuild(NamedTuple):
    """What setup.py adds to the extension: the sentence for ``doctor``, and with CUDA the objects to link."""

    note: str
    note_file: Path  # newer than the extension when the sentence is another one: then it is linked anew
    objects: list[str]
    include_dirs: list[str]


def build(csrc: Path, temp: Path) -> CudaBuild:
    """Compiles ``csrc/cuda/*.cu`` into ``temp``, as the environment variables say."""
    mode = os.environ.get("PYFAST_PPO_CUDA") or "auto"
    if mode not in ("auto", "on", "off"):
        raise BuildStopped(f"PYFAST_PPO_CUDA is {mode!r}; it can be auto, on or off")
    temp.mkdir(parents=True, exist_ok=True)
    if mode == "off":
        return CudaBuild(*note(temp, "built with PYFAST_PPO_CUDA=off"), [], [])
    asked = parse_architectures(os.environ.get("PYFAST_PPO_CUDA_ARCHS", ""))
    try:
        nvcc = get_nvcc(temp / "toolkit", even_without_driver=mode == "on")
        architectures = choose_architectures(asked, nvcc)
        objects = compile_all(nvcc, architectures, csrc, temp)
    except Unavailable as problem:
        if mode == "on":
            raise BuildStopped(f"PYFAST_PPO_CUDA=on, but {problem}. PYFAST_PPO_CUDA=off builds without CUDA.") from None
        say(f"none: {problem}")
        return CudaBuild(*note(temp, str(problem)), [], [])
    version = "CUDA {}.{}".format(*nvcc.version)
    return CudaBuild(
        *note(temp, f"{version}, {' '.join(architectures)}"),
        objects=[*map(str, objects), str(nvcc.cudart)],
        include_dirs=nvcc.include_dirs,
    )


def note(temp: Path, text: str) -> tuple[str, Path]:
    """The sentence in plain ASCII on one line, fit for a string literal, and the file that remembers it."""
    text = re.sub(r"[^ -~]", "?", " ".join(text.split()))
    file = temp / "note.txt"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return text, file


def say(line: str) -> None:
    print(f"pyfast_ppo, CUDA part: {line}", flush=True)


def output_of(*command: object, env: dict[str, str] | None = None) -> tuple[bool, str]:
    """Whether a command succeeded, and all that it said, in English."""
    env = {**(os.environ if env is None else env), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        )
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout


def complaint(output: str) -> str:
    """The line of a failed command's output that a person would quote."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), lines[-1])[:300]


# The compiler


def get_nvcc(download_to: Path, even_without_driver: bool) -> Nvcc:
    """The first nvcc that is new enough; where there is none at all, a downloaded one."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("the CUDA part is for Linux", "on Windows, build under WSL")
    problems = []
    for path in dict.fromkeys(candidates(download_to)):
        try:
            return inspect(path)
        except Unavailable as problem:
            say(f"passing over {path}: {problem.reason}")
            problems.append(problem)
    if problems:
        raise problems[0]
    driver = driver_version()
    if driver is None and not even_without_driver:
        raise Unavailable(
            "no CUDA compiler and no NVIDIA driver were found when it was built",
            "`PYFAST_PPO_CUDA=on pip install .` builds it all the same",
        )
    if driver and driver < DOWNLOADED_MAJOR * 1000:
        raise Unavailable(
            f"no CUDA compiler was found when it was built, and the NVIDIA driver, which is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}, is too old for the one that pip can download ({DOWNLOADED})",
            f"update the driver, or install a CUDA {driver // 1000} toolkit, and build again",
        )
    return inspect(download(download_to))


def candidates(downloaded_to: Path) -> Iterator[Path]:
    """Every nvcc there is, the wanted one first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield from existing(Path(os.environ[variable]) / "bin/nvcc")
    yield from existing(*filter(None, [shutil.which("nvcc")]))
    yield from existing(USUAL_TOOLKIT / "bin/nvcc")
    for folder in dict.fromkeys([*package_folders(), downloaded_to]):
        toolkit = folder / f"nvidia/cu{DOWNLOADED_MAJOR}"
        for nvcc in existing(toolkit / "bin/nvcc"):
            # cuda_fp16.h includes it, and nvidia-cuda-nvcc does not bring it along.
            if any((toolkit / include / "nv/target").exists() for include in ("include/cccl", "include")):
                yield nvcc
            else:
                say(f"passing over {nvcc}: the headers of nvidia-cuda-cccl are not beside it")


def existing(*paths: str | Path) -> Iterator[Path]:
    return (Path(path) for path in paths if Path(path).is_file())


def package_folders() -> Iterator[Path]:
    """Where packages are installed: on sys.path, and where an isolated build does not look."""
    yield from map(Path, filter(None, sys.path))
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))  # pip isolates with the same Python
    yield Path(site.getusersitepackages())
    if os.environ.get("VIRTUAL_ENV"):  # other frontends build in an environment of their own
        yield from sorted(Path(os.environ["VIRTUAL_ENV"]).glob("lib/python3*/site-packages"))


def inspect(path: Path) -> Nvcc:
    """Version, architectures and toolkit of an nvcc, by asking it: it may be a script that calls another one."""
    ran, release = output_of(path, "--version")
    match = re.search(r"release (\d+)\.(\d+)", release)
    if not ran or not match:
        raise Unavailable(f"{path} does not run ({complaint(release)})", INSTALL_A_TOOLKIT)
    version = (int(match[1]), int(match[2]))
    if version < OLDEST_NVCC:
        raise Unavailable("{} is of CUDA {}.{}, which is too old".format(path, *version), INSTALL_A_TOOLKIT)
    known = " ".join(output_of(path, option)[1] for option in ("--list-gpu-code", "--list-gpu-arch"))
    ran, dry_run = output_of(path, "--dryrun", "-c", "-x", "cu", os.devnull)
    if not ran:
        raise Unavailable(f"{path} does not run ({complaint(dry_run)})", INSTALL_A_TOOLKIT)
    settings = dict(re.findall(r"^#\$ (TOP|INCLUDES|LIBRARIES)=(.*)$", dry_run, re.MULTILINE))
    top = Path(settings.get("TOP") or path.parent.parent)
    includes, libraries = (
        [Path(word[2:]) for word in shlex.split(settings.get(name, "")) if word.startswith(option)]
        for name, option in (("INCLUDES", "-I"), ("LIBRARIES", "-L"))
    )
    # Not in nvcc's own list: the folder of the PyPI packages, which have no lib64.
    libraries += [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    cudart = next(
        (library / "libcudart_static.a" for library in libraries if (library / "libcudart_static.a").exists()), None
    )
    if cudart is None:
        raise Unavailable(f"the toolkit of {path} has no libcudart_static.a", INSTALL_A_TOOLKIT)
    include_dirs = [str(folder.resolve()) for folder in [*includes, top / "include"] if folder.is_dir()]
    known = frozenset(re.findall(r"\b(?:sm|compute)_\d+\b", known))
    return Nvcc(path, version, release, known, list(dict.fromkeys(include_dirs)), cudart.resolve())


def download(folder: Path) -> Path:
    """NVIDIA's compiler from the package index, in ``folder``.

    Not through ``setup_requires``: a build requirement that can't be fetched makes pip fail the whole installation,
    and here it has to leave a working CPU build.
    """
    # pip's isolated environment hides the pip that runs it through PYTHONPATH, and what is set for the user's own
    # installation (PIP_USER=1) contradicts --target.
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PIP_PREFIX", "PIP_TARGET")}
    env["PIP_USER"] = "0"
    installer = next(
        (command for command in installers() if output_of(*command, "install", "--help", env=env)[0]), None
    )
    if installer is None:
        raise Unavailable("no CUDA compiler was found when it was built, and no pip to download one", INSTALL_A_TOOLKIT)
    requirements = [f"{package}=={DOWNLOADED}.*" for package in PACKAGES]
    say(f"no nvcc here; downloading NVIDIA's (about 130 MB): {' '.join(requirements)}")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    done, output = output_of(
        *installer, "install", "--target", partial, "--only-binary", ":all:", *requirements, env=env
    )
    print(output, flush=True)
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
        raise Unavailable(
            f"no CUDA compiler was found when it was built, and downloading one failed ({complaint(output)})",
            INSTALL_A_TOOLKIT,
        )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder / f"nvidia/cu{DOWNLOADED_MAJOR}/bin/nvcc"


def installers() -> Iterator[list[str]]:
    """The package is for every Python alike, so whichever pip there is will do; uv makes environments without one."""
    yield [sys.executable, "-m", "pip"]
    yield [getattr(sys, "_base_executable", sys.executable), "-m", "pip"]
    yield [os.environ.get("UV") or "uv", "pip"]
    yield ["pip"]


# The GPU's driver and architectures


def driver_version() -> int | None:
    """13020 for CUDA 13.2; 0 for a driver that does not say, as in a container; None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0 if DRIVER_IN_PROC.exists() else None
    version = ctypes.c_int()
    return version.value if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def native_architectures() -> list[str]:
    """Of the GPUs in this machine."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = set()
    for index in range(count.value):
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # and _MINOR
        found.add(major.value * 10 + minor.value)
    return [f"sm_{number}" for number in sorted(found)]


def parse_architectures(value: str) -> list[str]:
    """``"8.0;90+PTX"`` as ``["sm_80", "sm_90", "compute_90"]``: programs, and PTX for GPUs to come. Empty: no wish."""
    if value.strip().lower() == "native":
        names = native_architectures()
        if not names:
            raise BuildStopped("PYFAST_PPO_CUDA_ARCHS is native, but the NVIDIA driver shows no GPU in this machine")
        return names
    names = []
    for word in re.split(r"[\s,;]+", value.strip()) if value.strip() else []:
        match = re.fullmatch(r"(\d+)\.?(\d)(\+ptx)?", word, re.IGNORECASE)
        if not match:
            raise BuildStopped(
                f"PYFAST_PPO_CUDA_ARCHS is {value!r}, and {word!r} in it is no architecture; "
                "it can be a list such as '80,90' or '8.0;9.0+PTX', or 'native'"
            )
        names += [f"sm_{match[1]}{match[2]}"] + ([f"compute_{match[1]}{match[2]}"] if match[3] else [])
    return list(dict.fromkeys(names))


def choose_architectures(asked: list[str], nvcc: Nvcc) -> list[str]:
    """What was asked for, if this nvcc knows it; else all of ours that it knows, and PTX of the newest."""
    unknown = [name for name in asked if name not in nvcc.known]
    if unknown:
        knows = " ".join(
            sorted((name for name in nvcc.known if name.startswith("sm_")), key=lambda name: int(name[3:]))
        )
        raise BuildStopped(
            f"PYFAST_PPO_CUDA_ARCHS asks for {' '.join(unknown)}, which {nvcc.name} ({nvcc.path}) does not know; "
            f"it knows {knows}"
        )
    if asked:
        return asked
    numbers = [number for number in ARCHITECTURES if f"sm_{number}" in nvcc.known]
    return [*(f"sm_{number}" for number in numbers), f"compute_{numbers[-1]}"]


# The objects


def compile_all(nvcc: Nvcc, architectures: list[str], csrc: Path, temp: Path) -> list[Path]:
    """An object for each ``.cu``, compiled side by side; what is left of the cores goes to nvcc's own threads."""
    sources = sorted(csrc.glob("cuda/*.cu"))
    headers = sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh", ".inl"))
    jobs = max(1, int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))))
    threads = max(1, jobs // max(1, len(sources)))
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda s: compile_one(nvcc, architectures, s, headers, csrc, temp, threads), sources))


def compile_one(
    nvcc: Nvcc, architectures: list[str], source: Path, headers: list[Path], csrc: Path, temp: Path, threads: int
) -> Path:
    """The object of one source; left as it is when made of the same text by the same command."""
    target = temp / f"{source.stem}.o"
    stamp = temp / f"{source.stem}.stamp"
    gencode = [f"-gencode=arch=compute_{name.rpartition('_')[2]},code={name}" for name in architectures]
    command = [nvcc.path, *FLAGS, *gencode, "-I", csrc, "-c", source, "-o", target]
    made_of = fingerprint([*map(str, command), nvcc.release], [source, *headers])
    if target.exists() and stamp.exists() and stamp.read_text() == made_of:
        return target
    stamp.unlink(missing_ok=True)
    say(f"{nvcc.name}: {source} for {' '.join(architectures)}")
    done, output = output_of(*command, "--threads", threads)
    if output.strip():
        print(output, flush=True)
    if not done:
        raise Unavailable(
            f"{nvcc.name} could not compile {source} when it was built ({complaint(output)})",
            "if the host compiler is too new for it, name another one: NVCC_PREPEND_FLAGS='-ccbin g++-13'",
        )
    stamp.write_text(made_of)
    return target


def fingerprint(command: list[str], files: list[Path]) -> str:
    """Of a command, with what nvcc reads from the environment, and of the files that it compiles."""
    variables = [os.environ.get(f"NVCC_{name}", "") for name in ("PREPEND_FLAGS", "APPEND_FLAGS", "CCBIN")]
    digest = hashlib.sha256(repr([command, variables]).encode())
    for file in files:
        digest.update(f"\0{file}\0".encode() + file.read_bytes())
    return digest.hexdigest()
