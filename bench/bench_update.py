"""An iteration of PPO around the loss: act, compute_returns and update(), FusedPPO against rsl_rl.

python bench/bench_update.py                      # the CPU
python bench/bench_update.py --device cuda        # with the update as a CUDA graph, too
python bench/bench_update.py --sizes cartpole     # one of the sizes below
python bench/bench_update.py --save NAME          # also writes bench/results/NAME/update.json

The environment is synthetic: its steps cost next to nothing, and every contender gets the same observations and
rewards. The sizes are those of Isaac Lab's tasks. Contenders take turns, in an order that is reversed every other
round; medians over rounds, and ratios within rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from dataclasses import dataclass
from statistics import median

import torch
from harness import RESULTS, machine, print_table, write_results
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"


@dataclass(frozen=True)
class Size:
    num_envs: int
    num_steps: int
    num_obs: int
    num_actions: int
    hidden_dims: tuple[int, ...]


SIZES = {
    "cartpole": Size(4096, 16, 4, 1, (32, 32)),
    "anymal_flat": Size(4096, 24, 48, 12, (128, 128, 128)),
    "anymal_rough": Size(4096, 24, 235, 12, (512, 256, 128)),
    "g1_rough": Size(4096, 24, 310, 37, (512, 256, 128)),
}


class SyntheticEnv(VecEnv):
    """Random observations and rewards; episodes end at random."""

    max_episode_length = 1000
    cfg: dict = {}  # noqa: RUF012, rsl_rl asks for it

    def __init__(self, size: Size, device: str) -> None:
        self.num_envs, self.num_actions, self.device = size.num_envs, size.num_actions, device
        self.episode_length_buf = torch.zeros(size.num_envs, dtype=torch.long, device=device)
        g = torch.Generator().manual_seed(0)
        self._obs = torch.randn(4, size.num_envs, size.num_obs, generator=g).to(device)
        self._rewards = torch.randn(4, size.num_envs, generator=g).to(device)
        self._dones = (torch.rand(4, size.num_envs, generator=g) < 0.01).to(device)
        self._step = 0

    @property
    def unwrapped(self) -> SyntheticEnv:
        return self

    def get_observations(self) -> TensorDict:
        return TensorDict({"policy": self._obs[self._step % 4]}, batch_size=[self.num_envs], device=self.device)

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        self._step += 1
        i = self._step % 4
        rewards = self._rewards[i] - 0.01 * actions.square().sum(-1)
        return self.get_observations(), rewards, self._dones[i].long(), {"time_outs": self._dones[i]}


def make_runner(size: Size, device: str, algorithm: str, compile_mode: str | None = None, **args: object):
    model = {"class_name": "MLPModel", "hidden_dims": list(size.hidden_dims), "activation": "elu"}
    cfg = {
        "num_steps_per_env": size.num_steps,
        "save_interval": 10_000,
        "check_for_nan": False,
        "torch_compile_mode": compile_mode,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**model, "distribution_cfg": {"class_name": "GaussianDistribution"}},
        "critic": dict(model),
        "algorithm": {
            "class_name": algorithm,
            "num_learning_epochs": 5,
            "num_mini_batches": 4,
            "schedule": "adaptive",
            "desired_kl": 0.01,
            "rnd_cfg": None,
            "symmetry_cfg": None,
            **args,
        },
    }
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return OnPolicyRunner(SyntheticEnv(size, device), cfg, None, device)


class Clock:
    """Seconds of each part of an iteration, with the device's work in them."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str):
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def iterate(runner: OnPolicyRunner, device: str) -> dict[str, float]:
    """One iteration, as the runner does it."""
    alg, env, clock = runner.alg, runner.env, Clock(device)
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(alg.storage.num_transitions_per_env):
            with clock("act"):
                actions = alg.act(obs)
            obs, rewards, dones, extras = env.step(actions)
            with clock("process_env_step"):
                alg.process_env_step(obs, rewards, dones, extras)
        with clock("compute_returns"):
            alg.compute_returns(obs)
    with clock("update"):
        alg.update()
    clock.seconds["iteration"] = sum(clock.seconds.values())
    return clock.seconds


def measured_rows(name: str, device: str, rounds: int, warmup: int) -> list[dict]:
    contenders = {
        "rsl_rl": ("PPO", None, {}),
        "rsl_rl compiled": ("PPO", "default", {}),
        "FusedPPO": (FUSED, None, {}),
        **({"FusedPPO graph": (FUSED, None, {"cuda_graph": True})} if device == "cuda" else {}),
    }
    size = SIZES[name]
    runners = {key: make_runner(size, device, a, mode, **args) for key, (a, mode, args) in contenders.items()}
    seconds: dict[str, list[dict[str, float]]] = {key: [] for key in contenders}
    for i in range(-warmup, rounds):
        order = list(contenders) if i % 2 else list(reversed(contenders))
        for key in order:
            taken = iterate(runners[key], device)
            if i >= 0:
                seconds[key].append(taken)
    rows = []
    for part in seconds["rsl_rl"][0]:
        row: dict = {"size": name, "part": part}
        for key, rounds_of_it in seconds.items():
            times = sorted(r[part] for r in rounds_of_it)
            row[key] = {"median ms": 1e3 * median(times), "least ms": 1e3 * times[0], "most ms": 1e3 * times[-1]}
            ratios = [a[part] / b[part] for a, b in zip(seconds["rsl_rl"], rounds_of_it, strict=True)]
            row[key]["times faster than rsl_rl"] = median(ratios)
        rows.append(row)
    return rows


def displayed(row: dict) -> dict[str, str]:
    cells = {"size": row["size"], "part": row["part"]}
    names = [key for key in row if key not in ("size", "part")]
    cells |= {f"{key} ms": f"{row[key]['median ms']:.1f}" for key in names}
    return cells | {f"x {key}": f"{row[key]['times faster than rsl_rl']:.2f}" for key in names if key != "rsl_rl"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: cartpole anymal_flat; on a GPU all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, help="rounds that do not count (1; on a GPU 4)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME/update.json")
    args = parser.parse_args()
    print("  ".join(f"{k}: {v}" for k, v in machine().items()))
    on_gpu = args.device == "cuda"
    sizes = args.sizes or (list(SIZES) if on_gpu else ["cartpole", "anymal_flat"])
    rows = []
    for name in sizes:
        print(f"{name}: {SIZES[name]}", flush=True)
        rows += measured_rows(name, args.device, args.rounds, args.warmup or (4 if on_gpu else 1))
    print_table([displayed(row) for row in rows])
    if args.save:
        print(f"written: {write_results('update', rows, RESULTS / args.save)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
