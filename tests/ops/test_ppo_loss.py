"""Values and gradients of ppo_loss against the stock formula in float64, over shapes, layouts, dtypes and options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from backends_here import rows_that_it_can
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_loss_oracle import (
    DIFFERENTIABLE,
    MATRICES,
    NAMES,
    VECTORS,
    Inputs,
    assert_gradient,
    assert_matches,
    avoid_kinks,
    call_with_autograd,
    expected,
    make_inputs,
    set_log_ratio,
)
from torch import Tensor

from pyfast_ppo import PPOLossOutput, ppo_loss, ppo_loss_and_grad, ppo_loss_reference
from pyfast_ppo.reference import METRICS

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)

OPTIONS = st.fixed_dictionaries(
    {
        "clip_param": st.sampled_from([0.1, 0.2, 0.3]),
        "value_loss_coef": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "entropy_coef": st.sampled_from([0.0, 0.01, 1.0]),
        "use_clipped_value_loss": st.booleans(),
        "kl_coef": st.sampled_from([0.0, 0.0, 0.3, 2.0]),
        "kl_direction": st.sampled_from(["old_new", "new_old"]),
    }
)


def rows_near_borders(num_actions: int) -> list[int]:
    """Numbers of rows on both sides of where kernels cut: vectors of 16, tiles of 1024 elements, chunks of 4 tiles;
    on the GPU tiles of 1536 elements."""
    tile = min(1024 // num_actions, 256)
    tile = max(tile - tile % 16 if tile >= 16 else tile, 1)
    gpu_tile = min(1536 // num_actions, 384)
    around = (tile, 4 * tile, 8 * tile, gpu_tile - gpu_tile % 4, 4 * gpu_tile)
    return sorted({1, 2, 15, 16, 17} | {n + d for n in around for d in (-1, 0, 1) if n + d > 0})


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int]:
    num_actions = draw(st.one_of(st.integers(1, 40), st.integers(1, 300)))
    num_rows = draw(st.one_of(st.integers(1, 100), st.sampled_from(rows_near_borders(num_actions))))
    return num_rows, num_actions


# --- the oracle's own standing ----------------------------------------------------------------------------------------


@given(
    shape=shapes(), options=OPTIONS, std_per_row=st.booleans(), original=st.floats(0.0, 1.0), seed=st.integers(0, 99)
)
@settings(SETTINGS, max_examples=40)
def test_reference_is_the_stock_formula(
    shape: tuple[int, int], options: dict, std_per_row: bool, original: float, seed: int
) -> None:
    """In float64 the two agree to the last digits, so that they are the same function."""
    inputs = make_inputs(
        *shape,
        seed,
        std_per_row=std_per_row,
        old_std_per_row=bool(seed % 2),
        dtypes=dict.fromkeys(NAMES, torch.float64),
        clip_param=options["clip_param"],
    )
    options["num_original"] = max(1, round(original * shape[0]))
    assert_matches(*call_with_autograd(ppo_loss_reference, inputs, **options), inputs, **options)


def test_oracle_tells_small_mistakes() -> None:
    """The tolerance is tight enough: one wrong row, one wrong action, one metric off by 0.1% are each found."""
    inputs = make_inputs(40, 3, std_per_row=True)
    out, grads = call_with_autograd(ppo_loss_reference, inputs)
    assert_matches(out, grads, inputs)
    for name in DIFFERENTIABLE:
        wrong = {**grads, name: grads[name].clone()}
        wrong[name].view(-1)[7] *= 1.001
        with pytest.raises(AssertionError, match=f"gradient of {name}"):
            assert_matches(out, wrong, inputs)
    for name in ("loss", "surrogate", "value_loss", "entropy", "kl", "approx_kl", "clip_fraction", "max_ratio"):
        with pytest.raises(AssertionError, match=name):
            metrics = torch.stack([getattr(out, field) * (1.001 if field == name else 1.0) for field in out._fields])
            assert_matches(PPOLossOutput(None, metrics), grads, inputs)


# --- shapes and values ------------------------------------------------------------------------------------------------


@given(
    shape=shapes(),
    options=OPTIONS,
    std_per_row=st.booleans(),
    old_std_per_row=st.booleans(),
    spread=st.sampled_from([1e-3, 1.0, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
@SETTINGS
def test_values_and_gradients(
    backend: str,
    device: str,
    shape: tuple[int, int],
    options: dict,
    std_per_row: bool,
    old_std_per_row: bool,
    spread: float,
    seed: int,
) -> None:
    inputs = make_inputs(
        rows_that_it_can(backend, *shape),
        shape[1],
        seed,
        std_per_row=std_per_row,
        old_std_per_row=old_std_per_row,
        spread=spread,
        clip_param=options["clip_param"],
        device=device,
    )
    out, grads = call_with_autograd(ppo_loss, inputs, backend=backend, **options)
    assert_matches(out, grads, inputs, **options)
    same_out, same_grads = ppo_loss_and_grad(**inputs, backend=backend, **options)
    for one, other in zip((*out, *grads.values()), (*same_out, *same_grads), strict=True):
        assert torch.equal(one.detach(), other)


@pytest.mark.parametrize("num_actions", [1023, 1024, 1025, 3000])
@pytest.mark.parametrize("std_per_row", [False, True])
def test_more_actions_than_a_tile_holds(backend: str, device: str, num_actions: int, std_per_row: bool) -> None:
    inputs = make_inputs(11, num_actions, std_per_row=std_per_row, old_std_per_row=std_per_row, device=device)
    assert_matches(*call_with_autograd(ppo_loss, inputs, backend=backend, kl_coef=0.5), inputs, kl_coef=0.5)


def test_many_rows(backend: str, device: str) -> None:
    """Several chunks on several threads, as in a real mini-batch."""
    inputs = make_inputs(24_576, 12, old_std_per_row=True, device=device)
    assert_matches(*call_with_autograd(ppo_loss, inputs, backend=backend), inputs)


# --- layouts ----------------------------------------------------------------------------------------------------------


def in_nans(*shape: int, like: Tensor) -> Tensor:
    """A buffer around a view: whatever is read beside the view shows."""
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def every_other_column(t: Tensor) -> Tensor:
    buffer = in_nans(t.shape[0], 2 * t.shape[1], like=t)
    buffer[:, ::2] = t
    return buffer[:, ::2]


def every_other_row(t: Tensor) -> Tensor:
    buffer = in_nans(2 * t.shape[0], *t.shape[1:], like=t)
    buffer[::2] = t
    return buffer[::2]


def cut_out(t: Tensor) -> Tensor:
    rows, cols = t.shape
    buffer = in_nans(rows + 2, cols + 3, like=t)
    buffer[1:-1, 2 : 2 + cols] = t
    return buffer[1:-1, 2 : 2 + cols]


def column(t: Tensor) -> Tensor:
    buffer = in_nans(t.shape[0], 3, like=t)
    buffer[:, 1] = t
    return buffer[:, 1]


def column_matrix(t: Tensor) -> Tensor:
    return column(t)[:, None]


MATRIX_LAYOUTS = (torch.clone, transposed, every_other_column, every_other_row, cut_out)
VECTOR_LAYOUTS = (torch.clone, column, every_other_row, column_matrix, lambda t: t[:, None].clone())


@given(
    num_rows=st.integers(1, 70),
    num_actions=st.integers(1, 9),
    matrix_layouts=st.fixed_dictionaries({name: st.sampled_from(MATRIX_LAYOUTS) for name in MATRICES}),
    vector_layouts=st.fixed_dictionaries({name: st.sampled_from(VECTOR_LAYOUTS) for name in VECTORS}),
    repeated=st.sets(st.sampled_from(["mean", "actions", "old_mean", "advantages", "returns", "old_values"])),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_views(
    backend: str,
    device: str,
    num_rows: int,
    num_actions: int,
    matrix_layouts: dict[str, Callable],
    vector_layouts: dict[str, Callable],
    repeated: set[str],
    seed: int,
) -> None:
    """Any strides, 0 among them, give what the copied values give."""
    inputs = make_inputs(num_rows, num_actions, seed, std_per_row=True, old_std_per_row=True)
    for name in repeated:  # one row, expanded
        inputs[name] = inputs[name][:1].expand_as(inputs[name])
    set_log_ratio(inputs, 0.3 * torch.randn(num_rows, generator=torch.Generator().manual_seed(seed)))
    avoid_kinks(inputs, 0.2)
    for name, layout in {**matrix_layouts, **vector_layouts}.items():
        t = inputs[name]
        if name in repeated and t.stride(0) == 0:
            inputs[name] = t[:1].to(device).expand_as(t)  # moved as a whole it would be a copy of every row
        else:
            inputs[name] = layout(t.to(device))
    options = {"kl_coef": 0.5, "backend": backend}
    assert_matches(*call_with_autograd(ppo_loss, inputs, **options), inputs, kl_coef=0.5)
    out, grads = ppo_loss_and_grad(**inputs, **options)
    assert_matches(out, dict(zip(DIFFERENTIABLE, grads, strict=True)), inputs, kl_coef=0.5)


@pytest.mark.parametrize("std_per_row", [False, True])
@pytest.mark.parametrize("trailing_one", [False, True])
def test_leading_dimensions(backend: str, device: str, std_per_row: bool, trailing_one: bool) -> None:
    """[T, B, A] with [T, B] or [T, B, 1]; num_original counts rows in their flat order."""
    inputs = make_inputs(7 * 5, 3, std_per_row=std_per_row, old_std_per_row=std_per_row, device=device)
    for name in NAMES:
        if name in VECTORS:
            inputs[name] = inputs[name].view(7, 5, 1) if trailing_one else inputs[name].view(7, 5)
        elif inputs[name].dim() == 2:
            inputs[name] = inputs[name].view(7, 5, 3)
    options = {"kl_coef": 0.5, "num_original": 17}
    assert_matches(*call_with_autograd(ppo_loss, inputs, backend=backend, **options), inputs, **options)
    out, grads = ppo_loss_and_grad(**inputs, backend=backend, **options)
    assert_matches(out, dict(zip(DIFFERENTIABLE, grads, strict=True)), inputs, **options)


def test_leading_dimensions_that_cannot_be_flattened(backend: str, device: str) -> None:
    """Slices x[:, a:b] of [T, B, A], as recurrent mini-batches are."""
    inputs = make_inputs(4 * 6, 3, std_per_row=True, old_std_per_row=True, device=device)
    sliced = {}
    for name, t in inputs.items():
        t = t.view(4, 6, *t.shape[1:])
        buffer = in_nans(4, 11, *t.shape[2:], like=t)
        buffer[:, 2:8] = t
        sliced[name] = buffer[:, 2:8]
    assert_matches(*call_with_autograd(ppo_loss, sliced, backend=backend, kl_coef=0.5), sliced, kl_coef=0.5)
    out, grads = ppo_loss_and_grad(**sliced, kl_coef=0.5, backend=backend)
    assert_matches(out, dict(zip(DIFFERENTIABLE, grads, strict=True)), sliced, kl_coef=0.5)


# --- std: one row for all ---------------------------------------------------------------------------------------------

# from what std is made (a leaf, and how) to which the gradient must come back
STD_SOURCES = {
    "row": ((5,), lambda s, n: s.exp().expand(n, 5)),
    "scalar": ((1,), lambda s, n: s.exp().expand(n, 5)),
    "0-dim": ((), lambda s, n: s.exp().expand(n, 5)),
    "scalar to [A]": ((), lambda s, n: s.exp().expand(5)),
    "[1, A]": ((1, 5), lambda s, n: s.exp().expand(n, 5)),
    "parameter": ((5,), lambda s, n: (s + 2.0).expand(n, 5)),
    "one std a row": ((12, 1), lambda s, n: s.exp().expand(n, 5)),  # stride 0 in the columns: not one row for all
    "a view of wider": ((3, 7), lambda s, n: s.exp()[1, 1:6].expand(n, 5)),
    "strided row": ((10,), lambda s, n: s.exp()[::2].expand(n, 5)),
}


@pytest.mark.parametrize("source", STD_SOURCES)
@pytest.mark.parametrize("old_std_per_row", [False, True])
@pytest.mark.parametrize("with_autograd", [True, False])
def test_expanded_std(backend: str, device: str, source: str, old_std_per_row: bool, with_autograd: bool) -> None:
    """What an expanded std was expanded from gets the right gradient, whichever function computes it."""
    shape, make_std = STD_SOURCES[source]
    inputs = make_inputs(12, 5, old_std_per_row=old_std_per_row, device=device)
    leaf = (0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(device).requires_grad_()
    std = make_std(leaf, 12)
    inputs["std"] = std.detach().clone()
    set_log_ratio(inputs, 0.1 * torch.ones(12, device=device))
    inputs["std"] = std
    others = {name: inputs[name].requires_grad_() for name in ("mean", "values")}
    if with_autograd:
        ppo_loss(**inputs, kl_coef=0.5, backend=backend).loss.backward()
    else:
        tensors = [inputs[name] for name in DIFFERENTIABLE]
        _, grads = ppo_loss_and_grad(**inputs, kl_coef=0.5, backend=backend)
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        torch.autograd.backward(tensors, grads)
    e = expected({**inputs, "std": std.detach()}, kl_coef=0.5)
    leaf64 = leaf.detach().double().cpu().requires_grad_()
    make_std(leaf64, 12).expand(12, 5).backward(e.grad_std_rows)
    scale = float(e.grad_std_rows.abs().sum())
    assert_gradient("what std came from", leaf.grad, leaf, leaf64.grad, 1e-5, scale)
    assert_gradient("mean", others["mean"].grad, others["mean"], e.grad_mean, 1e-5)
    assert_gradient("values", others["values"].grad, others["values"], e.grad_values, 1e-5)


@pytest.mark.parametrize("leading", [(4, 3), (12,)])
def test_expanded_std_of_any_leading_dimensions(backend: str, device: str, leading: tuple[int, ...]) -> None:
    inputs = make_inputs(12, 5, device=device)
    row = inputs["std"].clone().requires_grad_()
    want = expected(inputs).grad_std_rows
    for name in NAMES:
        if inputs[name].dim() == 2:
            inputs[name] = inputs[name].view(*leading, 5)
        elif name in VECTORS:
            inputs[name] = inputs[name].view(leading)
    inputs["std"] = (row * 1.0).expand(*leading, 5)
    inputs["old_std"] = inputs["old_std"].expand(*leading, 5)
    ppo_loss(**inputs, backend=backend).loss.backward()
    assert_gradient("row", row.grad, row, want.sum(0), 1e-5, float(want.abs().sum(0).max()))


@pytest.mark.parametrize("with_autograd", [True, False])
def test_expanded_leaf_has_a_gradient_per_element(backend: str, device: str, with_autograd: bool) -> None:
    """A leaf that is itself an expanded view: torch gives each of its elements a gradient of its own."""
    inputs = make_inputs(12, 5, device=device)
    want = expected(inputs).grad_std_rows
    leaf = inputs["std"].expand(12, 5).requires_grad_()
    assert leaf.is_leaf
    inputs["std"] = leaf
    if with_autograd:
        ppo_loss(**inputs, backend=backend).loss.backward()
        grad = leaf.grad
    else:
        _, (_, grad, _) = ppo_loss_and_grad(**inputs, backend=backend)
    assert_gradient("std", grad, leaf, want, 1e-5)


def test_one_row_of_std_may_be_anything(backend: str, device: str) -> None:
    """[A], its expanded view and its copies are one function: the same loss, gradients that sum to the same."""
    inputs = make_inputs(33, 4, device=device)
    by_row, grads = call_with_autograd(ppo_loss, inputs, kl_coef=0.5, backend=backend)
    copies = {**inputs, "std": inputs["std"].repeat(33, 1), "old_std": inputs["old_std"].repeat(33, 1)}
    by_copies, copied_grads = call_with_autograd(ppo_loss, copies, kl_coef=0.5, backend=backend)
    torch.testing.assert_close(by_row.loss, by_copies.loss)
    torch.testing.assert_close(grads["mean"], copied_grads["mean"])
    torch.testing.assert_close(grads["std"], copied_grads["std"].sum(0), rtol=1e-5, atol=1e-6)


# --- the original rows under symmetry augmentation --------------------------------------------------------------------


@given(
    num_actions=st.sampled_from([1, 3, 70]),
    num_rows=st.sampled_from([2, 14, 15, 40, 230]),
    share=st.floats(0.0, 1.0),
    std_per_row=st.booleans(),
    old_std_per_row=st.booleans(),
    cut_old=st.booleans(),
    kl_coef=st.sampled_from([0.0, 0.7]),
)
@SETTINGS
def test_num_original(
    backend: str,
    device: str,
    num_actions: int,
    num_rows: int,
    share: float,
    std_per_row: bool,
    old_std_per_row: bool,
    cut_old: bool,
    kl_coef: float,
) -> None:
    """Entropy and KL over the first rows, surrogate and value loss over all; the old policy may have only those."""
    num_original = max(1, round(share * num_rows))
    inputs = make_inputs(num_rows, num_actions, std_per_row=std_per_row, old_std_per_row=old_std_per_row, device=device)
    options = {"num_original": num_original, "kl_coef": kl_coef, "entropy_coef": 0.5}
    called = dict(inputs)
    if cut_old:
        called["old_mean"] = inputs["old_mean"][:num_original].clone()
        if old_std_per_row:
            called["old_std"] = inputs["old_std"][:num_original].clone()
    out, grads = call_with_autograd(ppo_loss, called, backend=backend, **options)
    assert_matches(out, grads, inputs, **options)


def test_expanded_old_std_of_the_original_rows(backend: str, device: str) -> None:
    inputs = make_inputs(20, 3, device=device)
    cut = {**inputs, "old_mean": inputs["old_mean"][:8], "old_std": inputs["old_std"].expand(8, 3)}
    out, grads = call_with_autograd(ppo_loss, cut, num_original=8, kl_coef=0.5, backend=backend)
    assert_matches(out, grads, inputs, num_original=8, kl_coef=0.5)


# --- dtypes -----------------------------------------------------------------------------------------------------------

NETWORK_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(
    mean=NETWORK_DTYPES,
    std=NETWORK_DTYPES,
    values=NETWORK_DTYPES,
    rollout=st.dictionaries(
        st.sampled_from([name for name in NAMES if name not in DIFFERENTIABLE]), NETWORK_DTYPES, max_size=3
    ),
    shape=st.tuples(st.sampled_from([1, 19, 70, 300]), st.sampled_from([1, 5, 17])),
    std_per_row=st.booleans(),
    options=OPTIONS,
    seed=st.integers(0, 99),
)
@SETTINGS
def test_dtypes(
    backend: str,
    device: str,
    mean: torch.dtype,
    std: torch.dtype,
    values: torch.dtype,
    rollout: dict[str, torch.dtype],
    shape: tuple[int, int],
    std_per_row: bool,
    options: dict,
    seed: int,
) -> None:
    """The oracle sees the rounded inputs: what is left is the arithmetic's rounding, and the gradients' own."""
    dtypes = {"mean": mean, "std": std, "values": values, **rollout}
    inputs = make_inputs(
        *shape,
        seed,
        std_per_row=std_per_row,
        old_std_per_row=bool(seed % 2),
        dtypes=dtypes,
        clip_param=options["clip_param"],
        device=device,
    )
    out, grads = call_with_autograd(ppo_loss, inputs, backend=backend, **options)
    assert_matches(out, grads, inputs, **options)
    has_double = torch.float64 in {t.dtype for t in inputs.values()}
    assert {t.dtype for t in out} == {torch.float64 if has_double else torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_change_only_what_they_round(backend: str, device: str, dtype: torch.dtype) -> None:
    """Values that the small dtype holds exactly give the float32 call's loss, and its gradients rounded once."""
    names = ("mean", "std", "values")
    small = make_inputs(50, 6, std_per_row=True, dtypes=dict.fromkeys(names, dtype), device=device)
    wide = {name: t.float() for name, t in small.items()}
    out, grads = call_with_autograd(ppo_loss, small, kl_coef=0.5, backend=backend)
    wide_out, wide_grads = call_with_autograd(ppo_loss, wide, kl_coef=0.5, backend=backend)
    for name, one, other in zip(out._fields, out, wide_out, strict=True):
        assert torch.equal(one, other), name
    for name in names:
        assert torch.equal(grads[name], wide_grads[name].to(dtype)), name


