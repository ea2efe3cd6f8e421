"""Versions as they come: releases, candidates, builds from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast_ppo.versions import RSL_RL, fault_of_rsl_rl, installed, release


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("5.5.1", (5, 5)), ("5.5rc1", (5, 5)), ("5.10.dev3", (5, 10)), ("3.6.0+git1234", (3, 6)), ("6", (6, 0))],
)
def test_major_and_minor_number(version: str, numbers: tuple[int, int]) -> None:
    assert release(version) == numbers


def test_what_is_no_version() -> None:
    with pytest.raises(ValueError, match="'main' is no version"):
        release("main")


@pytest.mark.parametrize("version", ["5.4.0", "5.4.2", "5.5.1"])
def test_versions_of_rsl_rl_that_do(version: str) -> None:
    assert fault_of_rsl_rl(version) is None


@pytest.mark.parametrize(("version", "found"), [("3.0.1", "3.0.1"), ("5.3.0", "5.3.0"), ("6.0", "6.0"), (None, "none")])
def test_versions_of_rsl_rl_that_do_not(version: str | None, found: str) -> None:
    told = f"FusedPPO needs rsl-rl-lib 5.4 or 5.5, found {found}; pip install 'rsl-rl-lib>=5.4,<6'"
    assert fault_of_rsl_rl(version) == told


def test_the_requirement_is_that_of_the_package() -> None:
    assert f'"{RSL_RL}"' in Path(__file__).parent.parent.joinpath("pyproject.toml").read_text()


def test_what_is_not_installed() -> None:
    assert installed("no-such-package-of-anybodys") is None


@pytest.mark.parametrize(
    ("module", "code"), [("-c", "import pyfast_ppo.rsl_rl"), ("-m", "pyfast_ppo")], ids=["import", "doctor"]
)
def test_another_rsl_rl_is_told_in_a_sentence(module: str, code: str, tmp_path: Path) -> None:
    metadata = tmp_path / "rsl_rl_lib-3.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: rsl-rl-lib\nVersion: 3.0.1\n")
    command = [sys.executable, module, code, *(["doctor"] if module == "-m" else [])]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    told = "FusedPPO needs rsl-rl-lib 5.4 or 5.5, found 3.0.1; pip install 'rsl-rl-lib>=5.4,<6'"
    if module == "-c":
        assert done.stderr.splitlines()[-1] == f"ImportError: {told}"
    else:
        assert done.returncode == 0
        assert told in done.stdout
