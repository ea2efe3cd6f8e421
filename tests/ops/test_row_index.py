"""ppo_loss on rows of a rollout that are chosen by row_index: the same as on copies of those rows."""

from __future__ import annotations

import pytest
import torch
from backends_here import AVAILABLE, KERNELS
from ppo_loss_oracle import DIFFERENTIABLE, Inputs, assert_matches, call_with_autograd, make_inputs

from pyfast_ppo import ppo_loss, ppo_loss_and_grad, ppo_loss_reference

ROLLOUT_ROWS, BATCH = 300, 230
GATHERING = ["cuda"] if "cuda" in KERNELS else []


def chosen(inputs: Inputs, index: torch.Tensor) -> tuple[Inputs, Inputs]:
    """(network outputs of the chosen rows beside the whole rollout, all of the chosen rows), from a whole rollout."""
    rows = {k: v if v.dim() == 1 and "std" in k else v[index] for k, v in inputs.items()}
    return {k: rows[k] if k in DIFFERENTIABLE else v for k, v in inputs.items()}, rows


def assert_right(result: tuple, rows: Inputs, **options: float) -> None:
    out, grads = result
    assert_matches(out, dict(zip(DIFFERENTIABLE, grads, strict=True)), rows, **options)


def permutation(seed: int, device: str) -> torch.Tensor:
    """With repetitions."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(ROLLOUT_ROWS, (BATCH,), generator=g).to(device)


CASES = [(backend, num_actions) for backend in GATHERING for num_actions in (1, 12, 19, 32, 300, 1600)]
CASES += [(row.name, num_actions) for row in AVAILABLE if row.name not in GATHERING for num_actions in (5, 12)]


@pytest.mark.parametrize(("backend", "num_actions"), CASES, scope="session")
@pytest.mark.parametrize("std_per_row", [False, True])
@pytest.mark.parametrize("old_std_per_row", [False, True])
def test_same_as_copies(backend: str, device: str, num_actions: int, std_per_row: bool, old_std_per_row: bool) -> None:
    """Bit for bit where the kernel takes the same path for both, and right in any case."""
    options = {"kl_coef": 0.3, "backend": backend}
    layout = {"std_per_row": std_per_row, "old_std_per_row": old_std_per_row}
    inputs, rows = chosen(
        make_inputs(ROLLOUT_ROWS, num_actions, 1, device=device, **layout), permutation(num_actions, device)
    )
    index = permutation(num_actions, device)
    assert_right(ppo_loss_and_grad(**inputs, row_index=index, **options), rows, kl_coef=0.3)
    out, grads = call_with_autograd(ppo_loss, inputs, row_index=index, **options)
    assert_matches(out, grads, rows, kl_coef=0.3)
    if num_actions % 4 == 0:
        out, grads = ppo_loss_and_grad(**inputs, row_index=index, **options)
        out_of_copies, grads_of_copies = ppo_loss_and_grad(**rows, **options)
        assert torch.equal(out.loss, out_of_copies.loss)
        assert all(map(torch.equal, grads, grads_of_copies))


def test_views_and_trailing_dimensions(backend: str, device: str) -> None:
    """rsl_rl's storage: [T, E, …] made flat, columns of one, float16 beside float32."""
    index = permutation(3, device)
    inputs, rows = chosen(make_inputs(ROLLOUT_ROWS, 6, 2, device=device), index)
    wide = torch.zeros(ROLLOUT_ROWS, 2, 7, device=device)
    wide[:, 1, :6] = inputs["actions"]
    inputs |= {"actions": wide[:, 1, :6], "advantages": inputs["advantages"][:, None]}
    inputs["old_mean"] = inputs["old_mean"].double()
    rows["old_mean"] = rows["old_mean"].double()
    assert_right(ppo_loss_and_grad(**inputs, row_index=index[:], backend=backend), rows)
    every_other = torch.stack([index, index], 1)[:, 0]  # an index with a stride
    assert_right(ppo_loss_and_grad(**inputs, row_index=every_other, backend=backend), rows)


def test_reference_and_compiled() -> None:
    index = permutation(4, "cpu")
    inputs, rows = chosen(make_inputs(ROLLOUT_ROWS, 5, 3), index)
    expected = ppo_loss_reference(**rows).loss
    torch.testing.assert_close(ppo_loss_reference(**inputs, row_index=index).loss, expected, rtol=0, atol=0)
    compiled = torch.compile(lambda: ppo_loss(**inputs, row_index=index).loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected)


@pytest.mark.parametrize("num_actions", [4, 5, 2000])
@pytest.mark.parametrize("wrong", [-1, ROLLOUT_ROWS, 2**40])
def test_index_beyond_the_rollout(backend: str, device: str, num_actions: int, wrong: int) -> None:
    """Never read: the row counts as one that is not finite. Where rows are copied, torch refuses it."""
    index = permutation(5, device)
    inputs, _ = chosen(make_inputs(ROLLOUT_ROWS, num_actions, 4, device=device, old_std_per_row=True), index)
    good, _ = ppo_loss_and_grad(**inputs, row_index=index, backend=backend)
    index = index.clone()
    index[17] = wrong
    if backend not in GATHERING and device == "cpu":
        with pytest.raises(IndexError, match="row_index must be between 0 and"):
            ppo_loss_and_grad(**inputs, row_index=index, backend=backend)
    elif backend in GATHERING:
        out, grads = ppo_loss_and_grad(**inputs, row_index=index, backend=backend)
        assert float(out.nonfinite) == float(good.nonfinite) + 1.0
        assert torch.isnan(out.loss)
        assert not torch.isfinite(grads[0][17]).any()
        assert torch.isfinite(grads[0][[16, 18]]).all()


WRONG = {
    "a list": (lambda i: i.tolist(), TypeError, "row_index must be a tensor, got list"),
    "int32": (lambda i: i.int(), TypeError, r"row_index must be int64, got torch.int32; convert it with .long\(\)"),
    "a row short": (lambda i: i[1:], ValueError, r"row_index must have the shape \[230\], one entry per row of mean"),
    "two dimensions": (lambda i: i[:, None], ValueError, r"row_index must have the shape \[230\], .* got \[230, 1\]"),
    "another device": (lambda i: i.to("meta"), ValueError, "row_index is on meta, the other arguments are on cpu"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_index(what: str) -> None:
    change, error, message = WRONG[what]
    index = permutation(6, "cpu")
    inputs, _ = chosen(make_inputs(ROLLOUT_ROWS, 3), index)
    with pytest.raises(error, match=message):
        ppo_loss(**inputs, row_index=change(index))


@pytest.mark.parametrize("name", ["actions", "old_mean", "advantages"])
def test_wrong_rollout(name: str) -> None:
    """All tensors of the rollout have the same rows."""
    index = permutation(7, "cpu")
    inputs, _ = chosen(make_inputs(ROLLOUT_ROWS, 3, old_std_per_row=True), index)
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match="must have the shape"):
        ppo_loss(**inputs, row_index=index)


def test_other_number_of_actions() -> None:
    index = permutation(8, "cpu")
    inputs, _ = chosen(make_inputs(ROLLOUT_ROWS, 3), index)
    with pytest.raises(ValueError, match="actions must have 3 action dimensions, as mean has, got 2"):
        ppo_loss(**inputs | {"actions": inputs["actions"][:, :2]}, row_index=index)
