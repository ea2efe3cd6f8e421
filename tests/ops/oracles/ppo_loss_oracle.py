"""What ppo_loss must return, from rsl_rl's own lines and torch.distributions in float64; no code of pyfast_ppo.

The tests' tolerances are derived here, too: from the arithmetic's rounding and how far a row's log-probability reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

NAMES = (
    "mean",
    "std",
    "values",
    "actions",
    "old_log_prob",
    "old_mean",
    "old_std",
    "advantages",
    "returns",
    "old_values",
)
MATRICES = ("mean", "std", "actions", "old_mean", "old_std")
VECTORS = ("values", "old_log_prob", "advantages", "returns", "old_values")
DIFFERENTIABLE = ("mean", "std", "values")

DEFAULTS: dict[str, Any] = {
    "clip_param": 0.2,
    "value_loss_coef": 1.0,
    "entropy_coef": 0.01,
    "use_clipped_value_loss": True,
    "kl_coef": 0.0,
    "kl_direction": "old_new",
    "num_original": None,
}

Inputs = dict[str, Tensor]

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(
    num_rows: int,
    num_actions: int,
    seed: int = 0,
    *,
    std_per_row: bool = False,
    old_std_per_row: bool = False,
    dtypes: dict[str, torch.dtype] | None = None,
    spread: float = 1.0,
    clip_param: float = 0.2,
    device: str = "cpu",
) -> Inputs:
    """A mini-batch a few steps into an update, no row at a kink of the loss; float32 but for ``dtypes``."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    std_row = spread * torch.exp(0.5 * randn(num_actions))
    std = std_row * torch.exp(0.2 * randn(num_rows, num_actions)) if std_per_row else std_row
    mean = spread * randn(num_rows, num_actions)
    values = 2.0 * randn(num_rows)
    old_shape = (num_rows, num_actions) if old_std_per_row else (num_actions,)
    inputs = {
        "mean": mean,
        "std": std,
        "values": values,
        "actions": mean + std * randn(num_rows, num_actions),
        "old_log_prob": torch.zeros(num_rows, dtype=torch.float64),
        "old_mean": mean + 0.1 * std * randn(num_rows, num_actions),
        "old_std": std_row * torch.exp(0.1 * randn(*old_shape)),
        "advantages": randn(num_rows),
        "returns": values + randn(num_rows),
        "old_values": values + 0.3 * randn(num_rows),
    }
    inputs = {name: t.to((dtypes or {}).get(name, torch.float32)) for name, t in inputs.items()}
    set_log_ratio(inputs, 0.3 * randn(num_rows))
    avoid_kinks(inputs, clip_param)
    return {name: t.to(device) for name, t in inputs.items()}


def log_prob(inputs: Inputs) -> Tensor:
    """log π_new of the actions, in float64. [N]"""
    mean, std, actions = (inputs[name].double() for name in ("mean", "std", "actions"))
    return Normal(mean, std.expand_as(mean), validate_args=False).log_prob(actions).sum(-1)


def set_log_ratio(inputs: Inputs, log_ratio: Tensor) -> None:
    """Sets old_log_prob so that the rows have these log-ratios, up to its rounding."""
    inputs["old_log_prob"] = (log_prob(inputs) - log_ratio).to(inputs["old_log_prob"].dtype)


def avoid_kinks(inputs: Inputs, clip_param: float, margin: float = 0.01) -> None:
    """Moves rows so close to a kink that rounding would decide on which side they are, and which gradient they get."""
    for _ in range(100):
        ratio = torch.exp(log_prob(inputs) - inputs["old_log_prob"].double())
        values, old_values, returns = (inputs[name].double() for name in ("values", "old_values", "returns"))
        step = values - old_values
        clipped = old_values + step.clamp(-clip_param, clip_param)
        near_ratio = ((ratio - 1.0).abs() - clip_param).abs() < margin
        near_step = (step.abs() - clip_param).abs() < margin
        near_tie = (step.abs() > clip_param) & (((values - returns).abs() - (clipped - returns).abs()).abs() < margin)
        if not (near_ratio | near_step | near_tie).any():
            return
        for name, near in (("old_log_prob", near_ratio), ("old_values", near_step), ("returns", near_tie)):
            t = inputs[name]
            moved = t.double() + 0.07 + 2.0 * EPS[t.dtype] * t.double().abs()  # rounding must not take it back
            inputs[name] = torch.where(near, moved.to(t.dtype), t)
    raise AssertionError("some rows stay at a kink")


