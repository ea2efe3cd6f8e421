"""The PPO loss with all its gradients in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyfast_ppo import backends, reference
from pyfast_ppo.ops import _arguments as arguments
from pyfast_ppo.ops._autograd import first_order_only
from pyfast_ppo.ops._library import LIBRARY
from pyfast_ppo.ops.shared_row import is_in_torch_func, is_transformed, spread_over_rows

KL_DIRECTIONS = ("old_new", "new_old")


class PPOLossOutput:
    """What ``ppo_loss`` returns: 0-dim tensors on the device of the inputs. Only ``loss`` carries a gradient.

    By name, or as a sequence in the order of ``_fields``. A tensor is made when it is asked for: making all of them
    would cost as much as launching the kernel.
    """

    _fields = reference.METRICS

    def __init__(self, loss: Tensor | None, metrics: Tensor) -> None:
        """``metrics``: [9], as every backend returns them; ``loss``: the one with a gradient, or None."""
        self._loss = loss
        self._metrics = metrics

    @property
    def loss(self) -> Tensor:
        """surrogate + value_loss_coef · value_loss - entropy_coef · entropy + kl_coef · kl"""
        return self._metric("loss") if self._loss is None else self._loss

    @property
    def surrogate(self) -> Tensor:
        """Mean over all rows of max(-A·r, -A·clamp(r, 1 - ε, 1 + ε))."""
        return self._metric("surrogate")

    @property
    def value_loss(self) -> Tensor:
        """Mean over all rows of the (clipped) squared error, without a factor ½."""
        return self._metric("value_loss")

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the new policy over the original rows, in nats."""
        return self._metric("entropy")

    @property
    def kl(self) -> Tensor:
        """Mean exact KL in ``kl_direction`` over the original rows, in nats."""
        return self._metric("kl")

    @property
    def approx_kl(self) -> Tensor:
        """Mean over all rows of (r - 1) - log r, Schulman's k3 estimate of KL(old‖new), as ``kl.estimate`` has it."""
        return self._metric("approx_kl")

    @property
    def clip_fraction(self) -> Tensor:
        """Share of all rows whose ratio lies outside [1 - ε, 1 + ε]."""
        return self._metric("clip_fraction")

    @property
    def max_ratio(self) -> Tensor:
        """The largest ratio; at most e²⁰, because the log-ratio is clamped to ±20 inside exp."""
        return self._metric("max_ratio")

    @property
    def nonfinite(self) -> Tensor:
        """Number of rows with an input or a log-ratio that is not finite, or a std that is 0, negative or subnormal."""
        return self._metric("nonfinite")

    @property
    def stacked(self) -> Tensor:
        """All of them, [9], in the order of ``_fields``; none carries a gradient. No copy."""
        return self._metrics

    def _metric(self, name: str) -> Tensor:
        return self._metrics[reference.METRICS.index(name)]

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[Tensor]:
        yield self.loss
        yield from self._metrics.unbind()[1:]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in zip(self._fields, self, strict=True))
        return f"PPOLossOutput({fields})"


class _Call(NamedTuple):
    """Arguments that were checked and made flat, in the order in which backends take them."""

    mean: Tensor  # [N, A]
    std: Tensor  # [A] or [N, A]
    values: Tensor  # [N] or [N, 1]; so are the other vectors
    actions: Tensor  # [N, A]
    old_log_prob: Tensor
    old_mean: Tensor  # [num_original or N, A]
    old_std: Tensor  # [A] or [num_original or N, A]
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    clip_param: float | Tensor
    value_loss_coef: float | Tensor
    entropy_coef: float | Tensor
    kl_coef: float | Tensor
    use_clipped_value_loss: bool
    kl_new_old: bool
    num_original: int
    dtype: torch.dtype  # of the arithmetic
    row_index: Tensor | None  # [N]


