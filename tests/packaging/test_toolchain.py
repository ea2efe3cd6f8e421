"""csrc/cuda/toolchain.py with compilers and a pip that are shell scripts: what it chooses, says and compiles anew."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) echo "{code}" ;;
  --list-gpu-arch) echo "{arch}" ;;
  --dryrun*) echo '#$ TOP={toolkit}/bin/..'
             echo '#$ INCLUDES="-I{toolkit}/bin/../include"'
             echo '#$ LIBRARIES=  "-L{toolkit}/lib64/stubs" "-L{toolkit}/lib64"' ;;
  *) echo "$*" >> "{toolkit}/compiled"
     [ ! -f "{toolkit}/broken" ] || {{ echo "In file included from a"; echo "gae.cu(3): error: no"; exit 1; }}
     while [ "$1" != -o ]; do shift; done
     : > "$2" ;;
esac
"""
KNOWN = (75, 80, 86, 89, 90, 100, 120)


def load_toolchain() -> SimpleNamespace:
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc/cuda/toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()


def make_toolkit(folder: Path, version: str = "13.0", known: tuple[int, ...] = KNOWN, lib: str = "lib64") -> Path:
    """A CUDA toolkit whose nvcc only writes down what it was asked to compile; returns that nvcc."""
    for part in ("bin", "include/cccl/nv", lib):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "include/cccl/nv/target").touch()
    (folder / lib / "libcudart_static.a").touch()
    code, arch = ("\n".join(f"{kind}_{number}" for number in known) for kind in ("sm", "compute"))
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(NVCC.format(version=version, toolkit=folder, code=code, arch=arch))
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with no CUDA at all, and the sources of a small project."""
    for name in (
        "CUDA_HOME",
        "CUDA_PATH",
        "PYFAST_PPO_CUDA",
        "PYFAST_PPO_CUDA_ARCHS",
        "VIRTUAL_ENV",
        "MAX_JOBS",
        "NVCC_APPEND_FLAGS",
    ):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "on_path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"))
    monkeypatch.setattr(toolchain, "USUAL_TOOLKIT", tmp_path / "usual")
    monkeypatch.setattr(toolchain, "package_folders", lambda: [tmp_path / "packages"])
    monkeypatch.setattr(toolchain, "driver_version", lambda: None)
    monkeypatch.setattr(toolchain, "installers", lambda: [])
    csrc, temp = tmp_path / "csrc", tmp_path / "build"
    (csrc / "cuda").mkdir(parents=True)
    for name in ("cuda/gae.cu", "cuda/loss.cu", "cuda/launch.cuh", "tensor.h"):
        (csrc / name).write_text(name)

    def build():
        return toolchain.build(csrc, temp)

    def driver(version):
        monkeypatch.setattr(toolchain, "driver_version", lambda: version)

    def pip(script):
        path = tmp_path / "pip"
        path.write_text(f'#!/bin/sh\n[ "$2" != --help ] || exit 0\necho "$*" > {tmp_path}/asked\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(toolchain, "installers", lambda: [["/nonexistent/pip"], [str(path)]])

    return SimpleNamespace(root=tmp_path, csrc=csrc, build=build, driver=driver, pip=pip, setenv=monkeypatch.setenv)


def compiled(toolkit: Path) -> list[str]:
    """The sources compiled since the last look."""
    log = toolkit / "compiled"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(Path(word).name for line in lines for word in line.split() if word.endswith(".cu"))


# Which nvcc


def test_search_order(machine):
    root = machine.root
    nvccs = [make_toolkit(root / name) for name in ("home", "path", "usual", "packages/nvidia/cu13")]
    on_path = root / "on_path/nvcc"
    on_path.symlink_to(nvccs[0])
    machine.setenv("CUDA_HOME", str(root / "home"))
    machine.setenv("CUDA_PATH", str(root / "path"))
    order = [nvccs[0], nvccs[1], on_path, *nvccs[2:]]
    assert list(toolchain.candidates(root / "downloaded")) == order
    downloaded = make_toolkit(root / "downloaded/nvidia/cu13")
    assert list(toolchain.candidates(root / "downloaded")) == [*order, downloaded]
    machine.setenv("CUDA_HOME", str(root / "nowhere"))
    assert list(toolchain.candidates(root / "downloaded")) == [*order[1:], downloaded]


def test_packages_that_an_isolated_build_hides(monkeypatch, tmp_path):
    packages = tmp_path / "venv/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: f"/hidden/{name}")
    folders = list(toolchain.package_folders())
    assert folders[: len(sys.path)] == [Path(folder) for folder in sys.path if folder]
    assert {packages, Path("/hidden/purelib")} <= set(folders)


def test_a_package_without_the_headers_beside_it_is_passed_over(machine, capsys):
    nvcc = make_toolkit(machine.root / "packages/nvidia/cu13")
    (machine.root / "packages/nvidia/cu13/include/cccl/nv/target").unlink()
    assert list(toolchain.candidates(machine.root)) == []
    assert f"passing over {nvcc}" in capsys.readouterr().out


def test_a_script_on_the_path_leads_to_its_toolkit(machine):
    make_toolkit(machine.root / "toolkit")
    script = machine.root / "on_path/nvcc"
    script.write_text(f'#!/bin/sh\nexec {machine.root}/toolkit/bin/nvcc "$@"\n')
    script.chmod(0o755)
    nvcc = toolchain.inspect(script)
    assert nvcc.cudart == machine.root / "toolkit/lib64/libcudart_static.a"
    assert nvcc.include_dirs == [str(machine.root / "toolkit/include")]
    assert nvcc.version == (13, 0)


@pytest.mark.parametrize("lib", ["lib", "targets/sbsa-linux/lib"])
def test_where_the_runtime_library_is(machine, lib):
    nvcc = toolchain.inspect(make_toolkit(machine.root / "toolkit", lib=lib))
    assert nvcc.cudart == machine.root / "toolkit" / lib / "libcudart_static.a"


def test_an_older_nvcc_does_not_hide_a_newer_one(machine):
    machine.setenv("CUDA_HOME", str(make_toolkit(machine.root / "old", version="11.8").parents[1]))
    make_toolkit(machine.root / "usual", version="12.4")
    assert machine.build().note.startswith("CUDA 12.4, sm_80")


# PYFAST_PPO_CUDA


def test_mode_is_one_of_three(machine):
    machine.setenv("PYFAST_PPO_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"PYFAST_PPO_CUDA is 'yes'; it can be auto, on or off"):
        machine.build()


def test_off(machine):
    make_toolkit(machine.root / "usual")
    machine.setenv("PYFAST_PPO_CUDA", "off")
    build = machine.build()
    assert build.note == "built with PYFAST_PPO_CUDA=off"
    assert not build.objects
    assert not compiled(machine.root / "usual")


@pytest.mark.parametrize("mode", ["auto", "on", ""])
def test_with_a_compiler(machine, mode):
    make_toolkit(machine.root / "usual")
    machine.setenv("PYFAST_PPO_CUDA", mode)
    build = machine.build()
    assert build.note == "CUDA 13.0, sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120"
    assert build.note_file.read_text() == build.note
    assert [Path(path).name for path in build.objects] == ["gae.o", "loss.o", "libcudart_static.a"]
    assert build.include_dirs == [str(machine.root / "usual/include")]
    assert compiled(machine.root / "usual") == ["gae.cu", "loss.cu"]


def test_auto_without_compiler_and_driver(machine):
    machine.pip("exit 1")
    build = machine.build()
    assert not build.objects
    assert "no CUDA compiler and no NVIDIA driver were found" in build.note
    assert "PYFAST_PPO_CUDA=on pip install ." in build.note
    assert not (machine.root / "asked").exists()


def problem(machine, kind: str) -> str:
    """Makes the machine one where CUDA can't be built; returns words of the reason."""
    if kind == "too old":
        make_toolkit(machine.root / "usual", version="11.8")
        return "is of CUDA 11.8, which is too old"
    if kind == "does not run":
        make_toolkit(machine.root / "usual").write_text("#!/bin/sh\necho 'fatal: no licence'; exit 2\n")
        return "does not run (fatal: no licence)"
    if kind == "no runtime library":
        make_toolkit(machine.root / "usual")
        (machine.root / "usual/lib64/libcudart_static.a").unlink()
        return "has no libcudart_static.a"
    if kind == "does not compile":
        make_toolkit(machine.root / "usual")
        (machine.root / "usual/broken").touch()
        return "when it was built (gae.cu(3): error: no)"
    machine.driver(13000)
    if kind == "driver too old":
        machine.driver(12080)
        return "driver, which is for CUDA 12.8, is too old"
    if kind == "download fails":
        machine.pip("echo Looking in indexes; echo ERROR: no network; exit 1")
        return "downloading one failed (ERROR: no network)"
    return "no pip to download one"


