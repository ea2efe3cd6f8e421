"""Adam's step with clipped gradients, of every backend that has it, against torch's own in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn as nn
from backends_here import AVAILABLE
from torch import Tensor

from pyfast_ppo import backends
from pyfast_ppo.ops.adam import AdamRow, AdamRule, adam_step

PLAIN = AdamRule(0.9, 0.999, 1e-8, 0.0, False)
RULES = {
    "adam": PLAIN,
    "decay": AdamRule(0.8, 0.99, 1e-6, 0.1, False),
    "adamw": AdamRule(0.9, 0.999, 1e-8, 0.05, True),
}
SHAPES = [(1,), (3,), (1024,), (1025,), (4096, 3), (0,), (2, 3, 5), (8192,), (8193,)]  # around blocks and chunks
RATE = 3e-3


@pytest.fixture(params=[row.name for row in AVAILABLE if backends._module(row.name).FUSES_UPDATE])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"


class Case:
    """Two modules with parameters of awkward shapes, gradients of two sizes, and a state as after some steps."""

    def __init__(self, device: str, taken: int = 7, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.sizes = [3.0, 1e-3]  # the first module's gradients are to be clipped, the second's not
        self.modules = [nn.ParameterList(nn.Parameter(torch.randn(s, generator=g).to(device)) for s in SHAPES)] * 1
        self.modules.append(
            nn.ParameterList(nn.Parameter(torch.randn(s, generator=g).to(device)) for s in [(5, 7), (6,)])
        )
        self.states: dict[Tensor, dict[str, Tensor]] = {}
        for size, module in zip(self.sizes, self.modules, strict=True):
            for p in module:
                p.grad = (size * torch.randn(p.shape, generator=g)).to(device)
                self.states[p] = {
                    "exp_avg": (0.1 * torch.randn(p.shape, generator=g)).to(device),
                    "exp_avg_sq": (0.1 * torch.rand(p.shape, generator=g)).to(device),
                    "step": torch.tensor(float(taken), device=device),
                }

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module]

    def rows(self) -> list[AdamRow]:
        return [
            AdamRow(p, *(self.states[p][name] for name in ("exp_avg", "exp_avg_sq", "step")), i)
            for i, module in enumerate(self.modules)
            for p in module
        ]

    def step(self, backend: str, rule: AdamRule = PLAIN, **options: object) -> Tensor | None:
        defaults = {"max_norm": 1.0, "rate": RATE, "skip": None, "skip_nonfinite": True}
        kernels = backends.select(backend, self.parameters[0].device)
        return adam_step(self.rows(), rule, **{**defaults, **options}, backend=kernels)

    def everything(self) -> list[Tensor]:
        return [t.detach().clone() for p in self.parameters for t in (p, p.grad, *self.states[p].values())]


def exact(case: Case, rule: AdamRule, max_norm: float, rate: float) -> list[Tensor]:
    """What torch makes of it, in float64, in the order of ``Case.everything``."""
    modules = [[nn.Parameter(p.detach().cpu().double()) for p in module] for module in case.modules]
    parameters = [p for module in modules for p in module]
    for p, of in zip(parameters, case.parameters, strict=True):
        p.grad = of.grad.cpu().double()
    kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    optimizer = kind(parameters, lr=rate, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay)
    for p, of in zip(parameters, case.parameters, strict=True):
        state = {name: t.cpu().double() for name, t in case.states[of].items()}
        optimizer.state[p] = {**state, "step": state["step"].float()}
    for module in modules:
        nn.utils.clip_grad_norm_(module, max_norm)
    optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "step")
    return [t.detach() for p in parameters for t in (p, p.grad, *(optimizer.state[p][name] for name in names))]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    """Each number to four units in the last place of the largest of its tensor."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a.cpu().double() - b).abs().max() <= 5e-7 * b.abs().max()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("taken", [0, 7, 100_000])
