"""The loss and its gradients of one mini-batch as what they are made of: each operation with its time, in order.

python bench/bench_timeline.py
python bench/bench_timeline.py --save     # also writes bench/results/<machine>/<date>.json
"""

from pathlib import Path

from pyfast_ppo.cli.bench import script

if __name__ == "__main__":
    script("timeline", __doc__, Path(__file__).parent / "results")
