"""Where there is no GPU, the Triton kernels run in Triton's interpreter, through the same tests as every backend.

With PYFAST_PPO_TRITON_ON_PTX=1 they are compiled for a GPU instead, and what became of them runs in tests/ptx.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # before torch is loaded: its threads wait for each other at every operation, and so for whoever has their core
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import numpy as np
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not said


def round_to_bfloat16_in_the_interpreter() -> None:
    """As a GPU does, to nearest; Triton's interpreter cuts the bits off."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, source, to):
        if source.dtype.scalar == float32 and to.scalar == bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), to.scalar)
        return cast(self, source, to)

    InterpreterBuilder.cast_impl = cast_impl


def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter replaces the language's functions anew for each function that a kernel calls: a third of the
    time of its tests, for nothing."""
    from triton import language
    from triton.runtime import interpreter

    patch_language, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[int] = set()  # modules, while a kernel runs

    def patch(function):
        names = function.__globals__.values()
        modules = {id(module) for module in (language, language.core) if any(v is module for v in names)}
        if modules <= patched:
            return None
        patched.update(modules)
        return patch_language(function)

    def restored(scope):
        restore(scope)
        patched.clear()

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch, restored


def run_what_triton_compiles() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.extend(str(Path(__file__).parent / folder) for folder in ("ops/oracles", "ptx"))
    from ptx import load_machine
    from triton_on_ptx import TritonOnPtx

    TritonOnPtx(load_machine())


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    if os.environ.get("PYFAST_PPO_TRITON_ON_PTX") == "1":
        run_what_triton_compiles()
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported for the first time
        round_to_bfloat16_in_the_interpreter()
        patch_the_language_once_a_launch()
