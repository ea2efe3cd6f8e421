"""One training run, taken down iteration by iteration."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from torch import Tensor

import pyfast_ppo
from pyfast_ppo import backends
from pyfast_ppo.bench.machine import commit
from pyfast_ppo.cli.task import make_task
from pyfast_ppo.cli.train_config import ALGORITHMS, Settings
from pyfast_ppo.versions import installed
from runs.swing_up import CartPoleSwingUp

SWING_UP = "CartPoleSwingUp"
_VERSIONS_OF = ("torch", "rsl-rl-lib", "numpy", "gymnasium", "mujoco", "isaaclab", "newton", "warp-lang")


@dataclass(frozen=True)
class Spec:
    """What is run. Two runs of the same task that differ in nothing but ``arm`` and ``seed`` can be compared."""

    task: str  # a Gymnasium id, Isaac-..., or SWING_UP
    arm: str  # "stock" or "fused", as of pyfast-ppo train
    seed: int
    num_envs: int
    iterations: int
    memory_every: int = 0  # iterations from one look at the memory to the next; 0: never


class RunRecord:
    """Stands where rsl_rl's logger stands and takes down each iteration; no files.

    Its arrays have their size from the beginning, so that it does not show in the memory that it measures.
    """

    writer = None

    def __init__(self, spec: Spec) -> None:
        n = spec.iterations
        self.episodes = np.zeros(n, dtype=np.int64)  # that ended within the iteration
        self.returns = np.zeros(n)  # their sum
        self.time_outs = np.zeros(n, dtype=np.int64)
        self.collect = np.zeros(n)  # s: acting, stepping the environments, computing returns
        self.update = np.zeros(n)  # s
        # s of the processor, which other programs do not add to
        self.iteration_cpu = np.zeros(n)
        self.learn_cpu = np.zeros(n)  # computing returns, and update()
        self.memory_every = spec.memory_every
        looks = n // self.memory_every if self.memory_every else 0
        self.memory = {name: np.zeros(looks, dtype=np.int64) for name in _MEMORY}
        self._done = 0
        self._return = torch.zeros(spec.num_envs)  # [E], of the running episodes
        self._began = self._collected = time.process_time()

    def init_logging_writer(self) -> None:
        """Nothing to be opened; the first iteration begins."""
        self._began = time.process_time()

    def process_env_step(self, rewards: Tensor, dones: Tensor, extras: dict, intrinsic: Tensor | None = None) -> None:
        """One step of all environments."""
        self._return += rewards
        ended = dones > 0
        self.episodes[self._done] += int(ended.sum())
        self.returns[self._done] += float(self._return[ended].sum())
        self.time_outs[self._done] += int(extras["time_outs"].sum())
        self._return.masked_fill_(ended, 0.0)
        self._collected = time.process_time()

    def log(self, *, it: int, collect_time: float, learn_time: float, **_: object) -> None:
        """The end of an iteration; the arguments are those of rsl_rl's ``Logger.log``."""
        now = time.process_time()
        self.iteration_cpu[it], self.learn_cpu[it] = now - self._began, now - self._collected
        self.collect[it], self.update[it] = collect_time, learn_time
        self._done = it + 1
        if self.memory_every and self._done % self.memory_every == 0:
            for name, look in _MEMORY.items():
                self.memory[name][it // self.memory_every] = look()
        self._began = time.process_time()

    def as_json(self) -> dict:
        """Lists with an entry per iteration, or per look at the memory; a mean return is null where none ended."""
        mean = [float(f"{r / n:.6g}") if n else None for r, n in zip(self.returns, self.episodes, strict=True)]
        seconds = {"collect": self.collect, "update": self.update}
        seconds |= {"iteration_cpu": self.iteration_cpu, "learn_cpu": self.learn_cpu}
        return {
            "episodes": self.episodes.tolist(),
            "mean_return": mean,
            "time_outs": self.time_outs.tolist(),
            **{f"{name}_ms": np.round(1e3 * values, 3).tolist() for name, values in seconds.items()},
            **{name: values.tolist() for name, values in self.memory.items()},
        }


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _heap_bytes() -> int:
    """What malloc has given out, torch's tensors among it, without what it keeps for later."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def _tensors_alive() -> int:
    """Tensors that Python knows of. Without a collection before, which would change the run that is looked at."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


_MEMORY: dict[str, Callable[[], int]] = {  # Linux with glibc 2.33 or newer
    "resident_bytes": _resident_bytes,
    "heap_bytes": _heap_bytes,
    "python_blocks": sys.getallocatedblocks,
    "tensors_alive": _tensors_alive,
}


def swing_up_config(spec: Spec) -> dict:
    """A runner config in the manner of Isaac Lab's cartpole."""
    network = {"class_name": "MLPModel", "hidden_dims": [32, 32], "activation": "elu"}
    return {
        "num_steps_per_env": 16,
        "save_interval": spec.iterations,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**network, "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 1.0}},
        "critic": network,
        "algorithm": {
            "class_name": ALGORITHMS[spec.arm],
            "num_learning_epochs": 3,
            "num_mini_batches": 2,
            "learning_rate": 1e-3,
            "schedule": "adaptive",
            "desired_kl": 0.01,
            "gamma": 0.99,
            "lam": 0.95,
            "entropy_coef": 0.005,
            "rnd_cfg": None,
        },
    }


@contextlib.contextmanager
def made_task(spec: Spec) -> Iterator[tuple[VecEnv, dict, bool]]:
    """The environments, the runner's config, and whether episodes begin at random lengths."""
    if spec.task == SWING_UP:
        yield CartPoleSwingUp(spec.num_envs), swing_up_config(spec), True
        return
    settings = Settings(
        env=spec.task,
        simulated=spec.task.startswith("Isaac-"),
        algorithm=spec.arm,
        num_envs=spec.num_envs,
        seed=spec.seed,
    )
    with contextlib.closing(make_task(settings)) as task:
        yield task.env, task.config, task.random_first_lengths


def train(spec: Spec) -> dict:
    """Run it; returns what the result file holds."""
    random.seed(spec.seed)
    np.random.seed(spec.seed)
    torch.manual_seed(spec.seed)
    with made_task(spec) as (env, config, random_first_lengths):
        with contextlib.redirect_stdout(io.StringIO()):
            runner = OnPolicyRunner(env, copy.deepcopy(config), None, "cpu")
        record = runner.logger = RunRecord(spec)
        runner.learn(spec.iterations, init_at_random_ep_len=random_first_lengths)
    return {
        "spec": asdict(spec),
        "steps_per_iteration": spec.num_envs * config["num_steps_per_env"],
        "config": json.loads(json.dumps(config, default=str)),
        "made_with": made_with(),
        "record": record.as_json(),
    }


def made_with() -> dict[str, str]:
    """Versions and commit of what ran."""
    return {
        "python": platform.python_version(),
        "pyfast_ppo": pyfast_ppo.__version__,
        "commit": commit() or "unknown",
        "backend": backends.select(None, torch.device("cpu")).name,
        **{name: found for name in _VERSIONS_OF if (found := installed(name)) is not None},
    }
