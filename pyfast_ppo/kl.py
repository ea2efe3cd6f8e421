"""The KL of two policies: exact where it has a closed form, estimated from samples where it has none.

ℓ = log π_new(a) - log π_old(a) and r = e^ℓ throughout; F = KL(old‖new), R = KL(new‖old); g = ∇ log π_new(a). The
samples are actions of the old policy (PPO), or of the new one (fine-tuning against a reference, which then is "old").
What an estimator's *value* estimates and what the *gradient* of its value estimates are two questions with different
answers: ``estimate`` answers the first and is made to be logged, ``loss`` the second and is made to be minimised.

float16 and bfloat16 log-ratios and logits are computed with in float32. A value that is then too large for float16 is
its largest number.

Where the policies are Gaussian or categorical, the exact forms have no action noise at all: prefer them.

Sources: J. Schulman, "Approximating KL Divergence" (2020), for k1, k2, k3; Tang and Munos, arXiv 2506.09477, and arXiv
2510.01555 for what their gradients are. tests/test_kl.py holds every line of the tables to 1e-9, by quadrature.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyfast_ppo.ops._arguments import check_tensor
from pyfast_ppo.ops.gaussian import gaussian_kl as gaussian
from pyfast_ppo.ops.gaussian import gaussian_kl_loss
from pyfast_ppo.ops.ppo_loss import KL_DIRECTIONS
from pyfast_ppo.reference import KL_LOSSES, MAX_LOG_RATIO, expm1_minus, k3, kl_loss, narrowed, widened, without_value

__all__ = [
    "categorical",
    "control_variate",
    "estimate",
    "gaussian",
    "gaussian_loss",
    "loss",
    "multi_categorical",
    "sequence_loss",
]

ESTIMATORS = ("k1", "k2", "k3")
POLICIES = ("old", "new")


# --- from samples -----------------------------------------------------------------------------------------------------


def estimate(log_ratio: Tensor, estimator: str = "k3", sampled_from: str = "old") -> Tensor:
    """One estimate of the KL for each sample, to be averaged. No gradient: for one, see ``loss``.

    It estimates the KL of the policy that was sampled to the other: F from old samples, R from new ones. With
    x = ℓ for old samples and x = -ℓ for new ones:

    ======  ==============  ===========================================================================
    k1      -x              unbiased; each can be negative, the spread is √(2 KL) for small steps
    k2      ½ x²            biased (by the third order of the step), never negative
    k3      (eˣ - 1) - x    unbiased, never negative. Its variance is e^{2K} - 1 - 2K for a shift of the
                            mean, smaller than that of k1 up to K = 0.628 nats, and infinite as soon as
                            one std of the other policy is √2 times that of the sampled one, or more
    ======  ==============  ===========================================================================

    k3 is no Taylor expansion; k2 is the second-order term of k3. eˣ is clamped to e^{±20}; beyond, k3 grows by the
    distance |x| - 20.

    Args:
        log_ratio: ℓ. Any shape.
        estimator: "k1", "k2" or "k3".
        sampled_from: The policy that the actions come from: "old" or "new".

    Returns:
        As ``log_ratio``, in nats.

    Raises:
        ValueError: An unknown estimator or policy.
        TypeError: Something that is no floating-point tensor.
    """
    check_tensor("log_ratio", log_ratio)
    _check("estimator", estimator, ESTIMATORS)
    _check("sampled_from", sampled_from, POLICIES)
    x = widened(log_ratio.detach())
    x = x if sampled_from == "old" else -x
    value = -x if estimator == "k1" else 0.5 * x * x if estimator == "k2" else k3(x)
    return narrowed(value, log_ratio.dtype)


def control_variate(log_ratio: Tensor, sampled_from: str = "old", weight: float | None = None) -> Tensor:
    """k1 + weight · (eˣ - 1), x as in ``estimate``: unbiased for every fixed weight, because eˣ - 1 has mean 0.

    A weight of 0 is k1, of 1 is k3 (up to |x| = 20, where eˣ is clamped). The least variance is that of weight
    c* = Cov(x, eˣ) / Var(eˣ), which for a shift of the mean by K nats is 2K / (e^{2K} - 1). ``weight=None`` estimates
    c* for each sample from all *others*: the weight is then independent of the sample that it multiplies, and the mean
    stays unbiased. c* from all samples together would bias it. Where the others are equal, to rounding, it is 0.

    Args:
        log_ratio: ℓ of independent samples. Any shape; for ``weight=None`` at least 3 of them.
        sampled_from: "old" (estimates F) or "new" (estimates R).
        weight: A fixed weight, or None for the best one.

    Returns:
        As ``log_ratio``, in nats, to be averaged. No gradient.

    Raises:
        ValueError: An unknown policy; too few samples.
        TypeError: Something that is no floating-point tensor.
    """
    check_tensor("log_ratio", log_ratio)
    _check("sampled_from", sampled_from, POLICIES)
    x = widened(log_ratio.detach())
    x = x if sampled_from == "old" else -x
    variate = torch.expm1(x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if weight is not None:
        return narrowed(-x + weight * variate, log_ratio.dtype)
    if x.numel() < 3:
        raise ValueError(f"log_ratio must have at least 3 samples to estimate the best weight, got {x.numel()}")
    groups = x.unsqueeze(-1), variate.unsqueeze(-1)  # of one sample each
    return narrowed(-x + _weight_of_others(*groups, torch.ones_like(groups[0])) * variate, log_ratio.dtype)


def loss(log_ratio: Tensor, direction: str = "old_new", sampled_from: str = "old", form: str = "k3") -> Tensor:
    """A term for each sample whose gradient is that of the KL, exactly, in expectation.

    The mean of coefficient · g over the samples is ∇F for "old_new" and ∇R for "new_old":

    =========  =======  ====  ==================  ===============  ==========================================
    direction  samples  form  value               coefficient      remark
    =========  =======  ====  ==================  ===============  ==========================================
    old_new    old      k1    -ℓ                  -1               PPO's maximum likelihood
    old_new    old      k3    (r - 1) - ℓ         r - 1            0 at equality
    new_old    old      k1    r ℓ                 r (ℓ + 1)        importance weights
    new_old    old      k2    r ½ℓ²               r ℓ              r is a weight: it has no gradient
    new_old    old      k3    r ℓ - (r - 1)       r ℓ
    new_old    new      k1    ℓ                   ℓ                the score-function form; the gradient of ℓ
                                                                   alone has the mean 0
    new_old    new      k2    ½ℓ²                 ℓ                the same gradient, another value
    new_old    new      k3    (1/r - 1) + ℓ       ℓ                k3 and its score-function term
    old_new    new      k1    -ℓ / r              -1/r             importance weights
    old_new    new      k3    (1/r - 1) + ℓ       1 - 1/r          k3 without that term: the *other* direction;
                                                                   its value estimates R
    =========  =======  ====  ==================  ===============  ==========================================

    For samples of the old policy, k3 plus "ℓ ∇ log π" (a term that belongs to new samples) would have the gradient
    of about 2 F; ½ℓ² has the gradient of neither.

    Args:
        log_ratio: ℓ, with a gradient to the new policy. Any shape.
        direction: The KL whose gradient is wanted: "old_new" or "new_old".
        sampled_from: The policy that the actions come from: "old" or "new".
        form: "k1", "k2" or "k3".

    Returns:
        As ``log_ratio``, in nats, to be averaged and minimised. r is clamped to e^{±20}; beyond, the value of k3 grows
        by the distance |ℓ| - 20 (of "new_old" from old samples: by r times it). Of an infinite ℓ it is infinite; NaN
        for k1 of "new_old" at -∞, where value and slope are -∞. First derivatives only: the coefficient is a constant
        to autograd, so that a second derivative is wrong, and not refused.

    Raises:
        ValueError: An unknown name, or a form that has not this gradient.
        TypeError: Something that is no floating-point tensor.
    """
    check_tensor("log_ratio", log_ratio)
    return kl_loss(log_ratio, _which_loss(direction, sampled_from, form))


def gaussian_loss(
    actions: Tensor,
    mean: Tensor,
    std: Tensor,
    old_log_prob: Tensor,
    direction: str = "old_new",
    sampled_from: str = "old",
    form: str = "k3",
    *,
    backend: str | None = None,
) -> Tensor:
    """``loss`` of a diagonal Gaussian policy: log-ratio, value and coefficient in one pass, all gradients in another.

    ℓ is log N(actions; mean, std²) - old_log_prob. Where the old policy is a Gaussian too, ``gaussian`` is exact and
    has no action noise; this is for an old policy of which only the log-probability is known.

    Args:
        actions: [N, A]; any leading dimensions. They count as given: no gradient.
        mean: [N, A].
        std: [A] or [N, A], > 0. An expanded view as in ``ppo_loss``.
        old_log_prob: [N], no gradient.
        direction: As in ``loss``.
        sampled_from: As in ``loss``.
        form: As in ``loss``.
        backend: As in ``gaussian_log_prob``.

    Returns:
        [N], in nats, to be averaged and minimised. First derivatives only, of mean and std: a second one is refused,
        but by the eager backend, under torch.compile and in torch.func, where it is wrong, as that of ``loss``.

    Raises:
        ValueError: An unknown name, or a form that has not this gradient.
        ValueError, TypeError, RuntimeError: As ``ppo_loss``.
    """
    which = _which_loss(direction, sampled_from, form)
    return gaussian_kl_loss(actions, mean, std, old_log_prob, which, backend=backend)


def _which_loss(direction: str, sampled_from: str, form: str) -> int:
    """Its place in ``KL_LOSSES``."""
    _check("direction", direction, KL_DIRECTIONS)
    _check("sampled_from", sampled_from, POLICIES)
    _check("form", form, ESTIMATORS)
    if (direction, sampled_from, form) not in KL_LOSSES:
        raise ValueError(
            "form 'k2' has not the gradient of KL(old‖new), "
            f"from samples of the {sampled_from} policy; use 'k1' or 'k3'"
        )
    return KL_LOSSES.index((direction, sampled_from, form))


# --- sequences --------------------------------------------------------------------------------------------------------


def sequence_loss(
    log_ratio: Tensor,
    direction: str = "new_old",
    sampled_from: str = "new",
    *,
    step_kl: Tensor | None = None,
    mask: Tensor | None = None,
    weight: float | None = 0.0,
) -> Tensor:
    """A term for each sequence whose gradient is that of the KL of whole sequences, exactly, in expectation.

    A sequence's log-ratio is the sum of its steps', and its KL is Σ_t of the expected step KLs. Two cases are exact
    without products of ratios, whose variance explodes with the length:

    - old samples, "old_new": the states do not depend on the new policy, so steps count for themselves: -Σ_t ℓ_t, or
      Σ_t KL_t with the steps' exact KLs (Rao-Blackwell: no action noise). This is T times the mean over the rollout's
      states that PPO uses.
    - new samples, "new_old": an action changes the states that follow, so step t answers for all that comes: the
      coefficient of g_t is Σ_{s≥t} ℓ_s (reward-to-go); with the exact KLs the gradient is
      Σ_t [∇KL_t + (Σ_{s>t} KL_s) g_t] (arXiv 2504.10637), of smaller variance.

    Without exact KLs, ``weight`` adds the control variate weight · (eˣ - 1), x = -ℓ for new samples, to the steps that
    come after: its mean is 0 whatever came before, so the gradient stays exact, and with 1 the sum of the later steps
    is one of k3. (On the step itself it would not be one: (eˣ - 1) g has the mean -∇KL(old‖new).) For old samples it is
    in the value only.

    Args:
        log_ratio: ℓ_t, with a gradient to the new policy. [..., T].
        direction: "new_old" or "old_new".
        sampled_from: "new" or "old".
        step_kl: The exact KL of each step in this direction, with its gradient. [..., T].
        mask: Which steps count; padding is False. What stands there does not matter, not even NaN. [..., T].
        weight: Of the control variate: 0 for none, or None for the best for the value, found for each sequence from
            all *others*, so without bias. No use with ``step_kl``.

    Returns:
        One term per sequence, in nats, to be averaged and minimised: [...]. Its value estimates the sequence KL,
        without bias.

    Raises:
        ValueError: An unknown name or a shape that does not fit; a direction that these samples do not give; fewer
            than 2 sequences for ``weight=None``.
        TypeError: Something that is no tensor of a type that fits.
    """
    check_tensor("log_ratio", log_ratio)
    if log_ratio.dim() == 0:
        raise ValueError("log_ratio must be [..., T], got a 0-dim tensor")
    _check("direction", direction, KL_DIRECTIONS)
    _check("sampled_from", sampled_from, POLICIES)
    if (direction == "old_new") != (sampled_from == "old"):
        raise ValueError(
            f"direction {direction!r} from samples of the {sampled_from} policy needs products of ratios over the "
            "whole sequence, whose variance explodes; sample the other policy, or use loss() per step"
        )
    if step_kl is not None:
        check_tensor("step_kl", step_kl)
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    for name, t in (("step_kl", step_kl), ("mask", mask)):
        if t is not None and t.shape != log_ratio.shape:
            raise ValueError(f"{name} must have the shape {list(log_ratio.shape)}, got {list(t.shape)}")
    terms = _sequence_terms(
        widened(log_ratio), sampled_from, None if step_kl is None else widened(step_kl), mask, weight
    )
    dtype = log_ratio.dtype if step_kl is None else torch.promote_types(log_ratio.dtype, step_kl.dtype)
    return narrowed(terms.detach(), dtype) + without_value(terms).to(dtype)  # a limit would have no gradient


def _sequence_terms(
    log_ratio: Tensor, sampled_from: str, step_kl: Tensor | None, mask: Tensor | None, weight: float | None
) -> Tensor:
    if mask is not None:
        keep = mask != 0
        log_ratio = torch.where(keep, log_ratio, 0.0)
        step_kl = None if step_kl is None else torch.where(keep, step_kl, 0.0)
    x = log_ratio.detach()
    if step_kl is None:
        variate = _step_variates(-x if sampled_from == "new" else x, mask, weight)
        if sampled_from == "old":
            return (variate - log_ratio).sum(-1)
        later = x + _to_come(x + variate)  # with this step's ℓ, without its control variate
        return (x + variate + later * (log_ratio - x)).sum(-1)
    if sampled_from == "old":
        return step_kl.sum(-1)
    return (step_kl + _to_come(step_kl.detach()) * (log_ratio - x)).sum(-1)


def _step_variates(x: Tensor, mask: Tensor | None, weight: float | None) -> Tensor:
    """weight · (eˣ - 1), of mean 0 in each step; the best weight if that is None. [..., T]."""
    variate = torch.expm1(x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if weight is not None:
        return weight * variate
    if x.dim() < 2 or x.numel() == x.shape[-1]:
        raise ValueError("log_ratio must have at least 2 sequences to estimate the best weight from the others, got 1")
    steps = torch.ones_like(x) if mask is None else (mask != 0).to(x.dtype)
    # all that is 0 in padding: sums over the steps of a sequence
    return _weight_of_others(x, variate, steps).unsqueeze(-1) * variate


def _weight_of_others(x: Tensor, variate: Tensor, count: Tensor) -> Tensor:
    """c* = Cov(x, variate) / Var(variate) for each group [...], from the samples of all *other* groups.

    0 where their variance is not above its rounding.

    Args:
        x: [..., T], one group in the last dimension; 0 where there is no sample.
        variate: [..., T], 0 where there is no sample.
        count: [..., T], 1 for each sample.
    """

    def mean_of_others(t: Tensor) -> Tensor:
        sums = t.sum(-1)
        return (sums.sum() - sums) / others

    total = count.sum()
    others = total - count.sum(-1)
    # the weight is the same wherever x and variate are 0; at their means no large squares cancel
    centre_x, centre_v = x.sum() / total, variate.sum() / total
    x, variate = (x - centre_x) * count, (variate - centre_v) * count
    mean_x, mean_v, squares = mean_of_others(x), mean_of_others(variate), variate.square()
    covariance = mean_of_others(x * variate) - mean_x * mean_v
    variance = mean_of_others(squares) - mean_v.square()
    eps = torch.finfo(x.dtype).eps
    # of the samples themselves, and of the sum of all, from which each group's is taken away
    rounding = (4.0 * eps * centre_v).square() + 32.0 * eps * squares.sum() / others
    return torch.where(variance > rounding, covariance / variance, 0.0)


def _to_come(x: Tensor) -> Tensor:
    """Σ_{s>t} x_s along the last dimension."""
    return pad(x.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))


# --- exact forms ------------------------------------------------------------------------------------------------------


def categorical(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p‖q) of two categorical distributions: never negative, 0 at equality, accurate however close p and q are.

    Σ p φ(d) with d = log(q/p) and φ(x) = eˣ - 1 - x: the same as Σ p log(p/q), because Σ q - Σ p = 0, but no two large
    terms cancel. Nor do they in d, where all logits differ alike, to less than 1: with D = logits_q - logits_p less its
    mean Σ p D, q is p e^D over its sum, so that d = D - log Σ p e^D = D - log1p(Σ p (e^D - 1)).

    Args:
        logits_p: Unnormalised log-probabilities; -inf for what cannot happen. [..., C]. A p that is rounded to 0, where
            a logit is 104 below the others (746 in float64) or masked with -1e9, cannot happen either.
        logits_q: [..., C]; leading dimensions broadcast. The KL is infinite where q cannot do what p can. What p cannot
            do adds no more than q's probability of it, whatever it is.

    Returns:
        [...], in nats, with gradients for both. NaN where p or q is no distribution: NaN or +inf among its logits, or
        nothing but -inf.

    Raises:
        ValueError: A shape or device that does not fit; no categories.
        TypeError: Something that is no floating-point tensor.
    """
    _check_logits(logits_p, logits_q)
    return narrowed(_categorical(logits_p, logits_q), torch.promote_types(logits_p.dtype, logits_q.dtype))