def ppo_loss(
    mean: Tensor,
    std: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    *,
    clip_param: float | Tensor = 0.2,
    value_loss_coef: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.01,
    use_clipped_value_loss: bool = True,
    kl_coef: float | Tensor = 0.0,
    kl_direction: str = "old_new",
    num_original: int | None = None,
    row_index: Tensor | None = None,
    backend: str | None = None,
) -> PPOLossOutput:
    """The loss of rsl_rl 5.5's ``PPO.update`` for a diagonal Gaussian policy, plus ``kl_coef`` times the exact KL.

    Forward and backward are one pass over the rows: each input is read once, and the loss, the metrics and every
    gradient come out of the same kernel. The log-ratio is log π_new(a) - ``old_log_prob``; ``old_mean`` and ``old_std``
    only enter the KL. The same inputs give the same bits.

    Args:
        mean: Means of the new policy. [N, A]; any leading dimensions instead of N, as long as all arguments agree.
        std: Standard deviations of the new policy, > 0. [A] or [N, A]. An expanded view (stride 0) is treated as [A];
            its own gradient is then that row's, in equal parts. ``std.contiguous()`` has one for each row.
        values: The critic's values. [N] or [N, 1].
        actions: Actions of the rollout. [N, A].
        old_log_prob: Log-probabilities of the actions at the rollout. [N] or [N, 1].
        old_mean: Means of the old policy. [N, A], or [num_original, A].
        old_std: Standard deviations of the old policy, > 0. [A], [N, A] or [num_original, A].
        advantages: Advantages. [N] or [N, 1].
        returns: Targets of the critic. [N] or [N, 1].
        old_values: Values at the rollout. [N] or [N, 1].
        clip_param: ε of the clipped surrogate and of the clipped value loss. Like the coefficients a number, or a 0-dim
            tensor that is read on the device; it gets no gradient.
        value_loss_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy.
        use_clipped_value_loss: Clip the value step as in Schulman et al. 2017; else the plain squared error.
        kl_coef: Weight of the exact KL. 0 keeps a KL that overflows out of the loss and of the gradients.
        kl_direction: "old_new" for KL(old‖new), "new_old" for KL(new‖old).
        num_original: Only the first rows enter the entropy and the KL (symmetry augmentation). None: all.
        row_index: Which rows of the rollout these are: row i of ``mean``, ``std`` and ``values`` belongs to row
            ``row_index[i]`` of ``actions``, ``old_*``, ``advantages`` and ``returns``, which are then whole rollouts of
            M rows. int64, [N]. The CUDA kernel reads them in place, so that a mini-batch is never copied; other
            backends copy. An index outside of 0 ≤ i < M is a fault in the data on a GPU, an IndexError elsewhere.
        backend: "cuda", "triton", "cpu", "eager", or None for the best that is available.

    Returns:
        ``PPOLossOutput``. Gradients flow from ``loss`` to ``mean``, ``std`` and ``values`` alone. A second derivative
        is refused. (Of what torch.compile compiled, torch refuses it in ``backward()`` alone, and before 2.12 not even
        there: else it may be left out without a word.)

    Raises:
        ValueError: A shape, device, coefficient or backend that does not fit; A = 0; N = 0.
        TypeError: A tensor that is not float32, float64, bfloat16 or float16, or that the backend does not compute
            with; something that is no tensor, or no number.
        IndexError: See ``row_index``.
        RuntimeError: The backend is not available, or see below.

    Faults in the data (a std that is 0, negative or subnormal, NaN, infinity) are not looked for on the host: they are
    counted in ``nonfinite`` and show in the loss.

    ``torch.func`` (grad, vmap, jvp) and forward-mode differentiation transform ``ppo_loss_reference``; this refuses
    them with a RuntimeError. What gets no gradient has no tangent, either.
    """
    call = _prepare(
        mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values, clip_param,
        value_loss_coef, entropy_coef, use_clipped_value_loss, kl_coef, kl_direction, num_original, row_index,
    )  # fmt: skip
    call = call._replace(mean=_scalable(call.mean), std=_scalable(call.std), values=_scalable(call.values))
    if torch.compiler.is_compiling():
        if _is_eager(backend, mean.device.type):  # the compiler sees the formula itself, and fuses it
            loss, metrics = reference.ppo_loss(*_gathered(call))
            return PPOLossOutput(loss, metrics)
        loss, metrics, *_ = torch.ops.pyfast_ppo.ppo_loss(*_to_op(_gathered(call)), backend)
        return PPOLossOutput(loss, metrics.detach())
    if is_transformed():
        _refuse_transforms(mean, std, values)
    run = backends.select(backend, call.mean.device, call.dtype)
    arguments_of_run = call if run.GATHERS else _gathered(call)
    if torch.is_grad_enabled() and (call.mean.requires_grad or call.std.requires_grad or call.values.requires_grad):
        loss, metrics = _PPOLoss.apply(*call[:3], run, arguments_of_run[3:])
        return PPOLossOutput(loss, metrics)
    metrics, *_ = run.ppo_loss(*arguments_of_run)
    return PPOLossOutput(None, metrics)


