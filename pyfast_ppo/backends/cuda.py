"""The CUDA kernels (csrc/cuda): one launch, on the current stream of the tensors' device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast_ppo.backends import _extension, _gpu
from pyfast_ppo.backends._outputs import gradient_of, gradient_of_both
from pyfast_ppo.backends._scratch import ScratchPool, current_stream
from pyfast_ppo.reference import METRICS, arithmetic_dtype

name = "cuda"
DEVICE_TYPE = "cuda"
COMPUTES_IN = (torch.float32, torch.float64)
FOR_TESTS_ONLY = False
GATHERS = True
FUSES_UPDATE = True

_C, _REASON = _extension.load()
_cuda: Any = getattr(_C, "cuda", None)
_scratch = ScratchPool()


@functools.cache
def unavailable_reason() -> str | None:
    if _C is None:
        return _REASON
    if _cuda is None:
        return _C.cuda_note
    return _gpu.missing_reason() or _cuda.unavailable_reason() or None


def detail() -> str:
    return f"{_C.cuda_note}, on {torch.cuda.get_device_name()}"


def _stream(device: torch.device) -> tuple[int, int]:
    return device.index or 0, current_stream(device)


def _launch(function: Callable, device: torch.device, *args: object) -> Any:
    """Calls a function of the extension while ``device`` is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(device):
        return function(*args)


@functools.cache
def _num_partials(num_actions: int, device_index: int) -> int:
    return _cuda.ppo_loss_partials(num_actions, device_index)