def _categorical(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    logits_p, logits_q = widened(logits_p), widened(logits_q)
    log_p, log_q = torch.log_softmax(logits_p, -1), torch.log_softmax(logits_q, -1)
    p, q = log_p.exp(), log_q.exp()
    possible = p != 0.0  # NaN is
    matters = possible | (q != 0.0)
    # each selection also before the function that it chooses from: its gradient elsewhere can be NaN, and 0 NaN is, too
    step = torch.where(matters, logits_q - logits_p, 0.0)
    with torch.no_grad():  # d has no derivative by what all logits share
        mean = (p * step).sum(-1, keepdim=True)
        back = step - logits_q  # Knuth's two-sum: what the difference was rounded by is all that is left of a small one
        rounding = (logits_q - (step - back)) - (logits_p + back)
    step = torch.where(matters, (step - mean) + rounding, 0.0)
    close = (step.abs() < 1.0).all(-1, keepdim=True)
    step = torch.where(close, step, 0.0)
    d = torch.where(close, step - torch.log1p((p * torch.expm1(step)).sum(-1, keepdim=True)), log_q - log_p)
    d = torch.where(possible, d, 0.0)
    near = d.abs() < 0.5
    term = torch.where(near, p * expm1_minus(torch.where(near, d, 0.0)), (q - p) - p * d)
    return torch.where(possible, term, q).sum(-1)


def multi_categorical(logits_p: Tensor, logits_q: Tensor, sizes: list[int]) -> Tensor:
    """KL(p‖q) of independent categorical distributions side by side: the sum of theirs.

    Args:
        logits_p: The distributions' logits one after the other. [..., Σ sizes].
        logits_q: [..., Σ sizes]; leading dimensions broadcast.
        sizes: The number of categories of each, as ``MultiDiscrete.nvec``.

    Returns:
        [...], in nats.

    Raises:
        ValueError: The sizes do not add up; there are none, or one is not positive; as ``categorical``.
        TypeError: ``sizes`` that are no integers; as ``categorical``.
    """
    try:
        sizes = [operator.index(n) for n in sizes]
    except TypeError:
        raise TypeError(f"sizes must be a list of integers, as MultiDiscrete.nvec, got {sizes!r}") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be one or more positive numbers, got {sizes}")
    _check_logits(logits_p, logits_q)
    if logits_p.shape[-1] != sum(sizes):
        raise ValueError(
            f"logits_p must have {sum(sizes)} = sum of sizes in its last dimension, got {logits_p.shape[-1]}"
        )
    parts = zip(logits_p.split(sizes, -1), logits_q.split(sizes, -1), strict=True)
    first, *others = [_categorical(p, q) for p, q in parts]
    return narrowed(sum(others, first), torch.promote_types(logits_p.dtype, logits_q.dtype))


def _check_logits(logits_p: Tensor, logits_q: Tensor) -> None:
    for name, t in (("logits_p", logits_p), ("logits_q", logits_q)):
        check_tensor(name, t)
        if t.dim() == 0 or t.shape[-1] == 0:
            raise ValueError(f"{name} must be [..., C] with at least one category, got shape {list(t.shape)}")
    if logits_q.device != logits_p.device:
        raise ValueError(f"logits_q is on {logits_q.device}, logits_p on {logits_p.device}")
    if logits_q.shape[-1] != logits_p.shape[-1]:
        raise ValueError(
            f"logits_q must have {logits_p.shape[-1]} categories, as logits_p has, got {logits_q.shape[-1]}"
        )
    for size_p, size_q in zip(reversed(logits_p.shape[:-1]), reversed(logits_q.shape[:-1]), strict=False):
        if size_p != size_q and size_p != 1 and size_q != 1:
            raise ValueError(
                f"logits_q must have leading dimensions that fit those of logits_p, {list(logits_p.shape)}, "
                f"got {list(logits_q.shape)}"
            )


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
