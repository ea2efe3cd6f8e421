"""Draws the figures of the README, docs/bench-<picture>-<machine>.png, from bench/results.

python bench/plot.py

One machine is a folder of bench/results; the pictures show each subject's newest rows there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pyfast_ppo.bench import figures, results

HERE = Path(__file__).parent
DATED = "????-??-??*.json"


def newest(folder: Path) -> dict | None:
    """One document with the newest rows of each subject; None: the folder has none."""
    documents = [results.load(path) for path in sorted(folder.glob(DATED))]
    if not documents:
        return None
    subjects = {name: entry for document in documents for name, entry in document["subjects"].items()}
    return {**documents[-1], "subjects": subjects}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", metavar="DIR")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results {args.results} is not a directory")
    if not args.out.is_dir():
        parser.error(f"--out {args.out} is not a directory")
    for folder in sorted(path for path in args.results.iterdir() if path.is_dir()):
        try:
            document = newest(folder)
        except ValueError as error:
            parser.error(str(error))
        for name, image in (figures.draw(document) if document else {}).items():
            path = args.out / f"bench-{name}-{folder.name}.png"
            path.write_bytes(image)
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
