"""Records of runs as train_once.py writes them, made up."""

from __future__ import annotations

import numpy as np

LOOKS = 100  # at the memory


def record(seed: int, iterations: int = 60, height: float = 100.0, update_ms: float = 20.0) -> dict[str, list]:
    """A curve that rises to about ``height``; noise in it and in the times; memory and tensors as they should be."""
    rng = np.random.default_rng(seed)
    rising = 1.0 - np.exp(-5.0 * (np.arange(iterations) + 1) / iterations)
    return {
        "episodes": rng.integers(1, 9, iterations).tolist(),
        "mean_return": (rising * height + rng.normal(0.0, 3.0)).tolist(),
        "time_outs": [1] * iterations,
        "collect_ms": (30.0 * rng.lognormal(0.0, 0.05, iterations)).tolist(),
        "update_ms": (update_ms * rng.lognormal(0.0, 0.05, iterations)).tolist(),
        "iteration_cpu_ms": (50.0 * rng.lognormal(0.0, 0.05, iterations)).tolist(),
        "learn_cpu_ms": (update_ms * rng.lognormal(0.0, 0.05, iterations)).tolist(),
        "resident_bytes": (400_000_000 + 4096 * rng.integers(0, 100, LOOKS)).tolist(),
        "heap_bytes": (50_000_000 + 16 * rng.integers(0, 100, LOOKS)).tolist(),
        "python_blocks": (500_000 + rng.integers(0, 20, LOOKS)).tolist(),
        "tensors_alive": [90] * LOOKS,
    }


def run(seed: int, arm: str, iterations: int = 60, **of_record: float) -> dict:
    """What a result file holds."""
    return {
        "spec": {"task": "Task", "arm": arm, "seed": seed, "num_envs": 8, "iterations": iterations},
        "steps_per_iteration": 128,
        "config": {"seed": seed, "gamma": 0.99, "algorithm": {"class_name": arm, "lam": 0.95}},
        "made_with": {"torch": "2"},
        "record": record(seed + (100 if arm == "fused" else 0), iterations, **of_record),
    }
