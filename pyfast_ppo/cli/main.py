"""The command ``pyfast-ppo``: its sub-commands, and errors as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyfast_ppo import __version__
from pyfast_ppo.cli.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 a wrong argument, 130 stopped by a signal.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except UserError as error:
        print(f"pyfast-ppo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pyfast-ppo: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    # Here, where Ctrl-C is one line; they import nothing heavy before they run
    from pyfast_ppo.cli import bench, doctor, kl_study, train

    parser = argparse.ArgumentParser(prog="pyfast-ppo", description="PPO with a fused loss for rsl_rl.")
    parser.add_argument("--version", action="version", version=f"pyfast-ppo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, bench, kl_study, doctor):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        summary = (module.__doc__ or name).splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
