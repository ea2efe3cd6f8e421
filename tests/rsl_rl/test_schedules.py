"""RslRlSchedule against rsl_rl's rule, copied from ``PPO.update`` as a plain function."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_ppo.schedules import RslRlSchedule


def rsl_rl_rule(kl_mean: torch.Tensor, learning_rate: float, desired_kl: float) -> float:
    if kl_mean > desired_kl * 2.0:
        return max(1e-5, learning_rate / 1.5)
    if kl_mean < desired_kl / 2.0 and kl_mean > 0.0:
        return min(1e-2, learning_rate * 1.5)
    return learning_rate


def neighbours(value: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """``value`` in ``dtype``, and two numbers on each side of it."""
    numbers = [torch.tensor(value, dtype=dtype)]
    for end in (torch.inf, -torch.inf):
        t = numbers[0]
        for _ in range(2):
            t = torch.nextafter(t, torch.tensor(end, dtype=dtype))
            numbers.append(t)
    return numbers


def kls(desired_kl: float, dtype: torch.dtype, rng: random.Random) -> list[torch.Tensor]:
    """A random sequence with everything that a KL can be."""
    special = [math.nan, math.inf, 0.0, -0.0, 1e-45, 1e-30, -1e-7, -math.inf, 3e38]
    numbers = [torch.tensor(value, dtype=dtype) for value in special]
    for boundary in (2.0 * desired_kl, desired_kl / 2.0, desired_kl):
        numbers += neighbours(boundary, dtype)
    numbers += [torch.tensor(desired_kl * math.exp(rng.gauss(0.0, 1.5)), dtype=dtype) for _ in range(80)]
    rng.shuffle(numbers)
    return numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_rule_of_rsl_rl_bit_for_bit(dtype: torch.dtype) -> None:
    """With "a step was taken" where rsl_rl asks for a KL above 0: 100 sequences of about 100 KLs."""
    rng = random.Random(0)
    seen = set()
    for _ in range(100):
        desired_kl = rng.choice([0.01, 0.008, 0.016, 1e-4, 0.3, rng.uniform(1e-3, 0.1)])
        expected = rng.choice([1e-3, 5e-4, 1e-2, 1e-5, 3e-6, 2e-2, rng.uniform(1e-5, 1e-2)])
        rate = torch.tensor(expected, dtype=torch.float64)
        schedule = RslRlSchedule(desired_kl)
        for kl in kls(desired_kl, dtype, rng):
            before = expected
            expected = rsl_rl_rule(kl, expected, desired_kl)
            rate = schedule.update(kl, rate, step_taken=bool(kl > 0.0))
            assert rate.dtype == torch.float64
            assert rate.shape == ()
            assert rate.item() == expected, (desired_kl, kl.item(), before)
            seen.add((expected > before) - (expected < before))
    assert seen == {-1, 0, 1}


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_kl_on_the_boundary_changes_nothing(factor: float) -> None:
    schedule, rate = RslRlSchedule(0.25), torch.tensor(1e-3, dtype=torch.float64)
    on, *around = neighbours(0.25 * factor, torch.float32)
    assert schedule.update(on, rate).item() == 1e-3
    assert len({schedule.update(kl, rate).item() for kl in around}) == 2


def test_before_the_first_step_the_rate_does_not_rise_but_may_fall() -> None:
    schedule, rate = RslRlSchedule(0.01), torch.tensor(1e-3, dtype=torch.float64)
    for kl in (0.0, 1e-12, 1e-6, 0.004):
        assert schedule.update(torch.tensor(kl), rate, step_taken=False).item() == 1e-3
        assert schedule.update(torch.tensor(kl), rate, step_taken=True).item() == pytest.approx(1.5e-3)
    assert schedule.update(torch.tensor(0.03), rate, step_taken=False).item() == pytest.approx(1e-3 / 1.5)


def test_an_infinite_kl_never_raises_the_rate() -> None:
    rate = torch.tensor(1e-3, dtype=torch.float64)
    assert RslRlSchedule(0.01).update(torch.tensor(-math.inf), rate).item() == 1e-3
    assert RslRlSchedule(0.01).update(torch.tensor(math.inf), rate).item() == pytest.approx(1e-3 / 1.5)


@pytest.mark.parametrize("step_taken", [True, False])
def test_a_kl_that_is_nan_changes_nothing(step_taken: bool) -> None:
    rate = torch.tensor(1e-3, dtype=torch.float64)
    assert RslRlSchedule(0.01).update(torch.tensor(math.nan), rate, step_taken).item() == 1e-3


def test_the_rate_stays_within_its_bounds() -> None:
    schedule = RslRlSchedule(0.01, min_rate=1e-4, max_rate=2e-3)
    low = high = torch.tensor(1e-3, dtype=torch.float64)
    for _ in range(10):
        low, high = schedule.update(torch.tensor(1.0), low), schedule.update(torch.tensor(1e-4), high)
    assert low.item() == 1e-4
    assert high.item() == 2e-3


def test_the_host_reads_nothing() -> None:
    """On CUDA each read would wait for the device, and a captured graph could not hold it."""
    operators = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    kl, rate = torch.tensor(0.02), torch.tensor(1e-3, dtype=torch.float64)
    with Recorded():
        RslRlSchedule(0.01).update(kl, rate)
    assert operators
    assert "_local_scalar_dense" not in operators


@pytest.mark.parametrize("desired_kl", [-0.01, math.nan])
def test_a_negative_desired_kl_is_refused(desired_kl: float) -> None:
    with pytest.raises(ValueError, match="desired_kl must be 0 or more"):
        RslRlSchedule(desired_kl)


def test_a_desired_kl_of_zero_lowers_the_rate_as_rsl_rl_does() -> None:
    lr = RslRlSchedule(0.0).update(torch.tensor(1e-6), torch.tensor(1e-3, dtype=torch.float64))
    assert lr.item() == rsl_rl_rule(torch.tensor(1e-6), 1e-3, 0.0)