def ppo_loss_and_grad(
    mean: Tensor,
    std: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    *,
    clip_param: float | Tensor = 0.2,
    value_loss_coef: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.01,
    use_clipped_value_loss: bool = True,
    kl_coef: float | Tensor = 0.0,
    kl_direction: str = "old_new",
    num_original: int | None = None,
    row_index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[PPOLossOutput, tuple[Tensor, Tensor, Tensor]]:
    """As ``ppo_loss``, without autograd: returns ``(out, (grad_mean, grad_std, grad_values))``.

    The gradients have the shapes and dtypes of ``mean``, ``std`` and ``values``, ready for
    ``torch.autograd.backward([mean, std, values], grads)``. For a std that is an expanded view of one row, that row's
    gradient comes in equal parts for each of the N rows, so that what it was expanded from sums up to it (float16,
    which cannot hold the parts: all of it for the first row). Those of float16 tensors have a share of 1 / N in
    float16, whose step is 6e-8 there; ``ppo_loss`` with a gradient scaler keeps their digits.

    It can be part of a CUDA graph; call it once before the capture, so that kernels are loaded by then. Under
    ``torch.compile(fullgraph=True)`` it needs another backend than "eager", which calls autograd itself.
    """
    call = _prepare(
        mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values, clip_param,
        value_loss_coef, entropy_coef, use_clipped_value_loss, kl_coef, kl_direction, num_original, row_index,
    )  # fmt: skip
    if torch.compiler.is_compiling() and not _is_eager(backend, mean.device.type):
        _, *outputs = torch.ops.pyfast_ppo.ppo_loss(*_to_op(_gathered(call)), backend)
    else:
        if is_transformed():
            _refuse_transforms(mean, std, values)
        run = backends.select(backend, call.mean.device, call.dtype)
        outputs = run.ppo_loss(*(call if run.GATHERS else _gathered(call)))
    metrics, grad_mean, grad_std, grad_values = outputs
    if std.dim() > 1 and grad_std.dim() == 1:
        grad_std = spread_over_rows(grad_std, std.shape)
    if call.mean is not mean or call.std is not std or call.values is not values:
        grad_mean, grad_std, grad_values = (
            grad_mean.view(mean.shape),
            grad_std.view(std.shape),
            grad_values.view(values.shape),
        )
    return PPOLossOutput(None, metrics), (grad_mean, grad_std, grad_values)


def ppo_loss_reference(
    mean: Tensor,
    std: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    *,
    clip_param: float | Tensor = 0.2,
    value_loss_coef: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.01,
    use_clipped_value_loss: bool = True,
    kl_coef: float | Tensor = 0.0,
    kl_direction: str = "old_new",
    num_original: int | None = None,
    row_index: Tensor | None = None,
) -> PPOLossOutput:
    """As ``ppo_loss``, in plain PyTorch with autograd's own derivatives (``pyfast_ppo/reference.py``): the oracle."""
    call = _prepare(
        mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values, clip_param,
        value_loss_coef, entropy_coef, use_clipped_value_loss, kl_coef, kl_direction, num_original, row_index,
    )  # fmt: skip
    loss, metrics = reference.ppo_loss(*_gathered(_without_rollout_gradients(call)))
    return PPOLossOutput(loss, metrics)


def _prepare(
    mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values, clip_param,
    value_loss_coef, entropy_coef, use_clipped_value_loss, kl_coef, kl_direction, num_original, row_index,
) -> _Call:  # fmt: skip
    """Checks every argument and makes the tensors flat."""
    inputs = (mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values)
    numbers = (clip_param, value_loss_coef, entropy_coef, kl_coef)
    use_clipped_value_loss, kl_new_old = bool(use_clipped_value_loss), kl_direction == "new_old"
    if _is_plain(numbers, kl_direction, num_original, row_index):
        dtype = backends.plain_dtype(inputs)
        if dtype is not None:  # the common case, at a fraction of the cost of what follows; kernels see no gradients
            return _Call(*inputs, *numbers, use_clipped_value_loss, kl_new_old, mean.shape[0], dtype, None)
    leading = arguments.check_matrix("mean", mean)
    device, shape = mean.device, mean.shape
    num_rows = math.prod(leading)  # numel() would make a number of a symbol of torch.export
    if isinstance(num_original, Integral) and not isinstance(num_original, (bool, int)):
        num_original = int(num_original)  # NumPy's
    if num_original is None:
        num_original = num_rows
    elif isinstance(num_original, bool) or not isinstance(num_original, (int, torch.SymInt)):
        raise TypeError(f"num_original must be an integer or None, got {type(num_original).__name__}")
    elif not 1 <= num_original <= num_rows:
        raise ValueError(f"num_original must be between 1 and the number of rows, {num_rows}, got {num_original}")
    if kl_direction not in KL_DIRECTIONS:
        raise ValueError(
            f"kl_direction must be 'old_new' (KL(old‖new)) or 'new_old' (KL(new‖old)), got {kl_direction!r}"
        )
    clip_param = arguments.coefficient("clip_param", clip_param, device)
    if isinstance(clip_param, float) and not clip_param >= 0.0:
        raise ValueError(f"clip_param must be 0 or more, got {clip_param}")
    rollout, rollout_shape = leading, shape
    original_shape = torch.Size((num_original, shape[-1]))  # augmented rows have no old distribution of their own
    if row_index is not None:
        rollout = arguments.check_matrix("actions", actions)
        original_shape = rollout_shape = actions.shape
        if rollout_shape[-1] != shape[-1]:
            raise ValueError(f"actions must have {shape[-1]} action dimensions, as mean has, got {rollout_shape[-1]}")
        row_index = arguments.row_index("row_index", row_index, num_rows, device)
    call = _Call(
        mean=arguments.rows("mean", mean, shape, device),
        std=arguments.row_or_rows("std", std, shape, device),
        values=arguments.vector("values", values, leading, device),
        actions=arguments.rows("actions", actions, rollout_shape, device),
        old_log_prob=arguments.vector("old_log_prob", old_log_prob, rollout, device),
        old_mean=arguments.rows("old_mean", old_mean, _either(old_mean, original_shape, rollout_shape), device),
        old_std=arguments.row_or_rows("old_std", old_std, _either(old_std, original_shape, rollout_shape), device),
        advantages=arguments.vector("advantages", advantages, rollout, device),
        returns=arguments.vector("returns", returns, rollout, device),
        old_values=arguments.vector("old_values", old_values, rollout, device),
        clip_param=clip_param,
        value_loss_coef=arguments.coefficient("value_loss_coef", value_loss_coef, device),
        entropy_coef=arguments.coefficient("entropy_coef", entropy_coef, device),
        kl_coef=arguments.coefficient("kl_coef", kl_coef, device),
        use_clipped_value_loss=use_clipped_value_loss,
        kl_new_old=kl_new_old,
        num_original=num_original,
        dtype=reference.arithmetic_dtype(*inputs),
        row_index=row_index,
    )
    return _without_rollout_gradients(call)


def _is_plain(numbers: tuple, kl_direction: str, num_original: int | None, row_index: Tensor | None) -> bool:
    """Whether all that is no tensor is right, and no tensor where a number may stand."""
    clip_param, value_loss_coef, entropy_coef, kl_coef = numbers
    return (
        num_original is None
        and row_index is None
        and type(clip_param) is float
        and clip_param >= 0.0
        and type(value_loss_coef) is float
        and type(entropy_coef) is float
        and type(kl_coef) is float
        and kl_direction in KL_DIRECTIONS
        and not torch.compiler.is_compiling()
    )


def _gathered(call: _Call) -> tuple:
    """The arguments without ``row_index``: a copy of the rollout's rows, in its order."""
    if call.row_index is None:
        return call[:-1]
    names = ["actions", "old_log_prob", "old_mean", "advantages", "returns", "old_values"]
    if call.old_std.dim() == 2:  # else one row for all
        names.append("old_std")
    try:
        return call._replace(**{name: getattr(call, name).index_select(0, call.row_index) for name in names})[:-1]
    except IndexError as error:  # on the CPU; a GPU does not look
        num_rows = call.actions.shape[0]
        raise IndexError(f"row_index must be between 0 and {num_rows - 1}, the rollout's last row ({error})") from None


@torch.compiler.assume_constant_result
def _is_eager(backend: str | None, device_type: str) -> bool:
    return backends.select(backend, torch.device(device_type)).name == "eager"


def _without_rollout_gradients(call: _Call) -> _Call:
    """Nor tangents, of forward mode."""
    transformed = torch.compiler.is_compiling() or is_transformed()
    names = _Call._fields[3:_NUM_TENSORS]
    detached = {name: t.detach() for name in names if (t := getattr(call, name)).requires_grad or transformed}
    return call._replace(**detached) if detached else call


def _scalable(t: Tensor) -> Tensor:
    """float16 cannot hold gradients of a mean over many rows: they are rounded to it after a GradScaler's factor."""
    return t.float() if t.dtype == torch.float16 else t


def _either(t: Tensor, first: torch.Size, second: torch.Size) -> torch.Size:
    """The one that ``t`` has, or the second; by the number of dimensions first, as in ``arguments.row_or_rows``."""
    return first if isinstance(t, Tensor) and t.dim() == len(first) and t.shape == first else second


def _refuse_transforms(*differentiable: Tensor) -> None:
    """Tangents (torch.autograd.forward_ad, torch.func.jvp), which kernels would lose, and torch.func, in which any
    tensor, a new one too, may have no memory that a kernel could find."""
    if any(forward_ad.unpack_dual(t).tangent is not None for t in differentiable):
        raise RuntimeError("ppo_loss has no derivative in forward mode; ppo_loss_reference has one")
    if is_in_torch_func():
        raise RuntimeError("ppo_loss cannot be transformed by torch.func; ppo_loss_reference can be")


class _PPOLoss(torch.autograd.Function):
    """The kernel has computed the gradients already: backward only scales them."""

    @staticmethod
    def forward(ctx, mean, std, values, run, rest):
        metrics, *grads = run.ppo_loss(mean, std, values, *rest)
        ctx.save_for_backward(*grads)
        ctx.inputs = mean, std, values  # not saved: backward does not read them, so that they may change before it
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return metrics[0].clone(), metrics

    @staticmethod
    @first_order_only
    def backward(ctx, grads, grad_loss, _):
        if grad_loss is None:  # what was made of the loss gave it no gradient
            return (None,) * len(ctx.needs_input_grad)
        if not _is_known_to_be_one(grad_loss):
            grads = _scale(grad_loss, grads)
        return *grads, None, None


def _is_known_to_be_one(grad_loss: Tensor) -> bool:
    # only in host memory: on a device the question would have to wait for the answer
    if grad_loss.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return grad_loss.item() == 1.0
    except RuntimeError:  # a batch of gradients has no one number
        return False


def _scale(grad_loss: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    try:
        return torch._foreach_mul(list(grads), grad_loss)
    except RuntimeError:  # torch has no rule for a batch of gradients
        return tuple(grad * grad_loss for grad in grads)


# --- the operator that torch.compile sees ---------------------------------------------------------------------------
#
# A coefficient is a number or a tensor; a schema has no such type, so each comes as both, the tensor first.

_COEFFICIENTS = ("clip_param", "value_loss_coef", "entropy_coef", "kl_coef")

LIBRARY.define(
    "ppo_loss(Tensor mean, Tensor std, Tensor values, Tensor actions, Tensor old_log_prob, Tensor old_mean, "
    "Tensor old_std, Tensor advantages, Tensor returns, Tensor old_values, "
    + ", ".join(f"Tensor? {name}_tensor, float {name}" for name in _COEFFICIENTS)
    + ", bool use_clipped_value_loss, bool kl_new_old, SymInt num_original, str? backend)"
    " -> (Tensor loss, Tensor metrics, Tensor grad_mean, Tensor grad_std, Tensor grad_values)"
)
_NUM_TENSORS = 10
_NUM_OP_ARGUMENTS = _NUM_TENSORS + 2 * len(_COEFFICIENTS) + 4


def _to_op(call: tuple) -> tuple:
    pairs: list[Any] = []
    for value in call[_NUM_TENSORS : _NUM_TENSORS + len(_COEFFICIENTS)]:
        pairs += (value, 0.0) if isinstance(value, Tensor) else (None, value)
    return (*call[:_NUM_TENSORS], *pairs, *call[_NUM_TENSORS + len(_COEFFICIENTS) : -1])  # without the dtype


def _op(*args):
    *inputs, use_clipped_value_loss, kl_new_old, num_original, backend = args
    pairs = inputs[_NUM_TENSORS:]
    coefficients = [pairs[i + 1] if pairs[i] is None else pairs[i] for i in range(0, len(pairs), 2)]
    dtype = reference.arithmetic_dtype(*inputs[:_NUM_TENSORS])
    run = backends.select(backend, inputs[0].device, dtype)
    ppo_loss = getattr(run, "ppo_loss_for_compile", run.ppo_loss)
    outputs = ppo_loss(*inputs[:_NUM_TENSORS], *coefficients, use_clipped_value_loss, kl_new_old, num_original, dtype)
    return outputs[0][0].clone(), *outputs


def _op_fake(mean, std, values, *rest):
    dtype = reference.arithmetic_dtype(mean, std, values, *rest[: _NUM_TENSORS - 3])
    return (
        mean.new_empty((), dtype=dtype),
        mean.new_empty(len(reference.METRICS), dtype=dtype),
        mean.new_empty(mean.shape),
        std.new_empty(std.shape),
        values.new_empty(values.shape),
    )


def _op_setup_context(ctx, inputs, output):
    _, metrics, *grads = output
    ctx.mark_non_differentiable(metrics, *grads)
    ctx.save_for_backward(*grads)


def _op_backward(ctx, grad_loss, *_):
    return *_scale(grad_loss, ctx.saved_tensors), *(None,) * (_NUM_OP_ARGUMENTS - 3)


LIBRARY.impl("ppo_loss", _op, "CompositeExplicitAutograd")
torch.library.register_fake("pyfast_ppo::ppo_loss", _op_fake, lib=LIBRARY)
torch.library.register_autograd("pyfast_ppo::ppo_loss", _op_backward, setup_context=_op_setup_context, lib=LIBRARY)
