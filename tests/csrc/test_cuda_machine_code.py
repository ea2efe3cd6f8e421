"""The GPU programs inside the built extension: nothing spilled, accesses of 128 bits, code for every architecture."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pyfast_ppo.backends import _extension, cuda

triton = pytest.importorskip("triton")

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NOTE = getattr(_extension.load()[0], "cuda_note", "")  # "CUDA 13.0, sm_80 … compute_120"
ARCHITECTURES = re.findall(r"sm_\d+", NOTE)
MAX_WHEEL_BYTES = 10e6

pytestmark = pytest.mark.skipif(
    _extension.load()[0] is None or not hasattr(_extension.load()[0], "cuda"),
    reason=f"the extension was built without CUDA: {NOTE}",
)


def extension_file() -> Path:
    return Path(_extension.load()[0].__file__)


def dumped(*options: str) -> str:
    return subprocess.run([TOOL, *options, extension_file()], capture_output=True, text=True, check=True).stdout


def readable(mangled: str) -> str:
    """``ppo_loss_kernel float/BFloat16 Std 1 vector`` for a mangled name."""
    name = re.search(r"(\d+)((?:[a-z]+_)*kernel)", mangled)
    arguments = mangled[name.end() :]
    types = re.findall(r"^I(f|d)(f|d|NS_\d+(?:BFloat16|Float16)E)?|(LogProb|Entropy|Kl)E(f|d)", arguments)
    words = [re.sub(r"NS_\d+(\w+)E", r"\1", w) for match in types for w in match if w]
    words = [{"f": "float", "d": "double"}.get(w, w) for w in words]
    words += [f"Std{n}" for n in re.findall(r"3StdE(\d)E", arguments)]
    words += re.findall(r"\d(Elu|Relu|Tanh)E", arguments)
    words += ["vector"] if "Lb1E" in arguments else []
    return " ".join([name[2], *words])


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> registers and memory."""
    found: dict = defaultdict(dict)
    architecture = name = ""
    for line in dumped("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = readable(match[1])
        elif "REG:" in line:
            found[architecture][name] = {
                key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            }
    return found


def test_every_architecture(usage: dict, capsys: pytest.CaptureFixture) -> None:
    """Registers hold everything: no stack frame, no local memory, and so no spill."""
    assert set(usage) == set(ARCHITECTURES)
    shown = "sm_90" if "sm_90" in usage else ARCHITECTURES[0]
    kernels = set(usage[shown])
    assert sum(name.startswith("ppo_loss_kernel") for name in kernels) == 15
    with capsys.disabled():
        print()
        for name, row in sorted(usage[shown].items()):
            print(f"  {shown}  {name:<44}  {row['REG']:>3} registers  {row['SHARED']:>5} bytes shared")
    for architecture, rows in usage.items():
        assert set(rows) == kernels, architecture
        for name, row in rows.items():
            assert row["STACK"] == 0, f"{name} for {architecture}"
            assert row["LOCAL"] == 0, f"{name} for {architecture}"


def test_two_blocks_of_the_loss_fit(usage: dict) -> None:
    """On a multiprocessor with its 65,536 registers: 384 threads each, in steps of 8 registers a thread."""
    for rows in usage.values():
        for name, row in rows.items():
            if name.startswith("ppo_loss_kernel") and "double" not in name:
                assert 2 * 384 * (-(-row["REG"] // 8) * 8) <= 65536, name


@pytest.fixture(scope="module", params=[a for a in ("sm_80", "sm_90", "sm_120") if a in ARCHITECTURES])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def accesses(architecture: str) -> dict[str, Counter]:
    """kernel -> how often each kind of access to global or local memory stands in its program."""
    found: dict = defaultdict(Counter)
    name = ""
    for line in dumped("-sass", "-arch", architecture).splitlines():
        if match := re.search(r"Function : (\w+)", line):
            name = readable(match[1])
        elif "UBLKPF.L2" in line:
            found[name]["prefetch"] += 1
        elif match := re.search(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", line):
            width = next((w for w in ("128", "64") if f".{w}" in match[2]), "32 or less")
            found[name][f"{match[1]} {width}"] += 1
    return found


def test_prefetch(accesses: dict[str, Counter], architecture: str) -> None:
    """Where blocks take several tiles, and the GPU can."""
    for name, count in accesses.items():
        tiles = name.startswith("ppo_loss_kernel") and "vector" in name
        assert count["prefetch"] == (1 if tiles and architecture == "sm_90" else 0), name


def test_wide_accesses(accesses: dict[str, Counter]) -> None:
    """Where rows are aligned: four float32 are one access of 128 bits, four bfloat16 or float16 one of 64."""
    of_the_loss = {name: count for name, count in accesses.items() if name.startswith("ppo_loss_kernel")}
    assert sum("vector" in name for name in of_the_loss) == 9
    for name, count in of_the_loss.items():
        if "vector" not in name:
            continue
        rollout = 2 if "Std0" in name else 3  # actions, old mean, and the old std unless it is one row
        network = 2 if "Std2" in name else 1  # the mean, and the std unless it is one row
        if "Float16" in name:
            assert count["LDG 128"] == rollout, f"{name}: {count}"
            assert min(count["LDG 64"], count["STG 64"]) >= network, f"{name}: {count}"
        else:
            assert count["LDG 128"] == rollout + network, f"{name}: {count}"
            assert count["STG 128"] == network, f"{name}: {count}"
    step = accesses["adam_kernel vector"]
    assert [step[kind] for kind in ("LDG 128", "STG 128")] == [4 + 3, 4]  # the elements; what was decided of a tensor
    assert accesses["adam_norms_kernel vector"]["LDG 128"] == 1
    for function in ("Elu", "Relu", "Tanh"):
        layer, back = (accesses[f"add_bias_and_activate{way}_kernel {function} vector"] for way in ("", "_backward"))
        assert [layer[kind] for kind in ("LDG 128", "STG 128")] == [5, 4]  # four rows, and the bias
        assert [back[kind] for kind in ("LDG 128", "STG 128")] == [8, 4]  # four rows of two matrices
    for name, count in accesses.items():
        assert not any(kind[:3] in ("LDL", "STL") for kind in count), f"{name} uses local memory: {count}"


@pytest.mark.parametrize("virtual", re.findall(r"compute_(\d+)", NOTE))
def test_code_for_gpus_to_come(virtual: str) -> None:
    """PTX, which a driver compiles for a GPU that is newer than this build."""
    listed = dumped("--list-ptx")
    assert re.search(rf"\.sm_{virtual}\.ptx", listed), listed


def test_nothing_of_cuda_is_linked_or_shown() -> None:
    """The runtime is inside, so that it needs no library, and hidden, so that it does not meet torch's."""
    needed = subprocess.run(["readelf", "-d", extension_file()], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", extension_file()], capture_output=True, text=True, check=True
    )
    assert not re.search(r"\bcu(da)?[A-Z]\w+$", symbols.stdout, re.MULTILINE)
    assert "PyInit__C" in symbols.stdout


def test_small_enough_for_a_wheel() -> None:
    assert extension_file().stat().st_size < MAX_WHEEL_BYTES


def test_why_there_is_no_gpu() -> None:
    """Here, or on a machine with one: a reason or none, never an error."""
    reason = cuda._C.cuda.unavailable_reason()
    if not importlib.util.find_spec("torch") or not __import__("torch").cuda.is_available():
        assert reason in ("there is no NVIDIA driver", "there is no GPU")
    else:
        assert reason == ""
