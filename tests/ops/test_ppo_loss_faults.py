"""What ppo_loss does with what is wrong: faults in the data are counted and show, arguments are refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ppo_loss_oracle import (
    DIFFERENTIABLE,
    MATRICES,
    NAMES,
    VECTORS,
    assert_matches,
    call_with_autograd,
    make_inputs,
    set_log_ratio,
)

from pyfast_ppo import ppo_loss, ppo_loss_and_grad, ppo_loss_reference

NUM_ROWS, NUM_ACTIONS, BAD_ROW = 37, 5, 23


# --- faults in the data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_one_value_is_not_finite(backend: str, device: str, name: str, value: float, direction: str) -> None:
    """It is counted once, it shows in the loss, and no other row's gradient changes."""
    inputs = make_inputs(NUM_ROWS, NUM_ACTIONS, std_per_row=True, old_std_per_row=True, device=device)
    options = {"kl_coef": 0.5, "kl_direction": direction, "backend": backend}
    _, good_grads = ppo_loss_and_grad(**inputs, **options)
    inputs[name].view(NUM_ROWS, -1)[BAD_ROW, -1] = value
    out, grads = ppo_loss_and_grad(**inputs, **options)
    assert float(out.nonfinite) == 1.0
    assert not torch.isfinite(out.loss)
    others = [row for row in range(NUM_ROWS) if row != BAD_ROW]
    for grad, good in zip(grads, good_grads, strict=True):
        assert torch.equal(grad[others], good[others])
    with_autograd, _ = call_with_autograd(ppo_loss, inputs, **options)
    assert float(with_autograd.nonfinite) == 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["std", "old_std"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_std_that_is_not_positive(
    backend: str, device: str, name: str, value: float, per_row: bool, direction: str
) -> None:
    """A shared std spoils every row that it enters, one of a row spoils that row."""
    inputs = make_inputs(NUM_ROWS, NUM_ACTIONS, std_per_row=per_row, old_std_per_row=per_row, device=device)
    inputs[name].view(-1, NUM_ACTIONS)[-1, 2] = value
    for kl_coef in (0.0, 0.5):
        options = {"kl_coef": kl_coef, "kl_direction": direction, "backend": backend}
        out, _ = ppo_loss_and_grad(**inputs, **options)
        assert float(out.nonfinite) == (1.0 if per_row else NUM_ROWS)
        assert not torch.isfinite(out.loss)


@pytest.mark.parametrize("per_row", [False, True])
def test_subnormal_std(backend: str, device: str, per_row: bool) -> None:
    """Positive, but 1/std is beyond float32: NaN in everything that is made of it."""
    inputs = make_inputs(6, 3, std_per_row=per_row, device=device)
    inputs["std"].view(-1, 3)[-1, 2] = 1e-40
    out, _ = ppo_loss_and_grad(**inputs, backend=backend)
    assert float(out.nonfinite) == (1.0 if per_row else 6.0)
    assert torch.isnan(out.entropy)
    assert torch.isnan(out.loss)


@pytest.mark.parametrize("std", [1.0, 1e-3])  # the ratio of the stds is subnormal, or not
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("per_row", [False, True])
def test_subnormal_old_std(backend: str, device: str, per_row: bool, direction: str, std: float) -> None:
    """As one of the new policy; in float64 it is a normal number."""
    inputs = make_inputs(6, 3, old_std_per_row=per_row, device=device)
    inputs["std"] = torch.full_like(inputs["std"], std)
    inputs["old_std"].view(-1, 3)[-1, 2] = 1e-40
    options = {"kl_coef": 1e-9, "kl_direction": direction}
    out, _ = ppo_loss_and_grad(**inputs, **options, backend=backend)
    assert float(out.nonfinite) == (1.0 if per_row else 6.0)
    assert torch.isnan(out.kl)
    assert torch.isnan(out.loss)
    wide = {**inputs, "mean": inputs["mean"].double().cpu()}
    wide = ppo_loss_reference(**{name: t.cpu() for name, t in wide.items()}, **options)
    assert float(wide.nonfinite) == 0.0
    assert torch.isfinite(wide.loss)


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, float("-inf")])
@pytest.mark.parametrize("num_actions", [5, 1600])  # those have a CUDA kernel of their own
@pytest.mark.parametrize("per_row", [False, True])
def test_a_tensor_that_is_no_clip_range(
    backend: str, device: str, wrong: float, num_actions: int, per_row: bool
) -> None:
    """A number is refused; what stands in a tensor is seen on its device."""
    inputs = make_inputs(6, num_actions, std_per_row=per_row, device=device)
    clip_param = torch.tensor(wrong, device=device)
    out, (grad_mean, grad_std, _) = ppo_loss_and_grad(**inputs, clip_param=clip_param, backend=backend)
    assert torch.isnan(out.loss)
    assert float(out.nonfinite) == 6.0
    assert torch.isnan(grad_mean).all()
    assert torch.isnan(grad_std).all()