def test_against_torch_in_float64(backend: str, device: str, rule: AdamRule, taken: int) -> None:
    case = Case(device, taken)
    want = exact(case, rule, 1.0, RATE)
    before = case.everything()
    lost = case.step(backend, rule)
    assert not lost
    assert_close(case.everything(), want)
    assert not torch.equal(before[1], case.parameters[0].grad)  # clipped, as torch leaves it
    assert torch.equal(case.parameters[-1].grad, before[-4])


@pytest.mark.parametrize("max_norm", [1e-3, 1e6, math.inf])
def test_the_clip(backend: str, device: str, max_norm: float) -> None:
    case = Case(device)
    want = exact(case, PLAIN, max_norm, RATE)
    case.step(backend, max_norm=max_norm)
    assert_close(case.everything(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rate_may_be_a_tensor(backend: str, device: str, dtype: torch.dtype) -> None:
    case, other = Case(device), Case(device)
    case.step(backend, rate=torch.tensor(0.25, dtype=dtype, device=device))
    other.step(backend, rate=0.25)
    assert all(map(torch.equal, case.everything(), other.everything()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_a_step_that_is_lost_changes_nothing(backend: str, device: str, value: float, place: int) -> None:
    """Whichever module the number is in; and the next one is taken."""
    case = Case(device)
    gradient = case.parameters[place].grad
    kept = gradient.flatten()[0].clone()
    gradient.view(-1)[0] = value
    before = case.everything()
    lost = case.step(backend)
    assert lost.dtype == torch.bool
    assert lost.shape == ()
    assert bool(lost)
    assert all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(case.everything(), before, strict=True)
    )
    gradient.view(-1)[0] = kept
    want = exact(case, PLAIN, 1.0, RATE)
    assert not case.step(backend)
    assert_close(case.everything(), want)


def test_a_norm_that_is_nan_may_be_ignored(backend: str, device: str) -> None:
    """Then a module's parameters become NaN, as torch makes them, and the other's do not."""
    case = Case(device)
    case.parameters[0].grad.fill_(math.nan)
    assert not case.step(backend, skip_nonfinite=False)
    assert all(p.isnan().all() for p in case.modules[0])
    assert all(p.isfinite().all() for p in case.modules[1])


@pytest.mark.parametrize("skip", [True, False])
def test_a_step_that_is_to_be_skipped(backend: str, device: str, skip: bool) -> None:
    case = Case(device)
    want = case.everything() if skip else exact(case, PLAIN, 1.0, RATE)
    assert not case.step(backend, skip=torch.tensor(skip, device=device))
    assert_close(case.everything(), [t.cpu().double() for t in want])


def test_parameters_without_gradients_are_left_alone(backend: str, device: str) -> None:
    case = Case(device)
    case.parameters[3].grad = case.parameters[-2].grad = None
    kept = [case.parameters[i].detach().clone() for i in (3, -2)]
    case.step(backend)
    assert torch.equal(case.parameters[3], kept[0])
    assert torch.equal(case.parameters[-2], kept[1])
    steps = [float(case.states[p]["step"]) for p in case.parameters]
    assert steps.count(7.0) == 2
    assert steps.count(8.0) == len(steps) - 2


@pytest.mark.parametrize("module", [0, 1])
def test_a_module_without_gradients(backend: str, device: str, module: int) -> None:
    """Before one that has some, or after it: the other's norm is its own."""
    case, other = Case(device), Case(device)
    for p in case.modules[module]:
        p.grad = None
    kept = [p.detach().clone() for p in case.modules[module]]
    case.step(backend, max_norm=1e-3)
    other.step(backend, max_norm=1e-3)
    assert all(map(torch.equal, kept, case.modules[module]))
    assert all(map(torch.equal, case.modules[1 - module], other.modules[1 - module]))


def test_as_many_tensors_as_may_be(backend: str, device: str) -> None:
    case = Case(device)
    with_tensors(case, 64)
    want = exact(case, PLAIN, 1.0, RATE)
    assert not case.step(backend)
    assert_close(case.everything(), want)


def test_the_same_bits_every_time(backend: str, device: str, restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        case = Case(device)
        for _ in range(2):
            case.step(backend)
        results.append(case.everything())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_memory_that_is_not_aligned(backend: str, device: str) -> None:
    """A gradient in the middle of another tensor."""
    case, other = Case(device), Case(device)
    for p in case.parameters:
        memory = torch.zeros(p.numel() + 1, device=device)
        p.grad = memory[1:].view(p.shape).copy_(p.grad)
    case.step(backend)
    other.step(backend)
    assert_close(case.everything(), [t.cpu().double() for t in other.everything()])


def transposed(case: Case) -> None:
    p = case.parameters[4]
    p.grad = p.grad.t().contiguous().t()


def without_state(case: Case) -> None:
    case.states[case.parameters[1]] = dict.fromkeys(("exp_avg", "exp_avg_sq", "step"))


def in_bfloat16(case: Case) -> None:
    case.states[case.parameters[0]]["exp_avg"] = case.states[case.parameters[0]]["exp_avg"].bfloat16()


def of_another_size(case: Case) -> None:
    case.states[case.parameters[0]]["exp_avg_sq"] = torch.zeros(2, device=case.parameters[0].device)


def with_tensors(case: Case, count: int) -> None:
    for _ in range(count - len(case.parameters)):
        p = nn.Parameter(torch.zeros(2, device=case.parameters[0].device))
        p.grad = torch.ones_like(p)
        case.states[p] = {**{n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")}, "step": torch.zeros(()).to(p)}
        case.modules[1].append(p)


def too_many(case: Case) -> None:
    with_tensors(case, 65)


def empty(case: Case) -> None:
    for p in case.parameters:
        if p.numel():
            p.grad = None


def without_memory(case: Case) -> None:
    """As a DTensor, whose numbers lie in another tensor."""

    class Wrapper(torch.Tensor):
        def data_ptr(self) -> int:
            return 0

    state = case.states[case.parameters[0]]
    state["exp_avg"] = state["exp_avg"].as_subclass(Wrapper)


def tagged_in_float64(case: Case) -> None:
    """Of another dtype, and read through its methods."""

    class Tagged(torch.Tensor):
        pass

    state = case.states[case.parameters[0]]
    state["exp_avg"] = state["exp_avg"].double().as_subclass(Tagged)


def no_gradients(case: Case) -> None:
    for p in case.parameters:
        p.grad = None


NOT_TAKEN = [transposed, without_state, in_bfloat16, tagged_in_float64, without_memory, of_another_size, too_many]


@pytest.mark.parametrize("change", [*NOT_TAKEN, empty, no_gradients])
def test_what_is_not_taken_is_not_touched(backend: str, device: str, change) -> None:
    case = Case(device)
    change(case)
    before = copy.deepcopy([p.detach() for p in case.parameters])
    assert case.step(backend) is None
    assert all(map(torch.equal, before, case.parameters))


def test_tensors_that_dlpack_does_not_show(backend: str, device: str) -> None:
    """A subclass of Parameter is read through its methods, with the same result."""

    class Tagged(nn.Parameter):
        pass

    case, other = Case(device), Case(device)
    states = list(other.states.values())
    for module in other.modules:
        for i, p in enumerate(module):
            gradient, module[i] = p.grad, Tagged(p.detach())
            module[i].grad = gradient
    assert all(type(p) is Tagged for p in other.parameters)
    other.states = dict(zip(other.parameters, states, strict=True))
    case.step(backend)
    assert other.step(backend) is not None
    assert all(map(torch.equal, case.everything(), other.everything()))


def test_autograd_hears_of_the_change(backend: str, device: str) -> None:
    case = Case(device)
    y = (case.parameters[0] * case.parameters[0]).sum()
    case.step(backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
