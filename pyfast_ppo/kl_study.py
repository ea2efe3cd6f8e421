"""What each KL estimator does, in numbers: its bias, its spread, its gradient; and what a learning rate makes of it.

The old policy is N(0, 1), one action; the new one moves away from it along a path, as far as a given KL(old‖new). The
means are integrals over the actions, in float64, with no sampling. As in ``pyfast_ppo.kl``: ℓ = log π_new - log π_old,
r = e^ℓ, F = KL(old‖new), R = KL(new‖old); gradients are with respect to (mean, log std) of the new policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfast_ppo import kl
from pyfast_ppo.reference import KL_LOSSES, MAX_LOG_RATIO, gaussian_kl
from pyfast_ppo.schedules import ProportionalSchedule, RslRlSchedule, RslRlScheduleBefore5

PATHS = ("mean shift", "growing std", "shrinking std")
CLIP = 0.2
MINI_BATCH = 24_576  # Isaac Lab's: 4096 environments, 24 steps, 4 mini-batches
_EXACT = {"old_new": "KL(old‖new)", "new_old": "KL(new‖old)"}


# --- policies, integrals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """N(mean, e^{2 log_std}) for one action."""

    mean: float
    log_std: float

    @property
    def std(self) -> float:
        """σ."""
        return math.exp(self.log_std)


OLD = Policy(0.0, 0.0)


def drifted(path: str, drift: float) -> Policy:
    """The new policy on this path at KL(old‖new) = ``drift`` nats."""
    if path == "mean shift":
        return Policy(math.sqrt(2.0 * drift), 0.0)
    near, far = 0.0, (drift + 1.0 if path == "growing std" else -0.5 * math.log(2.0 * drift + 2.0) - 2.0)
    for _ in range(100):  # bisection: the KL grows with the distance
        middle = 0.5 * (near + far)
        near, far = (middle, far) if exact_value(Policy(0.0, middle), "old_new") < drift else (near, middle)
    return Policy(0.0, far)


def exact_value(new: Policy, direction: str) -> float:
    """F or R from its definition: log of the ratio of the stds, and the rest."""
    p, q = (OLD, new) if direction == "old_new" else (new, OLD)
    d = p.log_std - q.log_std
    return 0.5 * (math.expm1(2.0 * d) - 2.0 * d + ((p.mean - q.mean) / q.std) ** 2)


def exact_gradient(new: Policy, direction: str) -> Tensor:
    """∇F or ∇R. [2]: with respect to mean, log std."""
    if direction == "new_old":
        return torch.tensor([new.mean, math.expm1(2.0 * new.log_std)], dtype=torch.float64)
    m = new.mean / new.std
    return torch.tensor([m / new.std, -math.expm1(-2.0 * new.log_std) - m * m], dtype=torch.float64)


def nodes(sampled: Policy, other: Policy, count: int) -> tuple[Tensor, Tensor]:
    """Actions and their weights: Σ weight · f(action) is the mean of f under the sampled policy.

    The trapezoidal rule in u, action = mean + c sinh u with c the narrower of the two stds: it sees both of them,
    however far apart they are, and converges exponentially for smooth functions.
    """
    narrow = min(sampled.std, other.std)
    reach = math.asinh(38.0 * sampled.std / narrow)  # beyond, the density is 0 in float64
    u = torch.linspace(-reach, reach, count, dtype=torch.float64)
    distance = narrow * u.sinh()
    density = torch.exp(-0.5 * (distance / sampled.std) ** 2) / (sampled.std * math.sqrt(2.0 * math.pi))
    return sampled.mean + distance, density * narrow * u.cosh() * (2.0 * reach / (count - 1))


def log_ratio(actions: Tensor, new: Policy) -> Tensor:
    """ℓ, without the difference of two large sums."""
    z_old, z_new = actions, (actions - new.mean) / new.std
    return 0.5 * (z_old - z_new) * (z_old + z_new) - new.log_std


def score(actions: Tensor, new: Policy) -> Tensor:
    """g = ∇ log π_new with respect to mean, log std. [2, N]."""
    z = (actions - new.mean) / new.std
    return torch.stack((z / new.std, z * z - 1.0))


# --- estimators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """An estimator as it would be put into a loss."""

    name: str
    samples: str  # "old", "new"
    value_of: str  # the direction that its value is compared with
    gradient_of: str  # the direction that its gradient is compared with
    terms: Callable[[Tensor], tuple[Tensor, Tensor]]  # ℓ -> value, coefficient of g
    tail: int = 0  # 1: the value grows as the importance ratio does, so its variance can be infinite

    def infinite_spread(self, new: Policy) -> bool:
        """Whether the second moment diverges. (With the clamp of r to e^{±20} it is finite, and as useless.)"""
        wide = new.std if self.samples == "old" else 1.0 / new.std
        return bool(self.tail) and wide * wide >= 2.0


@dataclass(frozen=True)
class Analytic:
    """A closed form: no action noise."""

    name: str
    direction: str
    function: Callable[[Tensor, Tensor], Tensor]  # mean, std of the new policy -> the KL


# Of KL_LOSSES those whose value is made of ℓ alone
_WITHOUT_RATIO = {("old_new", "old", "k1"), ("new_old", "new", "k1"), ("new_old", "new", "k2")}


def estimators() -> list[Estimator | Analytic]:
    """All of them, in the order of the table."""
    found: list[Estimator | Analytic] = [
        Analytic("closed form", "old_new", lambda mean, std: kl.gaussian(*_old(), mean, std, backend="eager")),
        Analytic("closed form", "new_old", lambda mean, std: kl.gaussian(mean, std, *_old(), backend="eager")),
        Analytic("closed form with ε = 1e-5", "old_new", lambda mean, std: RslRlScheduleBefore5.kl(*_old(), mean, std)),
    ]
    for samples, direction in (("old", "old_new"), ("new", "new_old")):
        for name in kl.ESTIMATORS:
            terms = _autograd_of_estimate(name, samples)
            found.append(Estimator(f"{name} as it is", samples, direction, direction, terms, int(name == "k3")))
    for which in KL_LOSSES:
        direction, samples, form = which
        value_of = "new_old" if which == ("old_new", "new", "k3") else direction  # that one's is the other direction's
        tail = int(which not in _WITHOUT_RATIO)
        found.append(Estimator(f"loss {form}", samples, value_of, direction, _loss(direction, samples, form), tail))
    return [
        *found,
        Estimator(f"k3 of the ratio clipped at {CLIP}", "old", "old_new", "old_new", _k3_of_clipped_ratio),
        Estimator("k3 clamped to ±10", "old", "old_new", "old_new", _k3_clamped),
        Estimator("k3 plus ℓ ∇log π", "old", "old_new", "old_new", _k3_plus_score_term, 1),
    ]


def _old() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)


def _ratio_minus_1(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _autograd_of_estimate(name: str, samples: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The estimate, and what autograd makes of its formula if it is put into the loss."""
    sign = 1.0 if samples == "old" else -1.0

    def terms(ell: Tensor) -> tuple[Tensor, Tensor]:
        x = sign * ell
        slope = {"k1": lambda: -torch.ones_like(x), "k2": lambda: x, "k3": lambda: _ratio_minus_1(x)}[name]()
        return kl.estimate(ell, name, samples), sign * slope

    return terms


