"""The adaptive learning rate of rsl_rl, on every backend, against the lines of rsl_rl's update."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyfast_ppo.ops.learning_rate import adapted_rate

DESIRED = 0.01
RULE = {"desired_kl": DESIRED, "min_rate": 1e-5, "max_rate": 1e-2, "factor": 1.5}
KLS = [0.0, -1e-9, 1e-15, 1e-9, DESIRED / 2, DESIRED, 2 * DESIRED, 1.0, math.nan, math.inf, -math.inf]
BESIDE = [math.nextafter(x, side) for x in (DESIRED / 2, 2 * DESIRED) for side in (0.0, 1.0)]
RATES = [1e-3, 1e-5, 1.2e-5, 1e-2, 9e-3, 1e-6, 0.5, math.nan, math.inf]


def rsl_rl(kl: torch.Tensor, rate: float, rise_above: float, lost: bool) -> float:
    """Floats on the host, the KL compared as torch compares it."""
    following = rate
    if kl > DESIRED * 2.0:
        following = max(1e-5, rate / 1.5)
    elif kl < DESIRED / 2.0 and kl > rise_above:
        following = min(1e-2, rate * 1.5)
    return min(following, max(1e-5, rate / 1.5)) if lost else following


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rise_above", [-math.inf, 0.0, 1e-12, math.inf])
def test_as_rsl_rl(backend: str, device: str, dtype: torch.dtype, rise_above: float) -> None:
    for value, rate, lost in itertools.product([*KLS, *BESIDE], RATES, [None, False, True]):
        kl, present = torch.tensor(value, dtype=dtype), torch.tensor(rate, dtype=torch.float64, device=device)
        flag = None if lost is None else torch.tensor(lost, device=device)
        found = adapted_rate(kl.to(device), present, **RULE, rise_above=rise_above, lost=flag, backend=backend)
        assert found.dtype == torch.float64
        assert found.shape == ()
        want = rsl_rl(kl, rate, rise_above, bool(lost))
        assert float(found) == pytest.approx(want, rel=0.0, abs=0.0, nan_ok=True), (value, rate, lost)
        assert float(present) == pytest.approx(rate, rel=0.0, abs=0.0, nan_ok=True)


@pytest.mark.parametrize("kl", [0.0, DESIRED, 1.0])
def test_a_rate_that_is_nan_is_one_of_torchs_too(backend: str, device: str, kl: float) -> None:
    """A KL in half precision, which no kernel takes, makes of it what rsl_rl does."""
    rate = torch.full((), math.nan, dtype=torch.float64, device=device)
    found = adapted_rate(torch.tensor(kl, dtype=torch.bfloat16, device=device), rate, **RULE, backend=backend)
    assert float(found) == pytest.approx(rsl_rl(torch.tensor(kl), math.nan, -math.inf, False), rel=0.0, nan_ok=True)


@pytest.mark.parametrize("kl_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_other_tensors_are_torchs(backend: str, device: str, kl_dtype: torch.dtype, shape: tuple) -> None:
    """A float32 rate, several rates at a time, a KL in half precision: as before there were kernels for it."""
    kl = torch.full(shape, 0.1, dtype=kl_dtype, device=device)
    rate = torch.full(shape, 1e-3, device=device)
    found = adapted_rate(kl, rate, **RULE, backend=backend)
    assert found.dtype == torch.float32
    assert torch.equal(found, rate / 1.5)


def test_compiles_without_a_break(backend: str, device: str) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def following(kl: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        return adapted_rate(kl, rate, **RULE)

    rate = torch.tensor(1e-3, dtype=torch.float64, device=device)
    assert float(following(torch.tensor(1.0, device=device), rate)) == 1e-3 / 1.5