def test_each_metric_is_in_its_place(backend: str, device: str) -> None:
    """The kernels count them, ``METRICS`` names them: numbers of which no two are alike."""
    inputs = make_inputs(60, 3, old_std_per_row=True, device=device)
    wanted = expected(inputs).metrics
    assert tuple(wanted) == METRICS
    in_order = sorted(wanted.values())
    assert min(b - a for a, b in itertools.pairwise(in_order)) > 1e-3
    metrics = [float(x) for x in ppo_loss(**inputs, backend=backend)]
    assert metrics == pytest.approx(list(wanted.values()), rel=1e-4, abs=1e-5)


# --- coefficients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_param", "value_loss_coef", "entropy_coef", "kl_coef"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_coefficient_as_tensor(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    """Read when called: who changes the tensor in place changes the next result."""
    inputs = make_inputs(60, 3, old_std_per_row=True, device=device)
    coefficient = torch.full((3,), float("nan"), dtype=dtype, device=device)[1]
    losses = []
    for value in (0.125, 0.5):  # exact in every dtype
        avoid_kinks(inputs, 0.125)
        avoid_kinks(inputs, 0.5)
        coefficient.fill_(value)
        out, grads = call_with_autograd(ppo_loss, inputs, backend=backend, **{name: coefficient})
        assert_matches(out, grads, inputs, **{name: value})
        losses.append(out.loss.item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_coefficients_are_computed_with_as_the_tensors(backend: str, device: str, dtype: torch.dtype) -> None:
    """1 - 0.2 in bfloat16 would be another clip, and a float64 coefficient makes no float64 loss."""
    inputs = make_inputs(200, 3, old_std_per_row=True, device=device)
    numbers = {"clip_param": 0.2, "value_loss_coef": 0.7, "entropy_coef": 0.013, "kl_coef": 0.3}
    tensors = {name: torch.tensor(value, dtype=dtype, device=device) for name, value in numbers.items()}
    rounded = {name: float(t) for name, t in tensors.items()}
    avoid_kinks(inputs, rounded["clip_param"])
    out, grads = call_with_autograd(ppo_loss, inputs, backend=backend, **tensors)
    assert {t.dtype for t in (*out, *grads.values())} == {torch.float32}
    assert_matches(out, grads, inputs, **rounded)


# --- ties -------------------------------------------------------------------------------------------------------------


def clamp(t: Tensor, low: float, high: float) -> Tensor:
    """torch's of before 2.14: since then it has no gradient at its bounds."""
    inside = ((t >= low) & (t <= high)).to(t.dtype)
    return torch.clamp(t, low, high).detach() + inside * (t - t.detach())


def test_the_clamp_is_that_of_torch() -> None:
    t = torch.tensor([-2.0, -0.5, 0.0, 0.75, 2.0], requires_grad=True)
    grads = [torch.autograd.grad(f(t, -0.5, 0.75).sum(), t)[0] for f in (clamp, torch.clamp)]
    assert torch.equal(clamp(t, -0.5, 0.75), torch.clamp(t, -0.5, 0.75))
    assert grads[0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    at_bounds = float(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14))
    assert grads[1].tolist() == [0.0, at_bounds, 1.0, at_bounds, 0.0]


def stock_rows(ratio: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor, clip: float):
    """The stock surrogate and value loss of each row, and their derivatives by torch.autograd, with this clamp."""
    log_ratio = ratio.log().requires_grad_()
    ratio = ratio * torch.exp(log_ratio - log_ratio.detach())  # exactly the ratio that was asked for
    values = values.clone().requires_grad_()
    surrogate = torch.max(-advantages * ratio, -advantages * clamp(ratio, 1.0 - clip, 1.0 + clip))
    value_clipped = old_values + clamp(values - old_values, -clip, clip)
    value_loss = torch.max((values - returns).pow(2), (value_clipped - returns).pow(2))
    (surrogate.sum() + value_loss.sum()).backward()
    return surrogate.detach(), log_ratio.grad, value_loss.detach(), values.grad


def one_row_inputs(log_ratio: float, dtype: torch.dtype, device: str, **scalars: float) -> Inputs:
    """One row and one action with z = 1 and this log-ratio, nearly: then grad_mean = d loss / d log π."""
    matrices = {"mean": 0.0, "std": 1.0, "actions": 1.0, "old_mean": 0.0, "old_std": 1.0}
    scalars["old_log_prob"] = -0.5 - 0.5 * math.log(2.0 * math.pi) - log_ratio
    shapes = dict.fromkeys(MATRICES, (1, 1)) | dict.fromkeys(VECTORS, (1,))
    numbers = {**matrices, **dict.fromkeys(VECTORS, 0.0), **scalars}
    return {name: torch.full(shapes[name], numbers[name], dtype=dtype, device=device) for name in NAMES}


@pytest.mark.parametrize("step", [-0.75, -0.25, -0.125, 0.0, 0.125, 0.25, 0.75])
@pytest.mark.parametrize("error", [-1.0, -0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_loss_ties(backend: str, device: str, step: float, error: float, dtype: torch.dtype) -> None:
    """Numbers that are exact in binary: a step right at the clip range, and errors that clipping leaves as large.

    v_old = 0, v = .75, R = .5, clip .25 has (v - R)² = (v_c - R)²: torch's max gives each side half of the gradient
    there, and clamp passes it at the bounds.
    """
    clip = 0.25
    inputs = one_row_inputs(0.0, dtype, device, values=step, returns=step - error)
    out, (_, _, grad) = ppo_loss_and_grad(**inputs, clip_param=clip, backend=backend)
    t = {name: inputs[name].cpu() for name in ("advantages", "values", "old_values", "returns")}
    _, _, value_loss, d_value = stock_rows(torch.ones(1), clip=clip, **t)
    assert float(out.value_loss) == float(value_loss)
    assert float(grad) == float(d_value)


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("bound", ["lower", "upper"])
@pytest.mark.parametrize("steps", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogate_ties(
    backend: str, device: str, advantage: float, bound: str, steps: int, dtype: torch.dtype
) -> None:
    """A ratio exactly at a bound of the clip range, and one number to either side of it: inside or at the bound the
    gradient flows, outside it depends on the advantage's sign; with an advantage of 0 there is none.

    The clip range is set from the ratio that the backend computes, so that they are equal to the bit.
    """
    inputs = one_row_inputs(0.4 if bound == "upper" else -0.4, dtype, device, advantages=advantage)
    ratio = ppo_loss(**inputs, backend=backend).max_ratio.cpu().reshape(1)
    assert ratio.dtype == dtype
    towards = torch.full_like(ratio, float("inf") if steps > 0 else float("-inf"))
    edge = torch.nextafter(ratio, towards) if steps else ratio
    clip = float((edge.double() - 1.0).abs())
    assert float(edge) in torch.tensor([1.0 - clip, 1.0 + clip], dtype=torch.float64).to(dtype).tolist()
    out, (grad, _, _) = ppo_loss_and_grad(**inputs, clip_param=clip, entropy_coef=0.0, backend=backend)
    zero = torch.zeros_like(ratio)
    surrogate, d_log_prob, _, _ = stock_rows(ratio, zero + advantage, zero, zero, zero, clip)
    rounding = 4.0 * torch.finfo(dtype).eps
    assert float(out.surrogate) == pytest.approx(float(surrogate), rel=rounding, abs=0.0)
    assert float(grad) == pytest.approx(float(d_log_prob), rel=rounding, abs=0.0)
    outside = (steps < 0) if bound == "upper" else (steps > 0)
    assert float(out.clip_fraction) == float(outside)


@pytest.mark.parametrize(("clip", "sign"), [(0.09, -1.0), (0.18, 1.0)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bounds_are_rounded_once(backend: str, device: str, clip: float, sign: float, as_tensor: bool) -> None:
    """float32(1 ± ε): for these ε another number than float32(1) ± float32(ε). A ratio that lies on it is inside."""
    rounded_twice = torch.tensor(1.0) + sign * torch.tensor(clip)
    bound = rounded_twice if as_tensor else torch.tensor(1.0 + sign * clip)  # a tensor has only float32(ε)
    assert as_tensor or bound != rounded_twice
    inputs = one_row_inputs(math.log(float(bound)), torch.float32, device)
    inputs["actions"].zero_()
    inputs["std"].fill_(0.5)  # log-probabilities near 0, which can be changed in finer steps than the ratio has
    log_prob = -0.5 * math.log(2.0 * math.pi) - math.log(0.5)
    nearby = torch.full_like(inputs["old_log_prob"], log_prob - math.log(float(bound)))
    for _ in range(8):
        nearby = torch.nextafter(nearby, torch.full_like(nearby, -math.inf))
    outside = {}
    for _ in range(17):
        option = torch.tensor(clip, device=device) if as_tensor else clip
        out = ppo_loss(**{**inputs, "old_log_prob": nearby}, clip_param=option, backend=backend)
        outside[float(out.max_ratio)] = float(out.clip_fraction)
        nearby = torch.nextafter(nearby, torch.full_like(nearby, math.inf))
    assert float(bound) in outside
    assert outside == {ratio: float(sign * ratio > sign * float(bound)) for ratio in outside}


def test_advantage_of_zero_has_no_gradient(backend: str, device: str) -> None:
    inputs = make_inputs(30, 2, std_per_row=True, device=device)
    inputs["advantages"] = torch.zeros(30, device=device)
    out, (grad_mean, grad_std, _) = ppo_loss_and_grad(**inputs, entropy_coef=0.0, backend=backend)
    assert float(out.surrogate) == 0.0
    assert not grad_mean.any()
    assert not grad_std.any()


# --- KL near 0 --------------------------------------------------------------------------------------------------------


def exact_kl(mean_p: float, std_p: float, mean_q: float, std_q: float) -> mpmath.mpf:
    with mpmath.workdps(60):
        p, q, m = mpmath.mpf(std_p), mpmath.mpf(std_q), mpmath.mpf(mean_p) - mpmath.mpf(mean_q)
        return mpmath.log(q / p) + (p * p + m * m) / (2 * q * q) - mpmath.mpf(1) / 2


@pytest.mark.parametrize("exponent", range(-6, 0))
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("std", [1.0, 0.37, 12.0])
def test_kl_is_accurate_near_zero(
    backend: str, device: str, exponent: int, sign: int, direction: str, per_row: bool, std: float
) -> None:
    """In float32, where log σ_q/σ_p + σ_p²/2σ_q² - ½ has no digit left."""
    new = torch.tensor([[std]], dtype=torch.float32)
    old = (new.double() * (1.0 + sign * 10.0**exponent)).float()
    inputs = make_inputs(1, 1)
    inputs |= {"mean": torch.zeros(1, 1), "old_mean": torch.zeros(1, 1), "std": new, "old_std": old}
    if not per_row:
        inputs |= {"std": new[0], "old_std": old[0]}
    inputs = {name: t.to(device) for name, t in inputs.items()}
    kl = float(ppo_loss(**inputs, kl_direction=direction, backend=backend).kl)
    p, q = (float(old), float(new)) if direction == "old_new" else (float(new), float(old))
    want = exact_kl(0.0, p, 0.0, q)
    assert abs(kl - want) < 1e-5 * want


@given(
    means=st.tuples(st.floats(-3, 3, width=32), st.floats(-0.0009765625, 0.0009765625, width=32)),
    std=st.floats(0.0078125, 16.0, width=32),
    log_ratio=st.floats(-1e-2, 1e-2),
    direction=st.sampled_from(["old_new", "new_old"]),
    per_row=st.booleans(),
)
@SETTINGS
def test_kl_is_never_negative(
    backend: str, device: str, means: tuple[float, float], std: float, log_ratio: float, direction: str, per_row: bool
) -> None:
    inputs = make_inputs(3, 2)
    new = torch.full((3, 2), std)
    inputs |= {"mean": torch.full((3, 2), means[0]), "std": new}
    inputs |= {"old_mean": inputs["mean"] + means[1], "old_std": (new.double() * 2.718281828**log_ratio).float()}
    if not per_row:
        inputs |= {"std": inputs["std"][0], "old_std": inputs["old_std"][0]}
    inputs = {name: t.to(device) for name, t in inputs.items()}
    kl = float(ppo_loss(**inputs, kl_direction=direction, backend=backend).kl)
    old = (float(inputs["old_mean"][0, 0]), float(inputs["old_std"].flatten()[0]))
    new = (float(inputs["mean"][0, 0]), float(inputs["std"].flatten()[0]))
    want = 2.0 * exact_kl(*old, *new) if direction == "old_new" else 2.0 * exact_kl(*new, *old)
    assert kl >= 0.0
    assert abs(kl - want) <= 1e-5 * want + 2.0**-126  # below that float32 has no digits left


@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kl_is_exactly_zero_at_equality(
    backend: str, device: str, direction: str, per_row: bool, dtype: torch.dtype
) -> None:
    """And so are its gradients: the first mini-batch of an update reads 0, not rounding noise."""
    inputs = make_inputs(64, 7, std_per_row=per_row, dtypes={"mean": dtype, "std": dtype}, device=device)
    inputs |= {"old_mean": inputs["mean"].clone(), "old_std": inputs["std"].clone()}
    options: dict[str, Any] = {"kl_direction": direction, "backend": backend}
    out, without = ppo_loss_and_grad(**inputs, **options)
    assert float(out.kl) == 0.0
    _, with_kl = ppo_loss_and_grad(**inputs, kl_coef=3.0, **options)
    for one, other in zip(with_kl, without, strict=True):
        assert torch.equal(one, other)
