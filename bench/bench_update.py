"""An iteration of PPO around the loss: act, compute_returns and update(), FusedPPO against rsl_rl and plain PyTorch.

python bench/bench_update.py
python bench/bench_update.py --sizes anymal_rough g1_rough    # some of Isaac Lab's sizes
python bench/bench_update.py --save                           # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path

from pyfast_ppo.cli.bench import script

if __name__ == "__main__":
    script("update", __doc__, Path(__file__).parent / "results")
