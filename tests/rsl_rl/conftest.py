"""A small environment, runner configs, and training runs that record what the tests compare.

Tests get all of it as fixtures; only ``distributed_worker.py``, which is a script, imports this file.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
import torch
from rsl_rl.algorithms import PPO
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.rsl_rl import FusedPPO

FUSED = "pyfast_ppo.rsl_rl:FusedPPO"


HAS_MIXED_PRECISION = "use_mixed_precision" in inspect.signature(PPO.__init__).parameters

collect_ignore = [] if HAS_MIXED_PRECISION else ["test_mixed_precision.py"]


def pytest_report_header() -> str:
    lacks = "" if HAS_MIXED_PRECISION else "; it has no mixed precision: test_mixed_precision.py is left out"
    return f"rsl-rl-lib: {version('rsl-rl-lib')}, {inspect.getfile(PPO)}{lacks}"


# --- environment ------------------------------------------------------------------------------------------------------


class PointEnv(VecEnv):
    """Points that actions push around: reward for being near 0, a time-out after 20 steps, random terminations.

    Observation groups: "policy" (the positions; actions push the first half of the coordinates, and the second half the
    other way), "privileged" (their squares), on request "image" (their outer product). Mirroring all signs maps the
    environment onto itself. No threshold on a position decides anything: runs that differ by rounding stay close.
    """

    max_episode_length = 20
    step_dt = 0.1  # RND scales its weight by it

    def __init__(
        self, num_envs: int = 32, num_actions: int = 3, images: bool = False, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.num_envs = num_envs
        self.num_actions = num_actions
        self.images = images
        self.device = device
        self.cfg = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.position = self._draw(num_envs)
        self.episode_length_buf = torch.arange(num_envs, device=device) % self.max_episode_length
        self.num_time_outs = self.num_terminations = 0
        self.mean_rewards: list[float] = []  # of each step

    @property
    def unwrapped(self) -> PointEnv:
        return self

    def _draw(self, num: int) -> Tensor:
        # in float32 in any case, so that float64 runs meet the same environment
        x = torch.randn(num, 2 * self.num_actions, generator=self.generator, dtype=torch.float32)
        return x.to(self.device, torch.get_default_dtype())

    def get_observations(self) -> TensorDict:
        x = self.position
        groups = {"policy": x.clone(), "privileged": x.square()}
        if self.images:
            groups["image"] = (x.unsqueeze(2) * x.unsqueeze(1)).unsqueeze(1)
        return TensorDict(groups, batch_size=[self.num_envs], device=self.device)

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict]:
        self.position = 0.9 * self.position + 0.2 * torch.cat([actions, -actions], -1)
        self.episode_length_buf += 1
        rewards = 1.0 - 0.2 * self.position.square().sum(-1)
        terminated = torch.rand(self.num_envs, generator=self.generator, dtype=torch.float32) < 0.02
        terminated = terminated.to(self.device)
        time_outs = (self.episode_length_buf >= self.max_episode_length) & ~terminated
        dones = terminated | time_outs
        self.position[dones] = self._draw(int(dones.sum()))
        self.episode_length_buf[dones] = 0
        self.num_time_outs += int(time_outs.sum())
        self.num_terminations += int(terminated.sum())
        self.mean_rewards.append(rewards.mean().item())
        return self.get_observations(), rewards, dones.long(), {"time_outs": time_outs}


def mirror(env: VecEnv, obs: TensorDict | None, actions: Tensor | None) -> tuple[TensorDict | None, Tensor | None]:
    """The symmetry of ``PointEnv``: appends all rows with their signs changed."""
    if obs is not None:
        mirrored = {key: -value if key == "policy" else value for key, value in obs.items()}
        obs = torch.cat([obs, TensorDict(mirrored, batch_size=obs.batch_size)])
    if actions is not None:
        actions = torch.cat([actions, -actions])
    return obs, actions


# --- configs ----------------------------------------------------------------------------------------------------------


def make_config(algorithm: str | type = "PPO", args: dict | None = None, **sections: dict | str) -> dict:
    """A runner config: ``args`` are the algorithm's; ``actor={...}`` and so on are merged into that section."""
    cfg = {
        "num_steps_per_env": 6,
        "save_interval": 1000,
        "check_for_nan": False,
        "multi_gpu": None,
        "obs_groups": {"actor": ["policy"], "critic": ["policy", "privileged"], "rnd_state": ["policy"]},
        "actor": {
            "class_name": "MLPModel",
            "hidden_dims": [16],
            "distribution_cfg": {"class_name": "GaussianDistribution"},
        },
        "critic": {"class_name": "MLPModel", "hidden_dims": [16]},
        "algorithm": {
            "class_name": algorithm,
            "num_learning_epochs": 2,
            "num_mini_batches": 2,
            "rnd_cfg": None,
            "symmetry_cfg": None,
        },
    }
    cfg = _merge(cfg, copy.deepcopy({**sections, "algorithm": args or {}}))
    if cfg["algorithm"]["symmetry_cfg"] is not None:
        cfg["algorithm"]["symmetry_cfg"]["data_augmentation_func"] = mirror
    return cfg


