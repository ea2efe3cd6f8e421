"""The command itself: help, version, wrong use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyfast_ppo
from pyfast_ppo.cli.main import main


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["doctor", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert ("--resume" in out) == (argv[0] == "train")
    assert ("doctor" in out) == (argv[0] != "train")


def test_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "pyfast_ppo", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"pyfast-ppo {pyfast_ppo.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["fly"], ["train", "--no-such-flag"]])
def test_wrong_use_is_explained(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: pyfast-ppo" in capsys.readouterr().err


WITHOUT = """
import sys

class Nothing:  # of what takes long to import
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "rsl_rl", "gymnasium", "matplotlib"):
            raise {error}

sys.meta_path.insert(0, Nothing())
from pyfast_ppo.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run_without(error: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT.format(error=error), *argv], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("argv", "code"), [(["--version"], 0), (["--help"], 0), (["kl-study", "--help"], 0), (["trian"], 2)]
)
def test_nothing_heavy_is_imported_for_a_word_of_help(argv, code):
    run = run_without("AssertionError(name)", *argv)
    assert run.returncode == code and "AssertionError" not in run.stderr


@pytest.mark.parametrize("argv", [["train"], ["doctor"], ["bench", "--quick"], ["kl-study"]])
def test_ctrl_c_while_libraries_are_imported(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_without("KeyboardInterrupt", *argv)
    assert (run.returncode, run.stderr) == (130, "pyfast-ppo: stopped.\n")


# --- names of the package --------------------------------------------------------------------------------------------

NAMES = """
import sys
import pyfast_ppo

assert "torch" not in sys.modules
assert set(pyfast_ppo.__all__) <= set(dir(pyfast_ppo))
assert "torch" not in sys.modules
assert not hasattr(pyfast_ppo, "no_such_name")
assert pyfast_ppo.kl.__name__ == "pyfast_ppo.kl" and pyfast_ppo.schedules.__name__ == "pyfast_ppo.schedules"

import torch

x, row, vector = torch.ones(3, 2), torch.ones(2, requires_grad=True), torch.ones(3)
tensors = (x, row, vector, x, vector, x, row.detach(), vector, vector, vector)
torch.compile(lambda: pyfast_ppo.ppo_loss(*tensors).loss, fullgraph=True, backend="aot_eager")().backward()
assert torch.ops.pyfast_ppo.ppo_loss is not None
for name in pyfast_ppo.__all__:
    exec(f"from pyfast_ppo import {name}")
    assert globals()[name] is getattr(pyfast_ppo, name)
import pickle
assert pickle.loads(pickle.dumps(pyfast_ppo.gae)) is pyfast_ppo.gae
from pyfast_ppo import no_such_name
"""


def test_names_of_the_package_are_found_when_they_are_asked_for(tmp_path):
    run = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, cwd=tmp_path)
    assert run.stderr.splitlines()[-1].startswith("ImportError: cannot import name 'no_such_name' from 'pyfast_ppo'")


def test_each_name_of_the_package_can_be_found():
    assert set(pyfast_ppo.__all__) == {"kl", "schedules", *pyfast_ppo._MODULE_OF, "__version__", "check_env"}
    assert all(getattr(pyfast_ppo, name) is not None for name in (*pyfast_ppo.__all__, *pyfast_ppo._MODULES))
