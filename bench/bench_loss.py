"""The loss and all its gradients: pyfast_ppo against rsl_rl's formula, eager and compiled, and other libraries' losses.

python bench/bench_loss.py
python bench/bench_loss.py --quick    # some of its cases, fewer rounds
python bench/bench_loss.py --save     # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path

from pyfast_ppo.cli.bench import script

if __name__ == "__main__":
    script("loss", __doc__, Path(__file__).parent / "results")