@pytest.mark.parametrize(
    "kind",
    ["too old", "does not run", "no runtime library", "does not compile", "driver too old", "download fails", "no pip"],
)
def test_auto_knows_why_not_and_on_stops(machine, kind, capsys):
    words = problem(machine, kind)
    build = machine.build()
    assert words in build.note
    assert not build.objects
    assert words in capsys.readouterr().out  # what stood there is in the build's log too
    machine.setenv("PYFAST_PPO_CUDA", "on")
    with pytest.raises(SystemExit) as stopped:
        machine.build()
    assert words in str(stopped.value)
    assert str(stopped.value).startswith("error: PYFAST_PPO_CUDA=on, but ")


def test_what_the_compiler_says_is_shown(machine, capsys):
    problem(machine, "does not compile")
    machine.build()
    out = capsys.readouterr().out
    assert "In file included from a" in out
    assert "gae.cu for sm_80 sm_86" in out


@pytest.mark.parametrize(("mode", "driver"), [("on", None), ("auto", 13000), ("auto", 0)])
def test_download(machine, mode, driver):
    make_toolkit(machine.root / "index/nvidia/cu13", version="13.2", lib="lib")
    machine.pip(f'/bin/mkdir -p "$3" && /bin/cp -r {machine.root}/index/nvidia "$3"')
    machine.setenv("PYFAST_PPO_CUDA", mode)
    machine.driver(driver)
    assert machine.build().note.startswith("CUDA 13.2, ")
    asked = (machine.root / "asked").read_text()
    assert asked.startswith(f"install --target {machine.root}/build/toolkit.partial --only-binary :all: ")
    assert "nvidia-cuda-nvcc==13.2.* nvidia-cuda-crt==13.2.* nvidia-nvvm==13.2.*" in asked
    machine.pip("exit 1")
    assert machine.build().objects, "what is downloaded serves the next build"


