"""What the time of an iteration is spent on: operation by operation, rsl_rl beside FusedPPO, each line with its floor.

python bench/bench_profile.py
python bench/bench_profile.py --sizes anymal_rough g1_rough    # some of Isaac Lab's sizes
python bench/bench_profile.py --save                           # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path

from pyfast_ppo.cli.bench import script

if __name__ == "__main__":
    script("profile", __doc__, Path(__file__).parent / "results")
