"""Builds the extension ``pyfast_ppo._C``; everything else about the package is in pyproject.toml.

The sources are plain C++17: no torch, and no machine-specific flags. The fast instruction sets are compiled in and
chosen when the program runs (csrc/cpu/isa.h). The CUDA part is compiled in where there is a compiler for it
(csrc/cuda/toolchain.py).
"""

import json
import re
import runpy
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc/cuda"))  # a build frontend leaves the project off it
import toolchain

VERSION = re.search(r'^__version__ = "(.+)"$', Path("pyfast_ppo/_version.py").read_text(), re.MULTILINE).group(1)

SOURCES = runpy.run_path("pyfast_ppo/backends/_sources.py")["fingerprint"](Path("csrc"))

# -fno-trapping-math and -fno-math-errno let comparisons and square roots become SIMD code; neither changes a result.
# -ffast-math would: NaN and infinity have to show, and sums have one order.
COMPILE_ARGS = (
    [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
)

extension = Pybind11Extension(
    "pyfast_ppo._C",
    sources=["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
    depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl")),
    include_dirs=["csrc"],
    define_macros=[("PYFAST_PPO_VERSION", f'"{VERSION}"'), ("PYFAST_PPO_SOURCES", f'"{SOURCES}"')],
    extra_compile_args=COMPILE_ARGS,
    extra_link_args=["-pthread", "-ldl"] if sys.platform.startswith("linux") else [],
    cxx_std=17,
)


class BuildWithCuda(build_ext):
    """Compiles the CUDA part first; the extension links it, or says why it has none."""

    def build_extensions(self) -> None:
        cuda = toolchain.build(Path("csrc"), Path(self.build_temp) / "cuda")
        extension.define_macros.append(("PYFAST_PPO_CUDA_NOTE", json.dumps(cuda.note)))
        extension.depends += [str(cuda.note_file), *cuda.objects]
        if cuda.objects:
            extension.define_macros.append(("PYFAST_PPO_WITH_CUDA", "1"))
            extension.sources += sorted(str(path) for path in Path("csrc/cuda").glob("*.cpp"))
            extension.include_dirs += cuda.include_dirs
            extension.extra_objects += cuda.objects
            # The CUDA runtime is inside, and stays there: torch has one of its own in the same process.
            extension.extra_link_args += ["-Wl,--exclude-libs,ALL", "-lrt"]
        super().build_extensions()


ParallelCompile("NPY_NUM_BUILD_JOBS").install()
setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithCuda})