def test_several_faults_in_one_row_count_once(backend: str, device: str) -> None:
    inputs = make_inputs(NUM_ROWS, NUM_ACTIONS, std_per_row=True, old_std_per_row=True, device=device)
    for name in NAMES:
        inputs[name].view(NUM_ROWS, -1)[BAD_ROW] = float("nan")
        inputs[name].view(NUM_ROWS, -1)[NUM_ROWS - 1, 0] = float("inf")
    assert float(ppo_loss(**inputs, backend=backend).nonfinite) == 2.0


def test_every_row_is_bad(backend: str, device: str) -> None:
    inputs = make_inputs(300, NUM_ACTIONS, device=device)
    inputs["old_log_prob"].fill_(float("nan"))
    out = ppo_loss(**inputs, backend=backend)
    assert float(out.nonfinite) == 300.0
    assert torch.isnan(out.max_ratio)
    assert torch.isnan(out.approx_kl)


@pytest.mark.parametrize("name", ["old_mean", "old_std"])
def test_old_rows_beyond_the_original_ones_are_not_looked_at(backend: str, device: str, name: str) -> None:
    """Augmented rows have no old distribution; whatever memory stands there must not reach the result."""
    inputs = make_inputs(NUM_ROWS, NUM_ACTIONS, old_std_per_row=True, device=device)
    options = {"num_original": 20, "kl_coef": 0.5}
    inputs[name][20:] = float("nan")
    good = {**inputs, name: torch.where(torch.isnan(inputs[name]), 1.0, inputs[name])}
    out, grads = call_with_autograd(ppo_loss, inputs, backend=backend, **options)
    assert_matches(out, grads, good, **options)
    inputs[name][19, 0] = float("nan")
    assert float(ppo_loss(**inputs, backend=backend, **options).nonfinite) == 1.0


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-100.0, -30.0, 30.0, 100.0])
@pytest.mark.parametrize("std_per_row", [False, True])
def test_ratio_that_overflows(backend: str, device: str, advantage: float, log_ratio: float, std_per_row: bool) -> None:
    """Stock autograd yields NaN or inf here. The ratio, and with it the gradient, is that of a log-ratio of ±20."""
    inputs = make_inputs(3, 2, std_per_row=std_per_row, dtypes={"old_log_prob": torch.float64}, device=device)
    set_log_ratio(inputs, torch.tensor([log_ratio, 0.0, 0.0], device=device))
    inputs["old_log_prob"] = inputs["old_log_prob"].float()
    inputs["advantages"] = torch.tensor([advantage, 0.0, 0.0], device=device)
    out, grads = call_with_autograd(ppo_loss, inputs, backend=backend, entropy_coef=0.0)
    ratio = float(torch.tensor(20.0 if log_ratio > 0 else -20.0, dtype=torch.float64).exp())
    clipped = min(max(ratio, 0.8), 1.2)
    surrogate = max(-advantage * ratio, -advantage * clipped)
    flows = -advantage * ratio > -advantage * clipped
    assert float(out.surrogate) == pytest.approx(surrogate / 3, rel=1e-5)
    assert float(out.max_ratio) == pytest.approx(max(ratio, 1.0), rel=1e-5)
    assert float(out.clip_fraction) == pytest.approx(1 / 3)
    assert float(out.nonfinite) == 0.0
    # k3's exponential is clamped; beyond the clamp it grows by the distance: a far outlier stays visible
    clamped = 20.0 if log_ratio > 0 else -20.0
    assert float(out.approx_kl) == pytest.approx((ratio - 1.0 - clamped + abs(log_ratio - clamped)) / 3, rel=1e-5)
    mean, std, actions = (inputs[name].double().cpu() for name in ("mean", "std", "actions"))
    z = (actions - mean) / std
    want_mean = (-advantage * ratio * flows / 3) * z[0] / std.expand(3, 2)[0]
    want_std = (-advantage * ratio * flows / 3) * (z[0] ** 2 - 1.0) / std.expand(3, 2)[0]
    torch.testing.assert_close(grads["mean"][0].double().cpu(), want_mean, rtol=1e-4, atol=0.0)
    got_std = grads["std"][0] if std_per_row else grads["std"]
    torch.testing.assert_close(got_std.double().cpu(), want_std, rtol=1e-4, atol=1e-4 * float(want_std.abs().max()))
    assert not grads["mean"][1:].any()


