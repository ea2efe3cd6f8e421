"""A loss in the KL from samples, forward and backward: kl.gaussian_loss against the same formula in PyTorch.

python bench/bench_kl.py
python bench/bench_kl.py --save     # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path

from pyfast_ppo.cli.bench import script

if __name__ == "__main__":
    script("kl", __doc__, Path(__file__).parent / "results")