# --- the oracle -------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    metrics: dict[str, float]
    grad_mean: Tensor  # [N, A]
    grad_std_rows: Tensor  # [N, A], also where std is [A]: the terms of the sum
    grad_values: Tensor  # [N]
    log_ratio_reach: float  # the largest sum of magnitudes that a log-ratio is made of: times eps, its rounding error


def expected(inputs: Inputs, **options: Any) -> Expected:
    """rsl_rl 5.5's PPO.update between the networks and backward(), in float64, with the KL as one more term."""
    o = {**DEFAULTS, **options}
    num_actions = inputs["mean"].shape[-1]
    flat = {name: inputs[name].detach().double().cpu() for name in NAMES}
    for name in ("mean", "actions"):
        flat[name] = flat[name].reshape(-1, num_actions)
    num_rows = flat["mean"].shape[0]
    num_original = num_rows if o["num_original"] is None else o["num_original"]
    for name in VECTORS:
        flat[name] = flat[name].reshape(-1)
    for name in ("std", "old_std"):
        t = flat[name]
        flat[name] = t.expand(num_rows, num_actions) if t.dim() == 1 else t.reshape(-1, num_actions)
    flat["old_mean"] = flat["old_mean"].reshape(-1, num_actions)
    clip_param, value_loss_coef, entropy_coef, kl_coef = (
        float(o[name]) for name in ("clip_param", "value_loss_coef", "entropy_coef", "kl_coef")
    )

    mean, std, values = (flat[name].clone().requires_grad_() for name in DIFFERENTIABLE)
    new = Normal(mean, std, validate_args=False)
    log_ratio = new.log_prob(flat["actions"]).sum(-1) - flat["old_log_prob"]
    ratio = torch.exp(log_ratio)
    surrogate = -flat["advantages"] * ratio
    surrogate_clipped = -flat["advantages"] * torch.clamp(ratio, 1.0 - clip_param, 1.0 + clip_param)
    surrogate_loss = torch.max(surrogate, surrogate_clipped).mean()
    if o["use_clipped_value_loss"]:
        value_clipped = flat["old_values"] + (values - flat["old_values"]).clamp(-clip_param, clip_param)
        value_losses = (values - flat["returns"]).pow(2)
        value_losses_clipped = (value_clipped - flat["returns"]).pow(2)
        value_loss = torch.max(value_losses, value_losses_clipped).mean()
    else:
        value_loss = (flat["returns"] - values).pow(2).mean()
    entropy = new.entropy().sum(-1)[:num_original].mean()
    new_original = Normal(mean[:num_original], std[:num_original], validate_args=False)
    old_original = Normal(flat["old_mean"][:num_original], flat["old_std"][:num_original], validate_args=False)
    pair = (old_original, new_original) if o["kl_direction"] == "old_new" else (new_original, old_original)
    kl = kl_divergence(*pair).sum(-1).mean()
    loss = surrogate_loss + value_loss_coef * value_loss - entropy_coef * entropy + kl_coef * kl
    loss.backward()

    with torch.no_grad():
        metrics = {
            "loss": loss,
            "surrogate": surrogate_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl": kl,
            "approx_kl": ((ratio - 1.0) - log_ratio).mean(),
            "clip_fraction": ((ratio < 1.0 - clip_param) | (ratio > 1.0 + clip_param)).double().mean(),
            "max_ratio": ratio.max(),
            "nonfinite": torch.zeros(()),
        }
        z = (flat["actions"] - mean) / std
        reach = (0.5 * z * z + std.log().abs() + 1.0).sum(-1) + flat["old_log_prob"].abs()
    assert log_ratio.abs().max() < 20.0, "the stock formula is no oracle where exp is clamped"
    numbers = {name: float(value.detach()) for name, value in metrics.items()}
    return Expected(numbers, mean.grad, std.grad, values.grad, float(reach.max()))


# --- calling the operation --------------------------------------------------------------------------------------------