@pytest.mark.parametrize("old_log_prob", [-1e9, -1e30, 1e30])
def test_approx_kl_of_an_outlier_is_large(backend: str, device: str, old_log_prob: float) -> None:
    inputs = make_inputs(4, 2, device=device)
    inputs["old_log_prob"][1] = old_log_prob
    for function in (ppo_loss, ppo_loss_and_grad, ppo_loss_reference):
        out = function(**inputs, **({} if function is ppo_loss_reference else {"backend": backend}))
        out = out[0] if isinstance(out, tuple) else out
        assert float(out.approx_kl) == pytest.approx(abs(old_log_prob) / 4 + (old_log_prob < 0) * math.exp(20) / 4)
        assert float(out.nonfinite) == 0.0


@pytest.mark.parametrize("old_log_prob", [-math.inf, math.inf])
def test_approx_kl_of_an_infinite_log_ratio(backend: str, device: str, old_log_prob: float) -> None:
    inputs = make_inputs(4, 2, device=device)
    inputs["old_log_prob"][1] = old_log_prob
    out = ppo_loss(**inputs, backend=backend)
    assert float(out.approx_kl) == math.inf
    assert torch.isnan(out.max_ratio)
    assert torch.isnan(out.loss)
    assert float(out.nonfinite) == 1.0


