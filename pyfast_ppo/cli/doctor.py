"""Show versions, hardware and which backends are available, and why not; or look at an environment for known faults."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
from typing import TYPE_CHECKING

from pyfast_ppo import __version__
from pyfast_ppo.cli.arguments import positive
from pyfast_ppo.cli.console import Console
from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.cli.simulators import default_device, make_simulated
from pyfast_ppo.versions import fault_of_rsl_rl, installed

if TYPE_CHECKING:
    from rsl_rl.env import VecEnv

PACKAGES = ("torch", "triton", "rsl-rl-lib", "numpy", "gymnasium", "mujoco")
_NUM_ENVS = 16
_SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that turn the report into a look at an environment."""
    environment = parser.add_mutually_exclusive_group()
    environment.add_argument(
        "--env",
        metavar="ID",
        help="look at this Gymnasium task (also module:id) for known faults (docs/check_env.md); exit code 1: found,"
        " and not notes alone",
    )
    environment.add_argument("--task", metavar="NAME", help="the same for a task of Isaac Lab or mjlab")
    parser.add_argument("--num-envs", type=positive, metavar="N", help=f"environments ({_NUM_ENVS})")
    parser.add_argument("--steps", type=positive, metavar="N", help="random steps of each environment (32)")
    parser.add_argument(
        "--device", metavar="NAME", help="where the tensors are (cpu; with --task cuda:0 if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, or the findings about an environment. Returns 0, or 1 where more than notes was found.

    Raises:
        UserError: An argument is wrong, or the environment cannot be made.
    """
    if args.env is not None or args.task is not None:
        return _look_at_environment(args)
    alone = [flag for flag in ("num_envs", "steps", "device") if getattr(args, flag) is not None]
    if alone:
        raise UserError(f"--{alone[0].replace('_', '-')} goes with --env or --task.")
    own = [("pyfast_ppo", __version__), ("python", platform.python_version())]
    console = Console()
    _print_section(console, "Versions", own + [(name, _version(name)) for name in PACKAGES])
    _print_section(console, "Hardware", _hardware())
    _print_section(console, "Backends", _backends())
    return 0


def _look_at_environment(args: argparse.Namespace) -> int:
    import torch

    from pyfast_ppo.check_env import DEFAULT_STEPS, find_faults

    steps, num_envs = args.steps or DEFAULT_STEPS, args.num_envs or _NUM_ENVS
    device = args.device or ("cpu" if args.task is None else default_device())
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if args.task is None:
        name = args.env
        env, config = _make_gymnasium(name, num_envs, device)
    else:
        name = args.task
        env, config = make_simulated(name, num_envs, device, _SEED)
    with contextlib.closing(env):
        findings = find_faults(env, config, steps)
    console = Console()
    for finding in findings:
        console.say(str(finding))
    if not findings:
        console.say(f"{name}: nothing found in {steps} steps of {num_envs} environment{'s' if num_envs > 1 else ''}.")
    return 0 if all(finding.is_note for finding in findings) else 1


def _make_gymnasium(name: str, num_envs: int, device: str) -> tuple[VecEnv, dict | None]:
    missing = [package for package in ("gymnasium", "mujoco") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--env needs {' and '.join(missing)}; install with: pip install 'pyfast-ppo[gym]'")
    from pyfast_ppo.cli.environment import images, make_env, vector_groups
    from pyfast_ppo.cli.train_config import Settings, train_config

    settings = Settings(env=name, num_envs=num_envs, device=device, seed=_SEED)
    env = make_env(settings)
    # The MLPs of that config do not read images
    return env, None if images(env) else train_config(settings, vector_groups(env))


def _hardware() -> list[tuple[str, str]]:
    import torch

    from pyfast_ppo.bench.machine import cpu_name

    rows = [("cpu", f"{cpu_name()}, {os.cpu_count()} cores seen, torch uses {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{device.name}, compute capability {device.major}.{device.minor}, {memory}"))
    if len(rows) == 1:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        rows.append(("cuda", f"no device (torch is {built})"))
    return rows


def _backends() -> list[tuple[str, str]]:
    from pyfast_ppo import backends

    rows = []
    for status in backends.status():
        state = f"available   {status.detail}" if status.available else f"unavailable {status.reason}"
        rows.append((status.name, state.rstrip()))
    return rows


def _version(package: str) -> str:
    version = installed(package)
    fault = fault_of_rsl_rl(version) if package == "rsl-rl-lib" else None
    return (version or "not installed") + (f"  {fault}" if fault else "")


def _print_section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    console.say(title)
    for name, text in rows:
        console.say(f"  {name:<{width}}  {text}")
    console.say()
