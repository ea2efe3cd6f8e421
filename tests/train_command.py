"""Run in a simulator's virtual environment: ``pyfast-ppo train --task TASK`` for two iterations, and what it leaves."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import tempfile
from pathlib import Path

from pyfast_ppo.cli.main import main

task = sys.argv[1]
with tempfile.TemporaryDirectory() as folder:
    run = Path(folder, "run")
    flags = ["--num-envs", "16", "--iterations", "2", "--device", "cpu", "--log-dir", str(run)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        codes = [main(["train", "--task", task, *flags])]
    with open(run / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    result = {
        "codes": codes,
        "files": sorted(path.name for path in run.iterdir()),
        "kl": [float(row["kl"]) for row in rows],
        "algorithm": json.loads((run / "config.json").read_text())["train_config"]["algorithm"]["class_name"],
        "says": task in output.getvalue(),
    }
print("RESULT " + json.dumps(result))
