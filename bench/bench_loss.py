"""The loss and all its gradients: pyfast_ppo against rsl_rl's formula, eager and compiled, and other libraries' losses.

python bench/bench_loss.py            # the table of the README
python bench/bench_loss.py --quick    # some of its lines, fewer rounds
python bench/bench_loss.py --save     # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path
from statistics import median

from pyfast_ppo.bench import results
from pyfast_ppo.bench.loss import BASELINE, COMPILED, OURS
from pyfast_ppo.cli.bench import script

LEAST = {BASELINE: 20.0, COMPILED: 2.5}  # times faster, that are expected of the C++ kernels for the case below
CASE = {"N": 24_576, "A": 12, "old_std": "[N, A]", "input sets": 1}


def main() -> int:
    document = script("loss", __doc__, Path(__file__).parent / "results")
    for row in document["subjects"]["loss"]["rows"]:
        if row["case"] == CASE and document["machine"]["device"] == "cpu":
            for other, least in LEAST.items():
                if other in row["contenders"] and (found := median(results.ratios(row, OURS, other))) < least:
                    print(f"below the bar: {found:.1f} times faster than {other}, expected {least}, at {row['case']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
