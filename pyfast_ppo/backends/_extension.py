"""Finds the compiled extension ``pyfast_ppo._C``.

Python puts the working directory first on its path. Who works in a checkout therefore imports the checkout's
``pyfast_ppo``, which has no compiled part, although ``pip install .`` has put one beside the installed package: it is
looked for there, too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from pyfast_ppo._version import __version__
from pyfast_ppo.backends._sources import fingerprint

CSRC = Path(__file__).parents[2] / "csrc"  # of a checkout


@functools.cache
def load() -> tuple[Any, str | None]:
    """(the extension, None) or (None, why there is none)."""
    try:
        module, reason = importlib.import_module("pyfast_ppo._C"), None
    except ModuleNotFoundError:
        module, reason = _load_installed()
    except ImportError as error:
        return None, f"the compiled extension does not load ({error}); run `pip install .` again"
    if module is not None and CSRC.is_dir() and getattr(module, "sources", None) != fingerprint(CSRC):
        return None, "the compiled extension is of other sources than those in csrc; run `pip install .` again"
    return module, reason


def _load_installed() -> tuple[Any, str | None]:
    build = "run `pip install .` in the checkout to build it"
    distributions = list(importlib.metadata.distributions(name="pyfast-ppo"))
    if not distributions:
        return None, f"the compiled extension is not there, because pyfast-ppo is not installed; {build}"
    # a build leaves an egg-info in the checkout, which comes first and has no extension
    found = [
        (d, f)
        for d in distributions
        for f in d.files or ()
        if f.match("pyfast_ppo/_C.*") and f.suffix in (".so", ".pyd")
    ]
    found = [(d, f) for d, f in found if Path(f.locate()).exists()]
    if not found:
        return None, f"the compiled extension is not there; {build}"
    distribution, file = found[0]
    if distribution.version != __version__:
        return None, f"the installed extension is of version {distribution.version}, this is {__version__}; {build}"
    spec = importlib.util.spec_from_file_location("pyfast_ppo._C", file.locate())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyfast_ppo._C"] = module
    spec.loader.exec_module(module)
    return module, None


def plain_bits(inputs: tuple) -> int:
    """See csrc/bindings.h. Without the extension 0: not known."""
    return 0


if load()[0] is not None:
    plain_bits = load()[0].plain_bits
