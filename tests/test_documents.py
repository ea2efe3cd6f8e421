"""What the pages say can be done and found: links, files, flags of commands, arguments, and code that runs."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyfast_ppo.cli import main as command
from pyfast_ppo.rsl_rl import FusedPPO

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
TOP_LEVEL = ("bench/", "csrc/", "docs/", "pyfast_ppo/", "tests/", "triton_kernels/")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def all_of(pattern: re.Pattern | str) -> list:
    found = [(page, match) for page in PAGES for match in re.findall(pattern, prose(page))]
    assert found
    return [pytest.param(page, match, id=f"{page.name}-{match}") for page, match in found]


@pytest.mark.parametrize(("page", "target"), all_of(r"\]\((?!https?:)([^)\s]+)\)"))
def test_links_lead_somewhere(page: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    there = page.parent / file if file else page
    assert there.exists()
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize(("page", "code"), all_of(CODE))
def test_files_that_are_named_are_there(page: Path, code: str) -> None:
    if code.startswith(TOP_LEVEL) and not re.search(r"[\s<*|{…]", code):
        pattern = f"{code.rstrip('/')}*" if "." not in Path(code).name else code
        assert list(ROOT.glob(pattern)), code


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text()
        in_fences = [line for language, body in FENCE.findall(text) if language == "bash" for line in body.splitlines()]
        in_prose = [code for code in CODE.findall(prose(page))]
        found += [
            (page.name, line[line.index("pyfast-ppo") :].partition("#")[0].strip())
            for line in in_fences + in_prose
            if re.search(r"(^|&& )pyfast-ppo ", line)
        ]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_have_the_flags_that_are_named(page: str, line: str) -> None:
    words = shlex.split(line.replace("…", "name"))[1:]
    flags = [word for word in words if word.startswith("-")]
    if words[0] == "--version":
        return
    subcommands = next(a for a in command._parser()._actions if a.choices)
    known = subcommands.choices[words[0]]._option_string_actions
    assert set(flags) <= set(known)


def test_arguments_of_the_readme_are_those_of_the_algorithm() -> None:
    text = prose(ROOT / "README.md")
    table = text[text.index("| argument | what it does |") :].split("\n\n")[0]
    named = set(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)) - {"argument"}
    named = {name.strip("` ") for cell in named for name in cell.split(",") if "---" not in name}
    known = set(inspect.signature(FusedPPO.__init__).parameters)
    assert named <= known
    others = set(re.findall(r"`(\w+)=", text)) & known
    own = known - set(inspect.signature(FusedPPO.__mro__[1].__init__).parameters) - {"self", "args", "kwargs"}
    assert own <= named | others, "each argument of FusedPPO is in the README"


def python_blocks(page: Path) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language == "python"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_can_be_pasted(page: Path) -> None:
    for body in python_blocks(page):
        compile(body, page.name, "exec")


@pytest.mark.parametrize(("name", "printed"), [("ppo_loss", 2), ("GymnasiumVecEnv", 1)])
def test_the_code_of_the_readme_runs(name: str, printed: int, tmp_path: Path) -> None:
    complete = [body for body in python_blocks(ROOT / "README.md") if body.startswith("import torch") and name in body]
    assert len(complete) == 1
    run = subprocess.run([sys.executable, "-c", complete[0]], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"tensor\(", run.stdout)) == printed