def test_pip_of_the_environment_that_the_build_hides(machine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/isolated")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PYFAST_PPO_CUDA", "on")
    machine.pip('echo "error: PYTHONPATH=$PYTHONPATH PIP_USER=$PIP_USER"; exit 1')
    with pytest.raises(SystemExit, match=r"PYTHONPATH= PIP_USER=0"):
        machine.build()


def test_the_reason_fits_a_string_literal(tmp_path):
    text, file = toolchain.note(tmp_path, 'error: ‘x’\n\t"y" \x1b[0m')
    assert text == 'error: ?x? "y" ?[0m'
    before = file.stat().st_mtime_ns
    toolchain.note(tmp_path, text)
    assert file.stat().st_mtime_ns == before, "the extension is not linked anew for the same sentence"


# The driver


class Driver:
    """libcuda.so.1 with one GPU for each compute capability."""

    def __init__(self, *capabilities: tuple[int, int], status: int = 0) -> None:
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, version):
        version._obj.value = 13020
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index + 100
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device.value - 100][attribute - 75]
        return 0


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_driver_version(monkeypatch, tmp_path):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert toolchain.driver_version() == 13020
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status=34))
    assert toolchain.driver_version() == 0
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(toolchain, "DRIVER_IN_PROC", tmp_path)
    assert toolchain.driver_version() == 0
    monkeypatch.setattr(toolchain, "DRIVER_IN_PROC", tmp_path / "none")
    assert toolchain.driver_version() is None


# PYFAST_PPO_CUDA_ARCHS


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("", []),
        ("80,90", ["sm_80", "sm_90"]),
        ("8.0;9.0", ["sm_80", "sm_90"]),
        (" 80  90+PTX ", ["sm_80", "sm_90", "compute_90"]),
        ("12.0+ptx, 120", ["sm_120", "compute_120"]),
    ],
)
def test_architecture_lists(value, names):
    assert toolchain.parse_architectures(value) == names