def _merge(base: dict, changes: dict) -> dict:
    for key, value in changes.items():
        base[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base


# --- runs -------------------------------------------------------------------------------------------------------------


def state_of(alg: PPO) -> dict[str, Tensor]:
    """A copy of every parameter and buffer that a checkpoint has, those of RND included."""
    saved = alg.save()
    models = ("actor_state_dict", "critic_state_dict", "rnd_state_dict")
    return {f"{model}.{name}": t.clone() for model in models for name, t in saved.get(model, {}).items()}


def state_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference between the entries of two states; infinite if there is a NaN.

    Relative to the largest entry of a tensor where that is above 1: RND's normalizers have entries of some hundreds.
    """
    assert ours.keys() == theirs.keys()
    differences = []
    for name in ours:
        a, b = ours[name].double(), theirs[name].double()
        differences.append((a - b).abs().max() / b.abs().max().clamp(min=1.0))
    return torch.stack(differences).max().nan_to_num(nan=torch.inf).item()


def roll_out(alg: PPO, env: PointEnv) -> None:
    """What the runner does before ``alg.update()``."""
    alg.train_mode()
    with torch.inference_mode():
        obs = env.get_observations()
        for _ in range(alg.storage.num_transitions_per_env):
            obs, rewards, dones, extras = env.step(alg.act(obs))
            alg.process_env_step(obs, rewards, dones, extras)
        alg.compute_returns(obs)


@dataclass
class Run:
    """A training run and what it left."""

    runner: OnPolicyRunner
    losses: list[dict[str, float]] = field(default_factory=list)  # of each update
    rates: list[float] = field(default_factory=list)  # learning rate of each step of the optimizer
    random_state: Tensor | None = None  # of torch, after the last iteration

    @property
    def alg(self) -> PPO:
        return self.runner.alg

    @property
    def env(self) -> PointEnv:
        return self.runner.env

    def learn(self, iterations: int) -> Run:
        self.runner.learn(iterations)
        self.random_state = torch.get_rng_state()
        return self

    def rollout(self) -> Run:
        """One iteration up to the update."""
        roll_out(self.alg, self.env)
        return self

    def distance(self, other: Run) -> float:
        """See ``state_distance``."""
        return state_distance(state_of(self.alg), state_of(other.alg))


def start_run(
    algorithm: str | type = "PPO",
    *,
    seed: int = 1,
    nudge: int | None = None,
    env_args: dict | None = None,
    log_dir: str | None = None,
    device: str = "cpu",
    **config: dict | str,
) -> Run:
    """A run before its first iteration. ``nudge`` moves each parameter by one unit in the last place, up or down."""
    torch.manual_seed(seed)
    env = PointEnv(**(env_args or {}), device=device)
    run = Run(OnPolicyRunner(env, make_config(algorithm, **config), log_dir, device))
    if nudge is not None:
        _nudge(run.alg, nudge)
    _record_rates(run)
    update = run.alg.update

    def recorded_update() -> dict[str, float]:
        run.losses.append(update())
        return run.losses[-1]

    run.alg.update = recorded_update
    return run


def rate_of(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """Its present learning rate; a tensor may hold another one later."""
    rate = optimizer.param_groups[0]["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate


def _record_rates(run: Run) -> None:
    """Of each step; a hook on the optimizer of FusedPPO would leave its steps to torch."""
    alg = run.alg
    if not isinstance(alg, FusedPPO) or alg._stock_reason is not None:
        alg.optimizer.register_step_pre_hook(lambda optimizer, *_: run.rates.append(rate_of(optimizer)))
        return
    apply = alg._apply
    alg._apply = lambda update: (run.rates.append(rate_of(alg.optimizer)), apply(update))


def _nudge(alg: PPO, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = {id(p): p for model in (alg.actor, alg.critic) for p in model.parameters()}
    with torch.no_grad():
        for p in parameters.values():
            up = torch.randint(0, 2, p.shape, generator=generator).bool().to(p.device)
            p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf).to(p.dtype)))


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in double precision: networks, environment, storage."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def new_run() -> Callable[..., Run]:
    return start_run


@pytest.fixture
def train() -> Callable[..., Run]:
    """``train("PPO", 20, actor={...}, args={...})``: 20 iterations."""

    def run(algorithm: str | type, iterations: int, **options) -> Run:
        return start_run(algorithm, **options).learn(iterations)

    return run


@pytest.fixture(name="state_distance", scope="session")
def state_distance_fixture() -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    return state_distance