def ppo_loss(
    mean: Tensor,  # [N, A]
    std: Tensor,  # [A] or [N, A]
    values: Tensor,  # [N]
    actions: Tensor,  # [N, A]; with row_index [M, A], and so are the other tensors of the rollout
    old_log_prob: Tensor,  # [N]
    old_mean: Tensor,  # [num_original or N, A]
    old_std: Tensor,  # [A] or [num_original or N, A]
    advantages: Tensor,  # [N]
    returns: Tensor,  # [N]
    old_values: Tensor,  # [N]
    clip_param: float | Tensor,
    value_loss_coef: float | Tensor,
    entropy_coef: float | Tensor,
    kl_coef: float | Tensor,
    use_clipped_value_loss: bool,
    kl_new_old: bool,
    num_original: int,
    dtype: torch.dtype,  # of the arithmetic
    row_index: Tensor | None = None,  # [N], int64, contiguous
    keep_scratch: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(metrics, grad_mean, grad_std, grad_values)."""
    inputs = (mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values)
    device = mean.device
    num_rows, num_actions = mean.shape
    stream = _stream(device)
    scratch = _scratch.get(device, stream[1], _num_partials(num_actions, stream[0]), dtype, keep_scratch)
    metrics = torch.empty(len(METRICS), dtype=dtype, device=device)
    grads = gradient_of(mean), gradient_of(std), gradient_of(values)
    _launch(
        _cuda.ppo_loss,
        device,
        (num_rows, num_original, num_actions),
        inputs,
        (clip_param, value_loss_coef, entropy_coef, kl_coef),
        use_clipped_value_loss,
        kl_new_old,
        (metrics, *grads),
        dtype == torch.float64,
        row_index,
        actions.shape[0],
        (scratch.partials, scratch.counter),
        stream,
    )
    return metrics, *grads


# torch.compile may call the operator while it prepares a CUDA graph of its own: what is allocated then belongs to that
# graph's memory and must not be kept for other calls.
ppo_loss_for_compile = functools.partial(ppo_loss, keep_scratch=False)


def gae(
    rewards: Tensor,  # [T, E]
    values: Tensor,  # [T, E]
    dones: Tensor,  # [T, E]
    last_values: Tensor,  # [E]
    gamma: float,
    lam: float,
    time_outs: Tensor | None,  # [T, E]
    final_values: Tensor | None,  # [T, E]
    normalize: bool,
    out: tuple[Tensor, Tensor] | None = None,  # where they are written: [T, E] each, contiguous, of the right dtype
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [T, E]."""
    dtype = arithmetic_dtype(rewards, values, last_values, final_values)
    advantages, returns = out or (torch.empty(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2))
    num_moments = _cuda.gae_moments(rewards.shape[1]) if normalize else 0
    moments = torch.empty(num_moments, dtype=dtype, device=rewards.device)
    _launch(
        _cuda.gae,
        rewards.device,
        tuple(rewards.shape),
        (rewards, values, dones, last_values, time_outs, final_values),
        gamma,
        lam,
        normalize,
        (advantages, returns),
        dtype == torch.float64,
        moments,
        _stream(rewards.device),
    )
    return advantages, returns


def adam_step(
    rows: list,  # of (parameter, exp_avg, exp_avg_sq, step, number of its module)
    rule: tuple,  # beta1, beta2, eps, weight_decay, decoupled
    max_norm: float,
    rate: float | Tensor,
    skip: Tensor | None,  # 0-dim, boolean
    skip_nonfinite: bool,
    lost: Tensor,  # 0-dim, boolean, written to
) -> bool:
    """Whether the step was launched; False where a tensor is not as the kernels take it."""
    device, stream = lost.device, _stream(lost.device)
    scratch = _scratch.get(device, stream[1], _cuda.adam_partials(rows), torch.float64, True)
    memory = scratch.partials, scratch.counter
    return _launch(_cuda.adam_step, device, rows, rule, max_norm, rate, skip, skip_nonfinite, lost, memory, stream)


def adapt_rate(
    rule: tuple,  # desired_kl, min_rate, max_rate, factor, rise_above
    kl: Tensor,  # 0-dim, as the others
    rate: Tensor,
    lost: Tensor | None,  # boolean
    out: Tensor,  # float64
) -> None:
    _launch(_cuda.adapt_rate, out.device, rule, kl, rate, lost, out, _stream(out.device))


def add_bias_and_activate(activation: str, x: Tensor, bias: Tensor) -> Tensor:
    """f(x + bias), in the memory of x: [N, H], [H], contiguous float32. ``activation``: "elu", "relu" or "tanh"."""
    _launch(_cuda.add_bias_and_activate, x.device, activation, tuple(x.shape), x, bias, _stream(x.device))
    return x


def add_bias_and_activate_backward(
    activation: str, grad: Tensor, y: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_bias), with y what ``add_bias_and_activate`` gave. Contiguous float32. ``in_place``: grad_x is
    grad."""
    device, shape = y.device, tuple(y.shape)
    grad_x, grad_bias = grad if in_place else torch.empty_like(y), y.new_empty(shape[1])
    stream = _stream(device)
    size, num_counters = _cuda.activation_partials(*shape), _cuda.activation_counters(shape[1])
    scratch = _scratch.get(device, stream[1], size, torch.float32, True, num_counters)
    _launch(
        _cuda.add_bias_and_activate_backward,
        device,
        activation,
        shape,
        grad,
        y,
        grad_x,
        grad_bias,
        (scratch.partials, scratch.counter),
        stream,
    )
    return grad_x, grad_bias


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[N, A], [N, A], [A] or [N, A] -> [N]."""
    return _row_sums(_cuda.gaussian_log_prob, (actions, mean, std))


def gaussian_log_prob_backward(grad: Tensor, actions: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_mean, grad_std); the actions have the negative of the first, whose dtype suits both."""
    return _gradients(_cuda.gaussian_log_prob_backward, grad, (actions, mean, std), (mean, std), (actions, None))


def gaussian_kl_loss(
    which: int, actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor
) -> tuple[Tensor, Tensor]:
    """(value, coefficient), each [N], of the loss ``KL_LOSSES[which]``."""
    dtype, device = arithmetic_dtype(actions, mean, std, old_log_prob), mean.device
    value, coefficient = torch.empty(2, mean.shape[0], dtype=dtype, device=device).unbind()
    _launch(
        _cuda.gaussian_kl_loss,
        device,
        (*mean.shape, dtype == torch.float64),
        which,
        (actions, mean, std),
        old_log_prob,
        value,
        coefficient,
        _stream(device),
    )
    return value, coefficient


def gaussian_entropy(std: Tensor) -> Tensor:
    """[N, A] -> [N]."""
    return _row_sums(_cuda.gaussian_entropy, (std,))


def gaussian_entropy_backward(grad: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_std,)."""
    return _gradients(_cuda.gaussian_entropy_backward, grad, (std,), (std,), (None,))


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """[N, A], [A] or [N, A], [N, A], [A] or [N, A] -> [N]."""
    return _row_sums(_cuda.gaussian_kl, (mean_p, std_p, mean_q, std_q))


def gaussian_kl_backward(
    grad: Tensor, mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor
) -> tuple[Tensor, ...]:
    """(grad_mean_p, grad_std_p, grad_std_q); mean_q has the negative of the first, whose dtype suits both."""
    return _gradients(
        _cuda.gaussian_kl_backward,
        grad,
        (mean_p, std_p, mean_q, std_q),
        (mean_p, std_p, std_q),
        (mean_q, None, None),
    )


def _shape(inputs: tuple[Tensor, ...]) -> tuple[int, int, bool]:
    num_rows = max(t.shape[0] for t in inputs if t.dim() == 2)
    return num_rows, inputs[0].shape[-1], arithmetic_dtype(*inputs) == torch.float64


def _row_sums(function: Callable, inputs: tuple[Tensor, ...]) -> Tensor:
    shape = _shape(inputs)
    out = torch.empty(shape[0], dtype=arithmetic_dtype(*inputs), device=inputs[0].device)
    _launch(function, out.device, shape, inputs, out, _stream(out.device))
    return out


def _gradients(
    function: Callable,
    grad: Tensor,
    inputs: tuple[Tensor, ...],
    of: tuple[Tensor, ...],
    shared_with: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The gradients of the tensors ``of``; where another tensor gets the negated one, in a dtype that suits both."""
    shape, dtype = _shape(inputs), arithmetic_dtype(*inputs)
    outputs = []
    for t, other in zip(of, shared_with, strict=True):
        if t.dim() == 1:  # partial sums, one row per block
            outputs.append(torch.empty(_cuda.gaussian_blocks(shape), shape[1], dtype=dtype, device=t.device))
        else:
            outputs.append(gradient_of(t) if other is None else gradient_of_both(t, other))
    _launch(function, grad.device, shape, inputs, grad, tuple(outputs), _stream(grad.device))
    return tuple(o.sum(0).to(t.dtype) if t.dim() == 1 else o for o, t in zip(outputs, of, strict=True))
