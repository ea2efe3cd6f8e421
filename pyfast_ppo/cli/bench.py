"""Measure loss, returns, update and iteration on this machine, against rsl_rl, torch.compile and other libraries."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pyfast_ppo.bench.sizes import SIZES
from pyfast_ppo.cli.arguments import positive_float
from pyfast_ppo.cli.console import Console, clock
from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.cli.files import make_directory
from pyfast_ppo.files import write_atomically

if TYPE_CHECKING:
    from pyfast_ppo.bench.harness import Options

SUBJECTS = ("loss", "timeline", "gae", "kl", "update", "profile")
_OF_ITERATIONS = ("update", "profile")  # they need rsl_rl, and have sizes
QUICK_SUBJECTS = ("loss", "gae", "update")
RESULTS = "results.json"
_SECONDS, _QUICK_SECONDS = 8.0, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute on two cores")
    parser.add_argument(
        "--subjects",
        nargs="+",
        choices=SUBJECTS,
        metavar="NAME",
        help=f"some of: {', '.join(SUBJECTS)} (all; with --quick {', '.join(QUICK_SUBJECTS)})",
    )
    parser.add_argument("--out", metavar="DIR", help="where the files go (bench-<machine>-<date>)")
    add_measuring_arguments(parser, with_sizes=True)


def add_measuring_arguments(parser: argparse.ArgumentParser, with_sizes: bool) -> None:
    """Flags that the scripts in bench/ have, too."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to measure (cuda, if there is a GPU)")
    parser.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help=f"for the rounds of one case, about ({_SECONDS:g}; with --quick {_QUICK_SECONDS:g})",
    )
    if with_sizes:
        parser.add_argument(
            "--sizes",
            nargs="+",
            choices=SIZES,
            metavar="SIZE",
            help=f"tasks whose iterations are measured, some of: {', '.join(SIZES)} (on a GPU all; on the CPU the first"
            " two, the others take minutes there; with --quick the first)",
        )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns 0; 1 if a case failed; 130 when it was stopped, with all before it written.

    Raises:
        UserError: An argument is wrong, or something is missing.
    """
    subjects = args.subjects or (QUICK_SUBJECTS if args.quick else SUBJECTS)
    if args.sizes and not set(_OF_ITERATIONS) & set(subjects):
        raise UserError("--sizes is about update and profile; add one to --subjects, or leave --sizes out.")
    options = _options(args)
    subjects = _with_what_it_takes(subjects, asked_for=args.subjects is not None)
    from pyfast_ppo.bench import results

    document = results.new_document(options.device)
    out = _make_directory(args.out, document)
    console = Console()
    _say_machine(console, document["machine"])

    def save() -> None:
        write_atomically(out / RESULTS, results.dumps(document))

    code = _measure_all(console, document, subjects, options, args.sizes, save)
    if not document["subjects"]:
        console.say("Nothing was measured.")
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is empty
        return code
    _say_tables(console, document)
    console.say(f"How it was measured:\n{document['method']}\n")
    written = [RESULTS, *_draw(console, document, out)]
    console.say(f"Written to {out}: {', '.join(written)}")
    return code


def script(subject: str, description: str, folder: Path) -> dict:
    """Run one of the scripts in bench/: one subject, printed, and with ``--save`` kept in ``folder``.

    Returns:
        The document, for what a script has to say about it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="MACHINE",
        help=f"also write {folder.name}/MACHINE/<date>.json, beside other subjects of that day (MACHINE: the hardware)",
    )
    add_measuring_arguments(parser, with_sizes=subject in _OF_ITERATIONS)
    args = parser.parse_args()
    try:
        options = _options(args)
    except UserError as error:
        parser.error(str(error))
    from pyfast_ppo.bench import results

    document = results.new_document(options.device)
    console = Console()
    _say_machine(console, document["machine"])

    def save() -> None:
        if args.save is not None:
            results.keep(document, folder, args.save)

    code = _measure_all(console, document, (subject,), options, getattr(args, "sizes", None), save)
    _say_tables(console, document)
    if args.save is not None and document["subjects"]:
        console.say(f"written: {results.keep(document, folder, args.save)}")
    if code:
        raise SystemExit(code)
    return document


def _options(args: argparse.Namespace) -> Options:
    import torch

    from pyfast_ppo.bench.harness import Options

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise UserError(
            "--device cuda cannot be used: torch sees no GPU here; see pyfast-ppo doctor, or use --device cpu."
        )
    device = args.device or ("cuda" if there else "cpu")
    return Options(device, args.quick, args.seconds or (_QUICK_SECONDS if args.quick else _SECONDS))


