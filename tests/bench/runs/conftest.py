"""What is in bench/runs imports itself as the programs beside it do; so do these tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[2] / "bench"), str(HERE)]
