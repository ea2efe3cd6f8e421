"""What an iteration on a GPU costs the host: rsl_rl's PPO and FusedPPO on a CUDA runtime whose kernels do nothing.

python bench/bench_host.py                  # with a torch for CUDA 13, nvcc, and no GPU: see tests/imitated_gpu
python bench/bench_host.py --size cartpole  # another of Isaac Lab's sizes

CPU seconds of the process, all threads together; medians, contenders taking turns. What the driver needs for a launch
comes on top.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.extend(
    str(Path(__file__).parents[1] / name) for name in ("tests/imitated_gpu", "tests/ops/oracles", "csrc/cuda")
)

import cuda_on_cpu
import libraries
import native_module
import torch
from rsl_rl.algorithms import PPO
from torch import Tensor

from pyfast_ppo.backends import cuda
from pyfast_ppo.bench.sizes import SIZES
from pyfast_ppo.bench.synthetic import make_runner
from pyfast_ppo.rsl_rl import FusedPPO

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"
CONTENDERS: dict[str, tuple[str, dict]] = {
    "rsl_rl": ("PPO", {}),
    "FusedPPO": (FUSED, {}),
    "FusedPPO, cuda_graph=True": (FUSED, {"cuda_graph": True}),
}
WARM_UP, ROUNDS = 4, 15


def drawn(mean: Tensor, std: Tensor) -> Tensor:
    """In place of ``torch.normal``: its check of a std that no kernel has computed would fail."""
    (std >= 0.0).all().item()
    return torch.randn_like(mean).mul_(std).add_(mean)


def let_kernels_do_nothing() -> None:
    """Torch's are imitated already. What comes of it is noise, of which nobody shall complain."""
    torch.backends.cudnn.enabled = False  # there is none
    torch.normal = drawn
    FusedPPO._raise_if_lost = lambda *_: None
    folders = [cuda_on_cpu.CSRC, cuda_on_cpu.TESTS]
    includes = [folders[0], folders[1] / "emulation"]
    cuda._cuda = native_module.load("cuda_on_cpu", cuda_on_cpu.SOURCES, folders, includes)
    cuda._cuda.run_kernels(False)
    cuda.unavailable_reason = lambda: None


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def iteration(alg: PPO, env: object) -> dict[str, float]:
    """CPU seconds of each part."""
    spent = {"act": 0.0, "process_env_step": 0.0}
    alg.train_mode()
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(alg.storage.num_transitions_per_env):
            acted: list[Tensor] = []
            spent["act"] += cpu_seconds(lambda obs=obs, acted=acted: acted.append(alg.act(obs)))
            obs, *given = env.step(acted[0])
            spent["process_env_step"] += cpu_seconds(lambda obs=obs, given=given: alg.process_env_step(obs, *given))
        spent["compute_returns"] = cpu_seconds(lambda: alg.compute_returns(obs))
    spent["update"] = cpu_seconds(alg.update)
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="anymal_flat")
    args = parser.parse_args()
    if "libcudart" not in os.environ.get("LD_PRELOAD", ""):  # they have to be there before torch
        if reason := libraries.why_not():
            parser.error(reason)
        built = libraries.build()
        where = {"LD_PRELOAD": ":".join(map(str, built)), "LD_LIBRARY_PATH": str(built[0].parent)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **where})
    let_kernels_do_nothing()
    size = replace(SIZES[args.size], num_envs=64)  # copies are made, and shall take no time
    runners = {name: make_runner(size, "cuda", algorithm, **more) for name, (algorithm, more) in CONTENDERS.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for i in range(-WARM_UP, ROUNDS):
        for name, runner in runners.items():
            spent = iteration(runner.alg, runner.env)
            if i >= 0:
                found[name].append(spent)
    print(f"{args.size}, CPU milliseconds of an iteration's parts")
    for part in found["rsl_rl"][0]:
        medians = {name: 1e3 * statistics.median(spent[part] for spent in rounds) for name, rounds in found.items()}
        print(f"{part:<18}" + "".join(f"{name}: {ms:.2f}    " for name, ms in medians.items()).rstrip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
