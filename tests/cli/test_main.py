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
