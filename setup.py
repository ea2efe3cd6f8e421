"""Builds the extension ``pyfast_ppo._C``; everything else about the package is in pyproject.toml.

The sources are plain C++17: no torch, and no machine-specific flags. The fast instruction sets are compiled in and
chosen when the program runs (csrc/cpu/isa.h).
"""

import re
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("pyfast_ppo/_version.py").read_text(), re.MULTILINE).group(1)

# -fno-trapping-math and -fno-math-errno let comparisons and square roots become SIMD code; neither changes a result.
# -ffast-math would: NaN and infinity have to show, and sums have one order.
COMPILE_ARGS = (
    [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
)

extension = Pybind11Extension(
    "pyfast_ppo._C",
    sources=["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
    depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inl")),
    define_macros=[("PYFAST_PPO_VERSION", f'"{VERSION}"')],
    extra_compile_args=COMPILE_ARGS,
    extra_link_args=["-pthread", "-ldl"] if sys.platform.startswith("linux") else [],
    cxx_std=17,
)

ParallelCompile("NPY_NUM_BUILD_JOBS").install()
setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
