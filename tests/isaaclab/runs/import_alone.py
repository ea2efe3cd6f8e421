"""What importing ``pyfast_ppo.isaaclab`` loads."""

from __future__ import annotations

import json
import sys

import pyfast_ppo.isaaclab

assert pyfast_ppo.isaaclab.RslRlVecEnvWrapper.__mro__[1].__module__.startswith("isaaclab_rl.")
loaded = [
    name for name in ("newton", "mujoco", "warp", "pxr", "omni", "isaacsim", "isaaclab.sim") if name in sys.modules
]
print("RESULT " + json.dumps(loaded))