@pytest.mark.parametrize("value", ["hopper", "9", "90a", "80,,x", "8.0.1", "PTX"])
def test_what_is_no_architecture(machine, value):
    machine.setenv("PYFAST_PPO_CUDA_ARCHS", value)
    with pytest.raises(SystemExit, match=r"PYFAST_PPO_CUDA_ARCHS is .*can be a list such as '80,90'"):
        machine.build()


def test_native(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((12, 0), (9, 0), (9, 0)))
    assert toolchain.parse_architectures("native") == ["sm_90", "sm_120"]
    for library in (no_library, lambda name: Driver(), lambda name: Driver((9, 0), status=100)):
        monkeypatch.setattr(ctypes, "CDLL", library)
        with pytest.raises(SystemExit, match=r"PYFAST_PPO_CUDA_ARCHS is native, but .* no GPU"):
            toolchain.parse_architectures("native")


def test_an_older_nvcc_compiles_for_what_it_knows(machine):
    make_toolkit(machine.root / "usual", version="12.0", known=(70, 80, 86, 87, 89, 90))
    assert machine.build().note == "CUDA 12.0, sm_80 sm_86 sm_89 sm_90 compute_90"
    machine.setenv("PYFAST_PPO_CUDA_ARCHS", "90,120")
    with pytest.raises(SystemExit, match=r"asks for sm_120, which nvcc 12.0 .* it knows sm_70 sm_80"):
        machine.build()


def test_the_architectures_reach_the_compiler(machine):
    make_toolkit(machine.root / "usual")
    machine.setenv("PYFAST_PPO_CUDA_ARCHS", "8.0;9.0+PTX")
    machine.build()
    line = (machine.root / "usual/compiled").read_text().splitlines()[0]
    assert [word for word in line.split() if word.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# What is compiled anew


def test_only_what_changed_is_compiled_anew(machine):
    toolkit = make_toolkit(machine.root / "usual").parents[1]
    machine.build()
    assert compiled(toolkit) == ["gae.cu", "loss.cu"]
    machine.build()
    assert compiled(toolkit) == []
    (machine.csrc / "cuda/gae.cu").write_text("another")
    machine.build()
    assert compiled(toolkit) == ["gae.cu"]
    for header in ("cuda/launch.cuh", "tensor.h"):
        (machine.csrc / header).write_text("another")
        machine.build()
        assert compiled(toolkit) == ["gae.cu", "loss.cu"]
    (machine.root / "build/loss.o").unlink()
    machine.build()
    assert compiled(toolkit) == ["loss.cu"]


@pytest.mark.parametrize(
    ("variable", "value"), [("PYFAST_PPO_CUDA_ARCHS", "90"), ("NVCC_APPEND_FLAGS", "-lineinfo"), ("MAX_JOBS", "3")]
)
def test_other_flags_compile_anew_and_other_jobs_do_not(machine, variable, value):
    toolkit = make_toolkit(machine.root / "usual").parents[1]
    machine.build()
    compiled(toolkit)
    machine.setenv(variable, value)
    machine.build()
    assert compiled(toolkit) == ([] if variable == "MAX_JOBS" else ["gae.cu", "loss.cu"])


def test_another_nvcc_compiles_anew(machine):
    toolkit = make_toolkit(machine.root / "usual").parents[1]
    machine.build()
    compiled(toolkit)
    make_toolkit(toolkit, version="13.1")
    machine.build()
    assert compiled(toolkit) == ["gae.cu", "loss.cu"]


def test_what_failed_is_tried_again(machine):
    toolkit = make_toolkit(machine.root / "usual").parents[1]
    machine.build()
    (toolkit / "broken").touch()
    (machine.csrc / "cuda/gae.cu").write_text("another")
    assert not machine.build().objects
    (toolkit / "broken").unlink()
    compiled(toolkit)
    assert machine.build().objects
    assert compiled(toolkit) == ["gae.cu"]


@pytest.mark.parametrize(("jobs", "threads"), [("1", 1), ("2", 1), ("9", 4)])
def test_jobs(machine, jobs, threads):
    make_toolkit(machine.root / "usual")
    machine.setenv("MAX_JOBS", jobs)
    machine.build()
    assert (machine.root / "usual/compiled").read_text().splitlines()[0].endswith(f"--threads {threads}")
