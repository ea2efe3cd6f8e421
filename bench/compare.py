"""What got slower between two results of one machine.

python bench/compare.py bench/results/M/2026-11-23.json bench-m-2026-12-01/results.json

Prints a ratio, new median by old median, for every contender in every case that both have. Something is slower when
its median is by more than the tolerance (10%, or --tolerance) and its spread, 10th to 90th percentile, lies above the
old one's. Exit code: 0, nothing of pyfast_ppo's got slower; 1, something did, and is listed at the end; 2, a wrong
argument.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pyfast_ppo.bench import results
from pyfast_ppo.bench.compare import TOLERANCE, compare, differences
from pyfast_ppo.bench.tables import duration


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--tolerance", type=_share, default=TOLERANCE, metavar="SHARE", help="0.1: ten percent")
    args = parser.parse_args(argv)
    try:
        old, new = results.load(args.old), results.load(args.new)
    except ValueError as error:
        parser.error(str(error))
    for line in differences(old, new):
        print(f"not the same machine: {line}")
    found = compare(old, new)
    if not found.changes:
        parser.error(f"{args.old} and {args.new} have no case in common")
    width = max(len(f"{c.subject}  {c.case}  {c.contender}") for c in found.changes)
    for c in found.changes:
        verdict = c.verdict(args.tolerance)
        text = f"{c.subject}  {c.case}  {c.contender}".ljust(width)
        times = f"{duration(c.old_s):>8} -> {duration(c.new_s):>8}  {c.ratio:5.2f}"
        print(f"{text}  {times}{'' if verdict == 'same' else f'  {verdict}'}")
    for name, entries in (("OLD", found.only_old), ("NEW", found.only_new)):
        for entry in entries:
            print(f"only in {name}: {entry}")
    slower = found.slower(args.tolerance)
    print(f"\n{len(slower)} of pyfast_ppo's entries got slower by more than {args.tolerance:.0%}, spreads apart.")
    for c in slower:
        print(f"  {c.subject}, {c.case}, {c.contender}: {c.ratio:.2f} times the old time")
    return 1 if slower else 0


def _share(text: str) -> float:
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
