"""One training run on one thread, in a process of its own; learning.py and soak.py start it. Writes one JSON file.

python bench/train_once.py SPEC.json RESULT.json CORE     # CORE: -1 for any
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from runs.training import Spec, train

from pyfast_ppo.files import write_atomically


def main(spec_path: str, result_path: str, core: str) -> None:
    if int(core) >= 0:
        os.sched_setaffinity(0, {int(core)})
    torch.set_num_threads(1)
    result = train(Spec(**json.loads(Path(spec_path).read_text())))
    write_atomically(Path(result_path), json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