@pytest.mark.parametrize("std", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("likelier", [False, True])
def test_std_that_collapsed(backend: str, device: str, std: float, advantage: float, likelier: bool) -> None:
    """Log-ratios beyond 10⁷, where float32 has no digit left for ±20, against the same in float64."""
    inputs = make_inputs(4, 1, device=device)
    inputs["std"] = torch.full((1,), std, device=device)
    inputs["actions"] = inputs["mean"] + torch.tensor([[1.0], [0.5], [-0.25], [0.0]], device=device)
    inputs["advantages"] = torch.full((4,), advantage, device=device)
    if likelier:
        inputs["old_log_prob"] = torch.full((4,), -2e10, device=device)
    out, grads = call_with_autograd(ppo_loss, inputs, backend=backend)
    want, want_grads = call_with_autograd(ppo_loss_reference, {name: t.double() for name, t in inputs.items()})
    for name in out._fields:
        torch.testing.assert_close(getattr(out, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5, msg=name)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(grads[name].double(), want_grads[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("std_per_row", [False, True])
def test_kl_that_overflows_stays_out_of_loss_and_gradients(
    backend: str, device: str, as_tensor: bool, direction: str, std_per_row: bool
) -> None:
    """With kl_coef = 0 the KL is a metric only: as in the stock, it may be infinite and the update goes on."""
    inputs = make_inputs(NUM_ROWS, NUM_ACTIONS, std_per_row=std_per_row, old_std_per_row=True, device=device)
    kl_coef = torch.zeros((), device=device) if as_tensor else 0.0
    options = {"kl_coef": kl_coef, "kl_direction": direction, "backend": backend}
    good_out, good = call_with_autograd(ppo_loss, inputs, **options)
    inputs["old_mean"][BAD_ROW] = 1e30
    inputs["old_std"][BAD_ROW - 1] = 1e-30
    inputs["old_std"][BAD_ROW - 2] = 1e30
    out, grads = call_with_autograd(ppo_loss, inputs, **options)
    assert not torch.isfinite(out.kl)
    assert float(out.nonfinite) == 0.0
    assert torch.equal(out.loss, good_out.loss)
    for name in DIFFERENTIABLE:
        assert torch.equal(grads[name], good[name]), name
    inputs["old_mean"][BAD_ROW] = float("inf")
    assert not torch.isfinite(ppo_loss(**inputs, **options).loss), "what is no overflow, but a fault, shows"


def test_ratios_at_the_end_of_the_exponential(backend: str, device: str) -> None:
    """|ℓ| up to 20 is not clamped: there exp is as accurate as elsewhere."""
    log_ratios = torch.linspace(-19.9, 19.9, NUM_ROWS, dtype=torch.float64)
    inputs = make_inputs(NUM_ROWS, NUM_ACTIONS, std_per_row=True)
    set_log_ratio(inputs, log_ratios)
    inputs = {name: t.to(device) for name, t in inputs.items()}
    assert_matches(*call_with_autograd(ppo_loss, inputs, backend=backend), inputs)


@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_inference_tensors_of_the_rollout(backend: str, device: str, direction: str) -> None:
    """rsl_rl fills its storage under inference_mode; autograd refuses to save such tensors."""
    inputs = make_inputs(20, 3, std_per_row=True, old_std_per_row=True, device=device)
    options = {"kl_coef": 0.5, "kl_direction": direction}
    with torch.inference_mode():
        rollout = {name: t.clone() for name, t in inputs.items() if name not in DIFFERENTIABLE}
    assert all(t.is_inference() for t in rollout.values())
    inputs |= rollout
    assert_matches(*call_with_autograd(ppo_loss, inputs, backend=backend, **options), inputs, **options)
    assert_matches(*call_with_autograd(ppo_loss_reference, inputs, **options), inputs, **options)
    with torch.inference_mode():
        under, _ = ppo_loss_and_grad(**inputs, backend=backend, **options)
    assert torch.equal(under.loss, ppo_loss(**inputs, backend=backend, **options).loss)


# --- wrong arguments --------------------------------------------------------------------------------------------------

FUNCTIONS = (ppo_loss, ppo_loss_and_grad, ppo_loss_reference)


@pytest.fixture(params=FUNCTIONS, ids=lambda f: f.__name__)
def function(request: pytest.FixtureRequest):
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_rows(function, name: str) -> None:
    inputs = make_inputs(6, 3, std_per_row=True, old_std_per_row=True)
    inputs[name] = inputs[name][:-1]
    wrong = "std" if name == "mean" else name  # mean says what the others must be
    with pytest.raises(ValueError, match=rf"^{wrong} must have the shape .*6|^{wrong} must have the shape .*5"):
        function(**inputs)


@pytest.mark.parametrize("name", MATRICES)
def test_wrong_number_of_actions(function, name: str) -> None:
    inputs = make_inputs(6, 3, std_per_row=True, old_std_per_row=True)
    inputs[name] = inputs[name][:, :2]
    with pytest.raises(ValueError, match=rf"^{'std' if name == 'mean' else name} must have the shape"):
        function(**inputs)


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("shape", [(6, 2), (1, 6), (3, 2), (6, 1, 1), ()])
def test_wrong_shape_of_a_vector(function, name: str, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(6, 3)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^{name} must have the shape \[6\] or \[6, 1\]"):
        function(**inputs)


@pytest.mark.parametrize("name", ["std", "old_std"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 3), (1,), ()])
def test_wrong_shape_of_a_std(function, name: str, shape: tuple[int, ...]) -> None:
    """[1, A] and [N, 1] would broadcast; which of the two was meant is not guessed."""
    inputs = make_inputs(6, 3)
    inputs[name] = torch.ones(shape)
    with pytest.raises(ValueError, match=rf"^{name} must have the shape \[3\] or \[6, 3\]"):
        function(**inputs)


@pytest.mark.parametrize("shape", [(6,), (), (6, 0), (0, 3)])
def test_wrong_shape_of_mean(function, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(6, 3)
    inputs["mean"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"^mean must"):
        function(**inputs)


@pytest.mark.parametrize(("shape", "what"), [((4, 0), "A = 0"), ((0, 3), "N = 0"), ((2, 0, 3), "N = 0")])
def test_nothing_to_compute(function, shape: tuple[int, ...], what: str) -> None:
    inputs = dict.fromkeys(MATRICES, torch.ones(shape)) | dict.fromkeys(VECTORS, torch.ones(shape[:-1]))
    with pytest.raises(ValueError, match=rf"^mean must have at least one .*{what}"):
        function(**inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_dtype(function, name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(6, 3)
    inputs[name] = torch.ones_like(inputs[name]).to(dtype)
    with pytest.raises(TypeError, match=rf"^{name} must be float32, float64, bfloat16 or float16, got {dtype}"):
        function(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_not_a_tensor(function, name: str) -> None:
    inputs = make_inputs(6, 3)
    for wrong in (inputs[name].numpy(), inputs[name].tolist(), None):
        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got {type(wrong).__name__}"):
            function(**{**inputs, name: wrong})


@pytest.mark.parametrize("name", NAMES)
def test_wrong_device(function, name: str) -> None:
    inputs = make_inputs(6, 3)
    inputs[name] = inputs[name].to("meta")
    # mean says where the others must be
    wrong, its, others = (r"\w+", "cpu", "meta") if name == "mean" else (name, "meta", "cpu")
    with pytest.raises(ValueError, match=rf"^{wrong} is on {its}, the other arguments are on {others}"):
        function(**inputs)


@pytest.mark.parametrize("name", ["clip_param", "value_loss_coef", "entropy_coef", "kl_coef"])
def test_wrong_coefficient(function, name: str) -> None:
    inputs = make_inputs(6, 3)
    with pytest.raises(ValueError, match=rf"^{name} must be a number or a 0-dim tensor, got shape \[1\]"):
        function(**inputs, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"^{name} is on meta, the other arguments are on cpu"):
        function(**inputs, **{name: torch.zeros((), device="meta")})
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"^{name} must be a floating-point tensor, got {dtype}"):
            function(**inputs, **{name: torch.ones((), dtype=dtype)})
    for wrong in ("0.2", None, True, [0.2]):
        with pytest.raises(TypeError, match=rf"^{name} must be a number or a 0-dim tensor, got {type(wrong).__name__}"):
            function(**inputs, **{name: wrong})


def test_numbers_of_numpy(function) -> None:
    inputs = make_inputs(6, 3)
    of_numpy = function(**inputs, kl_coef=np.float32(0.5), clip_param=np.float64(0.25), num_original=np.int64(4))
    of_python = function(**inputs, kl_coef=0.5, clip_param=0.25, num_original=4)
    one, other = (out[0] if isinstance(out, tuple) else out for out in (of_numpy, of_python))
    assert torch.equal(one.loss, other.loss)


@pytest.mark.parametrize("wrong", [-0.1, float("nan")])
def test_clip_param_that_is_no_range(function, wrong: float) -> None:
    with pytest.raises(ValueError, match=r"^clip_param must be 0 or more"):
        function(**make_inputs(6, 3), clip_param=wrong)


@pytest.mark.parametrize("wrong", [0, -1, 7])
def test_num_original_out_of_range(function, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"^num_original must be between 1 and the number of rows, 6, got {wrong}"):
        function(**make_inputs(6, 3), num_original=wrong)


@pytest.mark.parametrize("wrong", [2.0, True, "3"])
def test_num_original_of_the_wrong_type(function, wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^num_original must be an integer or None"):
        function(**make_inputs(6, 3), num_original=wrong)


@pytest.mark.parametrize("name", ["old_mean", "old_std"])
@pytest.mark.parametrize("num_rows", [3, 5])
def test_old_policy_of_neither_number_of_rows(function, name: str, num_rows: int) -> None:
    """Either the original rows, 4 here, or all 6."""
    inputs = make_inputs(6, 3, old_std_per_row=True)
    inputs[name] = inputs[name][:num_rows]
    with pytest.raises(ValueError, match=f"^{name} must have the shape"):
        function(**inputs, num_original=4)


@pytest.mark.parametrize("wrong", ["forward", "reverse", "OLD_NEW", "", None])
def test_wrong_kl_direction(function, wrong: object) -> None:
    with pytest.raises(ValueError, match=r"^kl_direction must be 'old_new' .* or 'new_old' "):
        function(**make_inputs(6, 3), kl_direction=wrong)


@pytest.mark.parametrize("called", [ppo_loss, ppo_loss_and_grad], ids=lambda f: f.__name__)
def test_wrong_backend(called) -> None:
    with pytest.raises(
        ValueError, match=r"^backend must be one of 'cuda', 'triton', 'cpu', 'eager' or None, got 'gpu'"
    ):
        called(**make_inputs(6, 3), backend="gpu")
    with pytest.raises(ValueError, match=r"^backend must be one of .* got \['cpu'\]"):
        called(**make_inputs(6, 3), backend=["cpu"])


@pytest.mark.parametrize("called", [ppo_loss, ppo_loss_and_grad], ids=lambda f: f.__name__)
def test_backend_of_another_device(called) -> None:
    inputs = {name: t.to("meta") for name, t in make_inputs(6, 3).items()}
    with pytest.raises(ValueError, match=r"^backend 'cpu' runs on cpu tensors, the arguments are on meta"):
        called(**inputs, backend="cpu")


def test_arguments_after_the_tensors_are_keywords() -> None:
    """A forgotten tensor must not turn a coefficient into one."""
    with pytest.raises(TypeError, match="positional"):
        ppo_loss(*make_inputs(6, 3).values(), 0.2)