def call_with_autograd(function: Callable, inputs: Inputs, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """(out, the gradients of mean, std and values), by out.loss.backward() on leaves of the same layout."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE}
    out = function(**{**inputs, **leaves}, **options)
    out.loss.backward()
    return out, {name: t.grad for name, t in leaves.items()}


# --- comparison -------------------------------------------------------------------------------------------------------


def arithmetic_eps(inputs: Inputs) -> float:
    """Of float32, or of float64 if one of the tensors is."""
    return EPS[torch.float64 if any(t.dtype == torch.float64 for t in inputs.values()) else torch.float32]


def assert_matches(out: Any, grads: dict[str, Tensor], inputs: Inputs, **options: Any) -> None:
    """Loss, metrics and gradients are those of the oracle on the same (rounded) inputs, to the arithmetic's rounding.

    A log-ratio is a difference of sums: its absolute error is eps times their magnitudes (``log_ratio_reach``), and
    grows as a random walk does with the number of terms that are added one after the other (157 of them: 1.3 eps). That
    is the relative error of the ratio, and of all that is proportional to it. Everything else has a few roundings.
    """
    e = expected(inputs, **options)
    eps = arithmetic_eps(inputs)
    num_actions = inputs["mean"].shape[-1]
    rtol = eps * (8.0 + (1.0 + num_actions**0.5 / 8.0) * e.log_ratio_reach)
    m = e.metrics
    # what sums of mixed sign may lose
    advantage = float(inputs["advantages"].double().abs().mean())
    tolerances = {
        "surrogate": rtol * advantage * m["max_ratio"],
        "value_loss": rtol * m["value_loss"],
        "entropy": rtol * (abs(m["entropy"]) + num_actions),
        "kl": rtol * m["kl"] + 4.0 * EPS[torch.float64] * num_actions,  # torch's KL cancels near 0, in float64, too
        "approx_kl": rtol * (m["approx_kl"] + m["max_ratio"]),
        "clip_fraction": eps,
        "max_ratio": rtol * m["max_ratio"],
        "nonfinite": 0.0,
    }
    o = {**DEFAULTS, **options}
    tolerances["loss"] = (
        tolerances["surrogate"]
        + float(o["value_loss_coef"]) * tolerances["value_loss"]
        + float(o["entropy_coef"]) * tolerances["entropy"]
        + float(o["kl_coef"]) * tolerances["kl"]
        + rtol * abs(m["loss"])
    )
    for name, want in m.items():
        got = getattr(out, name)
        assert got.shape == (), name
        error = abs(float(got.detach()) - want)
        assert error <= tolerances[name], f"{name}: {float(got.detach())} instead of {want} ± {tolerances[name]}"
    assert_gradient("mean", grads["mean"], inputs["mean"], e.grad_mean, rtol)
    assert_gradient("values", grads["values"], inputs["values"], e.grad_values, rtol)
    rows = e.grad_std_rows
    if inputs["std"].dim() == 1:  # the sum over rows is as accurate as its terms
        assert_gradient("std", grads["std"], inputs["std"], rows.sum(0), rtol, scale=float(rows.abs().sum(0).max()))
    else:
        assert_gradient("std", grads["std"], inputs["std"], rows, rtol)


def assert_gradient(
    name: str, got: Tensor | None, of: Tensor, want: Tensor, rtol: float, scale: float | None = None
) -> None:
    """``got`` has shape and dtype of ``of``; each element is right to rtol of itself plus rtol of the largest one."""
    assert got is not None, f"no gradient of {name}"
    assert got.shape == of.shape, f"gradient of {name}: shape {list(got.shape)}, not {list(of.shape)}"
    assert got.dtype == of.dtype, f"gradient of {name}: {got.dtype}, not {of.dtype}"
    scale = float(want.abs().max()) if scale is None else scale
    stored = EPS[got.dtype]  # the gradient is rounded once more, to its tensor's dtype
    smallest = 2.0**-24 if got.dtype == torch.float16 else 0.0
    allowed = (rtol + stored) * want.abs() + rtol * scale + smallest
    error = (got.detach().double().cpu().reshape(want.shape) - want).abs()
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), (
        f"gradient of {name}: {got.flatten()[worst]} instead of {want.flatten()[worst]} "
        f"± {allowed.flatten()[worst]} at flat index {worst}"
    )
