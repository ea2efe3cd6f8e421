"""Generalised advantage estimation with normalisation: pyfast_ppo against rsl_rl's loop over the steps, and others.

python bench/bench_gae.py
python bench/bench_gae.py --save     # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path

from pyfast_ppo.cli.bench import script

if __name__ == "__main__":
    script("gae", __doc__, Path(__file__).parent / "results")
