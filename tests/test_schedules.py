"""The rules that are not rsl_rl's; its own is in tests/rsl_rl/test_schedules.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_ppo.schedules import (
    AdaptivePenalty,
    EarlyStop,
    ProportionalSchedule,
    RslRlSchedule,
    RslRlScheduleBefore5,
)

DESIRED = 0.01


def number(x: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


@pytest.mark.parametrize(
    ("kl", "change"),
    [
        (DESIRED, 1.0),
        (DESIRED * 1.21, 1 / 1.1),
        (DESIRED / 1.44, 1.2),
        (1e9, 1 / 1.5),
        (0.0, 1.5),
        (-1e-9, 1.5),
        (math.inf, 1 / 1.5),
        (math.nan, 1 / 1.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proportional_rule(kl: float, change: float, dtype: torch.dtype) -> None:
    got = ProportionalSchedule(DESIRED).update(number(kl, dtype), number(1e-3))
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(1e-3 * change, rel=1e-6)


def test_rates_stay_in_their_range() -> None:
    schedule = ProportionalSchedule(DESIRED, min_rate=1e-4, max_rate=1e-3)
    assert schedule.update(number(1.0), number(1.1e-4)).item() == 1e-4
    assert schedule.update(number(1e-9), number(0.9e-3)).item() == 1e-3


@pytest.mark.parametrize(
    ("kl", "change"),
    [(DESIRED, 1.0), (DESIRED * 1.4, 1.0), (DESIRED * 1.6, 2.0), (DESIRED / 1.4, 1.0), (DESIRED / 1.6, 0.5),
     (0.0, 0.5), (math.inf, 2.0), (math.nan, 2.0)],
)  # fmt: skip
def test_adaptive_penalty(kl: float, change: float) -> None:
    assert AdaptivePenalty(DESIRED).update(number(kl), number(0.25)).item() == 0.25 * change


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [AdaptivePenalty(DESIRED), ProportionalSchedule(DESIRED), RslRlSchedule(DESIRED)])
def test_the_state_keeps_its_dtype(rule: object, dtype: torch.dtype, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for kl in (0.0, DESIRED, 1.0, math.nan):
            assert rule.update(number(kl, torch.float32), number(1e-3, dtype)).dtype == dtype
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("kl", "stops"),
    [(DESIRED, False), (0.0, False), (-1.0, False), (DESIRED * 1.1, True), (math.inf, True), (-math.inf, True),
     (math.nan, True)],
)  # fmt: skip
def test_early_stop(kl: float, stops: bool) -> None:
    rule = EarlyStop(DESIRED)
    stopped = rule.update(number(kl), None)
    assert stopped.item() is stops
    assert rule.update(number(0.0), stopped).item() is stops
    assert EarlyStop(math.inf).update(number(kl), None).item() is not math.isfinite(kl)


def test_adaptive_penalty_can_always_recover() -> None:
    rule = AdaptivePenalty(DESIRED, min_coef=0.1, max_coef=10.0)
    coef = number(1.0)
    for _ in range(50):
        coef = rule.update(number(0.0), coef)
    assert coef.item() == pytest.approx(0.1)
    for _ in range(50):
        coef = rule.update(number(1.0), coef)
    assert coef.item() == 10.0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "rule",
    [RslRlSchedule(DESIRED), RslRlScheduleBefore5(DESIRED), ProportionalSchedule(DESIRED), AdaptivePenalty(DESIRED)],
)
def test_no_graph_is_kept(rule: object, compiled: bool) -> None:
    """A state that is fed back would hang on the graphs of all updates before."""
    update = rule.update
    if compiled:
        torch.compiler.reset()
        update = torch.compile(update, fullgraph=True, backend="aot_eager")
    for needs in ((True, False), (False, True), (True, True)):
        kl, state = (number(x).requires_grad_(need) for x, need in zip((0.02, 1e-3), needs, strict=True))
        got = update(kl, state)
        assert not got.requires_grad
        assert torch.equal(got, rule.update(kl.detach(), state.detach()))


@pytest.mark.parametrize("rule", [ProportionalSchedule(DESIRED), AdaptivePenalty(DESIRED)])
def test_no_rule_reads_a_number_on_the_host(rule: object) -> None:
    """On a GPU that would wait for it, and could not be captured."""
    kl, state = number(0.02), number(1e-3)

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    with Refuse():
        rule.update(kl, state)
    with Refuse(), pytest.raises(AssertionError):
        kl.item()


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        (RslRlSchedule(DESIRED), "lr"),
        (RslRlScheduleBefore5(DESIRED), "lr"),
        (ProportionalSchedule(DESIRED), "lr"),
        (AdaptivePenalty(DESIRED), "coef"),
        (EarlyStop(DESIRED), None),
    ],
)
def test_numbers_of_the_host_are_refused(rule: object, state: str | None) -> None:
    with pytest.raises(TypeError, match=r"^kl must be a tensor, got float; convert it with torch.as_tensor\(kl, "):
        rule.update(0.02, None if state is None else number(1e-3))
    if state is not None:
        with pytest.raises(TypeError, match=rf"^{state} must be a tensor, got float; .* torch.as_tensor\({state}, "):
            rule.update(number(0.02), 1e-3)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^desired_kl must be positive, got 0.0"):
        ProportionalSchedule(0.0)
    with pytest.raises(ValueError, match=r"^factor must be greater than 1, got 1.0"):
        ProportionalSchedule(DESIRED, factor=1.0)
    with pytest.raises(ValueError, match=r"^desired_kl must be positive, got nan"):
        AdaptivePenalty(float("nan"))
    for rule in (RslRlSchedule, RslRlScheduleBefore5, ProportionalSchedule):
        with pytest.raises(ValueError, match=r"^min_rate must not be above max_rate, got 0.01 and 0.001"):
            rule(DESIRED, 1e-2, 1e-3)
    with pytest.raises(ValueError, match=r"^min_coef must not be above max_coef, got 2.0 and 1.0"):
        AdaptivePenalty(DESIRED, 2.0, 1.0)
