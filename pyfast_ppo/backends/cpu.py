"""The C++ kernels (csrc/cpu): torch's threads, SIMD, one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_ppo.backends import _extension
from pyfast_ppo.reference import METRICS, arithmetic_dtype

name = "cpu"
DEVICE_TYPE = "cpu"
COMPUTES_IN = (torch.float32, torch.float64)
FOR_TESTS_ONLY = False

_C, _REASON = _extension.load()

_DTYPE_CODES = {  # DType in csrc/cpu/tensor.h
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.bool: 4,
}

_NO_TENSOR = (0, 0, 0, 0)


def unavailable_reason() -> str | None:
    return _REASON


def detail() -> str:
    return f"C++ ({_C.isa()}), {torch.get_num_threads()} threads ({_C.threading()})"


def _view(t: Tensor) -> tuple[int, int, int, int]:
    """(address, dtype code, row stride, column stride) of [N, A], of [N], or of a shared row [A] if ``t`` is one."""
    if t.dim() == 2:
        return (t.data_ptr(), _DTYPE_CODES[t.dtype], *t.stride())
    return (t.data_ptr(), _DTYPE_CODES[t.dtype], *t.stride(), 1)


def _row_or_matrix(t: Tensor) -> tuple[int, int, int, int]:
    """As ``_view``, but one dimension means a row [A] that all rows share."""
    if t.dim() == 2:
        return _view(t)
    return (t.data_ptr(), _DTYPE_CODES[t.dtype], 0, t.stride(0))


def _coefficient(value: float | Tensor) -> tuple[int, int, float]:
    """(address, dtype code, -) of a tensor, or (0, -, number)."""
    return (value.data_ptr(), _DTYPE_CODES[value.dtype], 0.0) if isinstance(value, Tensor) else (0, 0, value)


def _output(t: Tensor) -> tuple[int, int]:
    return (t.data_ptr(), _DTYPE_CODES[t.dtype])


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _empty_for(t: Tensor, other: Tensor) -> Tensor:
    """For a gradient that both tensors get, up to its sign: of a dtype that loses nothing for either."""
    return torch.empty(t.shape, dtype=torch.promote_types(t.dtype, other.dtype))


def ppo_loss(
    mean: Tensor,  # [N, A]
    std: Tensor,  # [A] or [N, A]
    values: Tensor,  # [N]
    actions: Tensor,  # [N, A]
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(metrics, grad_mean, grad_std, grad_values)."""
    dtype = arithmetic_dtype(
        mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values
    )
    metrics = torch.empty(len(METRICS), dtype=dtype)
    grad_mean, grad_std, grad_values = _empty_like(mean), _empty_like(std), _empty_like(values)
    _C.ppo_loss(
        (mean.shape[0], num_original, mean.shape[1]),
        _view(mean),
        _row_or_matrix(std),
        _view(values),
        _view(actions),
        _view(old_log_prob),
        _view(old_mean),
        _row_or_matrix(old_std),
        _view(advantages),
        _view(returns),
        _view(old_values),
        tuple(map(_coefficient, (clip_param, value_loss_coef, entropy_coef, kl_coef))),
        use_clipped_value_loss,
        kl_new_old,
        _output(metrics),
        _output(grad_mean),
        _output(grad_std),
        _output(grad_values),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return metrics, grad_mean, grad_std, grad_values


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
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [T, E]."""
    dtype = arithmetic_dtype(rewards, values, last_values, final_values)
    advantages = torch.empty(rewards.shape, dtype=dtype)
    returns = torch.empty(rewards.shape, dtype=dtype)
    _C.gae(
        tuple(rewards.shape),
        _view(rewards),
        _view(values),
        _view(dones),
        _row_or_matrix(last_values),
        _NO_TENSOR if time_outs is None else _view(time_outs),
        _NO_TENSOR if final_values is None else _view(final_values),
        gamma,
        lam,
        normalize,
        advantages.data_ptr(),
        returns.data_ptr(),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return advantages, returns


def _shape(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int, bool, int]:
    return rows, cols, dtype == torch.float64, torch.get_num_threads()


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[N, A], [N, A], [A] or [N, A] -> [N]."""
    dtype = arithmetic_dtype(actions, mean, std)
    out = torch.empty(mean.shape[0], dtype=dtype)
    _C.gaussian_log_prob(_shape(*mean.shape, dtype), _view(actions), _view(mean), _row_or_matrix(std), _output(out))
    return out


def gaussian_log_prob_backward(grad: Tensor, actions: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_actions, grad_mean, grad_std)."""
    grad_mean, grad_std = _empty_for(mean, actions), _empty_like(std)
    _C.gaussian_log_prob_backward(
        _shape(*mean.shape, arithmetic_dtype(actions, mean, std)),
        _view(actions),
        _view(mean),
        _row_or_matrix(std),
        _view(grad),
        _output(grad_mean),
        _output(grad_std),
    )
    return (-grad_mean).to(actions.dtype), grad_mean.to(mean.dtype), grad_std


def gaussian_entropy(std: Tensor) -> Tensor:
    """[N, A] -> [N]."""
    out = torch.empty(std.shape[0], dtype=arithmetic_dtype(std))
    _C.gaussian_entropy(_shape(*std.shape, out.dtype), _view(std), _output(out))
    return out


def gaussian_entropy_backward(grad: Tensor, std: Tensor) -> tuple[Tensor]:
    """(grad_std,)."""
    grad_std = _empty_like(std)
    _C.gaussian_entropy_backward(_shape(*std.shape, arithmetic_dtype(std)), _view(std), _view(grad), _output(grad_std))
    return (grad_std,)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """[N, A], [A] or [N, A], [N, A], [A] or [N, A] -> [N]."""
    dtype = arithmetic_dtype(mean_p, std_p, mean_q, std_q)
    out = torch.empty(mean_p.shape[0], dtype=dtype)
    _C.gaussian_kl(
        _shape(*mean_p.shape, dtype),
        _view(mean_p),
        _row_or_matrix(std_p),
        _view(mean_q),
        _row_or_matrix(std_q),
        _output(out),
    )
    return out


def gaussian_kl_backward(
    grad: Tensor, mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor
) -> tuple[Tensor, ...]:
    """(grad_mean_p, grad_std_p, grad_mean_q, grad_std_q)."""
    grad_mean_p = _empty_for(mean_p, mean_q)
    grad_std_p, grad_std_q = _empty_like(std_p), _empty_like(std_q)
    _C.gaussian_kl_backward(
        _shape(*mean_p.shape, arithmetic_dtype(mean_p, std_p, mean_q, std_q)),
        _view(mean_p),
        _row_or_matrix(std_p),
        _view(mean_q),
        _row_or_matrix(std_q),
        _view(grad),
        _output(grad_mean_p),
        _output(grad_std_p),
        _output(grad_std_q),
    )
    return grad_mean_p.to(mean_p.dtype), grad_std_p, (-grad_mean_p).to(mean_q.dtype), grad_std_q
