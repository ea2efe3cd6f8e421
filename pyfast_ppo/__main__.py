"""``python -m pyfast_ppo`` is the command ``pyfast-ppo``."""

import sys

from pyfast_ppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
