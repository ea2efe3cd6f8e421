"""Draws the figures of the README and of docs/, and fills in their tables, from bench/results.

python bench/plot.py

One machine is a folder of bench/results; pictures, docs/bench-<picture>-<machine>.png, and tables show each subject's
newest rows there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pyfast_ppo.bench import figures, markdown, results

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", HERE.parent / "docs" / "performance.md"]
DATED = "????-??-??*.json"


def newest(folder: Path) -> dict | None:
    """One document with the newest rows of each subject; None: the folder has none."""
    # the second file of a day comes after the first, and the tenth after the second
    in_order = sorted(folder.glob(DATED), key=lambda path: [int(part) for part in path.stem.split("-")])
    documents = [results.load(path) for path in in_order]
    if not documents:
        return None
    subjects = {
        name: {"machine": document["machine"], **entry}
        for document in documents
        for name, entry in document["subjects"].items()
    }
    return {**documents[-1], "subjects": subjects}


def documents(folder: Path) -> dict[str, dict]:
    """Of each machine, by its name; with what learning.py and soak.py found there, under their names."""
    found = {path.name: newest(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    kept = {name: document for name, document in found.items() if document is not None}
    for name, document in kept.items():
        for subject in ("learning", "soak"):
            path = folder / name / f"{subject}.json"
            if path.exists():
                document[subject] = json.loads(path.read_bytes())
    return kept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", metavar="DIR")
    parser.add_argument("--pages", type=Path, nargs="*", default=PAGES, metavar="FILE", help="with tables")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results {args.results} is not a directory")
    if not args.out.is_dir():
        parser.error(f"--out {args.out} is not a directory")
    try:
        found = documents(args.results)
        pages = {path: markdown.filled(path.read_text(), found) for path in args.pages}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for machine, document in found.items():
        for name, image in figures.draw(document).items():
            path = args.out / f"bench-{name}-{machine}.png"
            path.write_bytes(image)
            print(path)
    for path, text in pages.items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