def _loss(direction: str, samples: str, form: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``kl.loss``, with the coefficient that autograd finds in it."""

    def terms(ell: Tensor) -> tuple[Tensor, Tensor]:
        leaf = ell.clone().requires_grad_()
        value = kl.loss(leaf, direction, samples, form)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return terms


def _k3_of_clipped_ratio(ell: Tensor) -> tuple[Tensor, Tensor]:
    clipped = ell.clamp(math.log(1.0 - CLIP), math.log(1.0 + CLIP))
    return kl.estimate(clipped, "k3"), torch.where(clipped == ell, torch.expm1(clipped), 0.0)


def _k3_clamped(ell: Tensor) -> tuple[Tensor, Tensor]:
    value = kl.estimate(ell, "k3")
    return value.clamp(-10.0, 10.0), torch.where(value < 10.0, _ratio_minus_1(ell), 0.0)


def _k3_plus_score_term(ell: Tensor) -> tuple[Tensor, Tensor]:
    return kl.estimate(ell, "k3"), _ratio_minus_1(ell) + ell


# --- bias, spread, gradient -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One estimator at one drift. Biases are relative to the exact value, or the norm of the exact gradient."""

    estimator: str
    samples: str
    value_of: str
    gradient_of: str
    path: str
    drift: float  # KL(old‖new), nats
    exact_value: float
    mean: float
    value_bias: float
    spread: float  # std of one sample's value, nats
    gradient_bias: float
    gradient_cosine: float  # 0 where the mean gradient is 0
    mini_batch_mean: float  # of one mini-batch of samples
    mini_batch_spread: float


def study_estimators(drifts: list[float], seed: int, node_count: int) -> list[Finding]:
    """Every estimator on every path at every drift."""
    noise = torch.randn(MINI_BATCH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = estimators()
    return [_measure(row, path, drift, noise, node_count) for row in rows for path in PATHS for drift in drifts]


def _measure(row: Estimator | Analytic, path: str, drift: float, noise: Tensor, node_count: int) -> Finding:
    new = drifted(path, drift)
    if isinstance(row, Analytic):
        samples, value_of, gradient_of = "none", row.direction, row.direction
        value, gradient = _analytic(row, new)
        spread, mini_batch = 0.0, (value, 0.0)
    else:
        samples, value_of, gradient_of = row.samples, row.value_of, row.gradient_of
        value, spread, gradient = _integrate(row, new, node_count)
        mini_batch = _sample(row, new, noise)
    exact, exact_grad = exact_value(new, value_of), exact_gradient(new, gradient_of)
    scale = float(exact_grad.norm())
    size = float(gradient.norm())
    vanishes = size < 1e-9 * scale  # rounding has no direction
    return Finding(
        estimator=row.name,
        samples=samples,
        value_of=_EXACT[value_of],
        gradient_of=_EXACT[gradient_of],
        path=path,
        drift=drift,
        exact_value=exact,
        mean=value,
        value_bias=value / exact - 1.0,
        spread=spread,
        gradient_bias=float((gradient - exact_grad).norm()) / scale,
        gradient_cosine=0.0 if vanishes else float(gradient @ exact_grad) / (size * scale),
        mini_batch_mean=mini_batch[0],
        mini_batch_spread=mini_batch[1],
    )


def _analytic(row: Analytic, new: Policy) -> tuple[float, Tensor]:
    mean, log_std = (torch.full((1, 1), v, dtype=torch.float64, requires_grad=True) for v in (new.mean, new.log_std))
    value = row.function(mean, log_std.exp()).sum()
    return value.item(), torch.cat(torch.autograd.grad(value, (mean, log_std))).flatten()


def _integrate(row: Estimator, new: Policy, node_count: int) -> tuple[float, float, Tensor]:
    """Mean, spread, mean gradient."""
    pair = (OLD, new) if row.samples == "old" else (new, OLD)
    actions, weights = nodes(*pair, node_count)
    value, coefficient = row.terms(log_ratio(actions, new))
    mean = (weights * value).sum()
    spread = math.inf if row.infinite_spread(new) else math.sqrt((weights * (value - mean) ** 2).sum())
    return mean.item(), spread, score(actions, new) @ (weights * coefficient)


def _sample(row: Estimator, new: Policy, noise: Tensor) -> tuple[float, float]:
    sampled = OLD if row.samples == "old" else new
    value, _ = row.terms(log_ratio(sampled.mean + sampled.std * noise, new))
    return value.mean().item(), value.std().item()


# --- the learning rate ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussians:
    """Diagonal policies of several seeds at once."""

    mean: Tensor  # [seeds, rows, actions]
    std: Tensor  # [seeds, 1, actions]


@dataclass(frozen=True)
class Rule:
    """A rule for the learning rate and the KL that it is fed."""

    name: str
    fed: str
    schedule: RslRlSchedule | ProportionalSchedule
    estimate: Callable[[Tensor, Gaussians, Gaussians], Tensor]  # ℓ, old, new -> [seeds, rows]


@dataclass(frozen=True)
class RuleFinding:
    """What a rule made of the runs, over their second half."""

    rule: str
    fed: str
    desired_kl: float
    end_kl: float  # exact KL(old‖new) at the end of an update, over the whole rollout: mean over updates and seeds
    end_kl_spread: float
    end_kl_max: float
    learning_rate: float
    reward: float


def exact_kl(_: Tensor, old: Gaussians, new: Gaussians) -> Tensor:
    """KL(old‖new) of each row."""
    return gaussian_kl(old.mean, old.std, new.mean, new.std)


def rules(desired_kl: float) -> list[Rule]:
    """All at the same target; the last one at three times it, where it ends at the KL of the others."""
    sampled = [
        Rule(
            "rsl_rl 5.x", f"{name}, old samples", RslRlSchedule(desired_kl), lambda ell, *_, n=name: kl.estimate(ell, n)
        )
        for name in ("k3", "k1", "k2")
    ]
    return [
        Rule("rsl_rl 5.x", "exact KL", RslRlSchedule(desired_kl), exact_kl),
        *sampled,
        Rule(
            "rsl_rl before 5.0",
            "KL with ε = 1e-5",
            RslRlScheduleBefore5(desired_kl),
            lambda _, old, new: RslRlScheduleBefore5.kl(old.mean, old.std, new.mean, new.std),
        ),
        *(
            Rule("proportional", "exact KL, last epoch", ProportionalSchedule(target), exact_kl)
            for target in (desired_kl, 3.0 * desired_kl)
        ),
    ]


SEEDS, ROWS, OBSERVATIONS, ACTIONS, EPOCHS, MINI_BATCHES = 8, 1024, 8, 12, 5, 4


def study_rule(rule: Rule, seed: int, updates: int) -> RuleFinding:
    """PPO of a linear Gaussian policy that has to follow a wandering linear target, with this rule for its rate.

    The reward is -mean (action - target)² plus noise; it says nothing of the rules but that the policy learns. The
    target wanders, or the policy would settle, its std vanish, and the rate with it. All rules see the same noise.
    """
    g = torch.Generator().manual_seed(seed)
    weights, log_std = torch.zeros(SEEDS, OBSERVATIONS, ACTIONS), torch.full((SEEDS, 1, ACTIONS), math.log(0.5))
    adam = _Adam([weights, log_std])
    target = 0.3 * torch.randn(weights.shape, generator=g)
    lr = torch.full((SEEDS,), 1e-3, dtype=torch.float64)
    history = []
    for _ in range(updates):
        target += 0.03 * torch.randn(target.shape, generator=g)
        observations = torch.randn(SEEDS, ROWS, OBSERVATIONS, generator=g)
        old = Gaussians(observations @ weights, log_std.exp())
        actions = old.mean + old.std * torch.randn(old.mean.shape, generator=g)
        reward = -(actions - observations @ target).square().mean(-1)
        noisy = reward + 0.3 * torch.randn(reward.shape, generator=g)
        advantages = (noisy - noisy.mean(-1, keepdim=True)) / noisy.std(-1, keepdim=True)
        rates = []
        last_epoch: list[Tensor] = []
        for step in range(EPOCHS * MINI_BATCHES):
            rows = slice(step % MINI_BATCHES, None, MINI_BATCHES)  # the same mini-batches in each epoch, as rsl_rl's
            before = Gaussians(old.mean[:, rows], old.std)
            now = Gaussians(observations[:, rows] @ weights, log_std.exp())
            z_old, z_new = ((actions[:, rows] - p.mean) / p.std for p in (before, now))
            ell = (0.5 * (z_old - z_new) * (z_old + z_new) + torch.log(before.std / now.std)).sum(-1)
            read = rule.estimate(ell, before, now).mean(-1)
            if isinstance(rule.schedule, ProportionalSchedule):
                last_epoch = [*last_epoch, read][-MINI_BATCHES:]
            else:
                lr = rule.schedule.update(read, lr, step_taken=step > 0)
            rates.append(lr)
            coefficient = _surrogate_coefficient(ell, advantages[:, rows])[..., None] / ell.shape[-1]
            mean_gradient = observations[:, rows].mT @ (coefficient * z_new / now.std)
            std_gradient = (coefficient * (z_new * z_new - 1.0)).sum(1, keepdim=True)
            adam.step([mean_gradient, std_gradient], lr)
        if isinstance(rule.schedule, ProportionalSchedule):
            lr = rule.schedule.update(torch.stack(last_epoch).mean(0), lr)
        end = exact_kl(ell, old, Gaussians(observations @ weights, log_std.exp())).mean(-1)
        history.append(torch.stack((end.double(), torch.stack(rates).mean(0), reward.mean(-1).double())))
    end_kl, rate, reward = torch.stack(history[updates // 2 :], dim=1)
    return RuleFinding(
        rule=rule.name,
        fed=rule.fed,
        desired_kl=rule.schedule.desired_kl,
        end_kl=end_kl.mean().item(),
        end_kl_spread=end_kl.std().item(),
        end_kl_max=end_kl.max().item(),
        learning_rate=rate.mean().item(),
        reward=reward.mean().item(),
    )


def _surrogate_coefficient(ell: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped surrogate, to be minimised, differentiated by ℓ."""
    ratio = ell.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = torch.where(advantages > 0.0, ratio > 1.0 + CLIP, ratio < 1.0 - CLIP)
    return torch.where(clipped, 0.0, -advantages * ratio)


class _Adam:
    """Adam in place, with one rate per seed: torch's has one for all."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._first, self._second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self._steps = 0

    def step(self, gradients: list[Tensor], lr: Tensor) -> None:
        """``lr``: [seeds]."""
        self._steps += 1
        for p, g, m, v in zip(self._parameters, gradients, self._first, self._second, strict=True):
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            scale = (v / (1.0 - 0.999**self._steps)).sqrt_().add_(1e-8)
            p -= lr.float()[:, None, None] / (1.0 - 0.9**self._steps) * m / scale