def _with_what_it_takes(subjects: Iterable[str], asked_for: bool) -> list[str]:
    """The subjects that can run: an iteration is one of rsl_rl."""
    subjects = list(dict.fromkeys(subjects))
    if importlib.util.find_spec("rsl_rl") is not None:
        return subjects
    left_out = [name for name in subjects if name in _OF_ITERATIONS]
    if left_out and asked_for:
        raise UserError(
            f"{', '.join(left_out)}: rsl_rl is not installed; install with: pip install rsl-rl-lib, or leave it out of"
            " --subjects."
        )
    if left_out:
        print(f"Without {', '.join(left_out)}: rsl_rl is not installed; install with: pip install rsl-rl-lib")
    return [name for name in subjects if name not in left_out]


def _make_directory(given: str | None, document: dict) -> Path:
    from pyfast_ppo.bench.machine import short_name

    name = f"bench-{short_name(document['machine'])}-{document['date']}"
    path, number = Path(given or name), 1
    while given is None and path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    if (path / RESULTS).exists():
        raise UserError(f"{path} already holds a result; choose another --out.")
    make_directory(path, "--out")
    return path


def _measure_all(
    console: Console,
    document: dict,
    subjects: Sequence[str],
    options: Options,
    sizes: list[str] | None,
    save: Callable[[], None],
) -> int:
    """Adds rows to the document, case by case. Returns the exit code: 1 if a case failed, 130 after Ctrl-C."""
    from pyfast_ppo.bench import results, tables
    from pyfast_ppo.bench.harness import first_line

    start, failed = time.perf_counter(), 0
    modules = {name: module for name in subjects if (module := _module(console, name)) is not None}
    work = [(name, module, case) for name, module in modules.items() for case in _cases(name, module, options, sizes)]
    try:
        for number, (name, module, case) in enumerate(work, 1):
            at = clock(time.perf_counter() - start)
            console.say(f"[{number}/{len(work)} {at}] {name}: {case} ... ", end="")
            try:
                rows = module.measure(case, options)
            except Exception as error:  # out of memory, say: the other cases can still be measured
                console.say(f"left out: {first_line(error)}")
                failed += 1
                continue
            results.add(document, name, rows, options.seconds)
            save()
            console.say(tables.summary(rows[-1]))
    except KeyboardInterrupt:
        console.say(f"stopped; {'what was measured until here' if document['subjects'] else 'nothing'} is there")
        return 130
    finally:
        console.say()
    return 1 if failed or len(modules) < len(subjects) else 0


def _module(console: Console, subject: str) -> ModuleType | None:
    """Of a subject; None, with the reason said, if it cannot be loaded: rsl_rl may be too old, or broken."""
    try:
        return importlib.import_module(f"pyfast_ppo.bench.{subject}")
    except ImportError as error:
        console.say(f"Without {subject}: {error}")
        return None


def _cases(name: str, module, options: Options, sizes: list[str] | None) -> list:
    if name in _OF_ITERATIONS and sizes:
        return sizes
    return module.cases(options.device, options.quick)


def _say_machine(console: Console, about: dict) -> None:
    from pyfast_ppo.bench.machine import LIBRARIES

    rows = {key: value for key, value in about.items() if isinstance(value, str | int)}
    rows |= {f"backend {name}": detail for name, detail in about["backends"].items()}
    rows["libraries"] = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    missing = [name for name in LIBRARIES if name not in about["libraries"]]
    if missing:
        rows["not installed"] = ", ".join(missing)
    width = max(map(len, rows))
    for name, text in rows.items():
        console.say(f"{name:<{width}}  {text}")
    console.say()


def _say_tables(console: Console, document: dict) -> None:
    from pyfast_ppo.bench import tables

    for name, entry in document["subjects"].items():
        console.say(f"--- {name} " + "-" * 80)
        for line in tables.blocks(entry["rows"]):
            console.say(line)


def _draw(console: Console, document: dict, out: Path) -> list[str]:
    """Writes the pictures. Returns their names."""
    if not console.can_draw():
        return []
    from pyfast_ppo.bench import figures

    images = {f"{name}.png": image for name, image in figures.draw(document).items()}
    for name, image in images.items():
        write_atomically(out / name, image)
    return list(images)
