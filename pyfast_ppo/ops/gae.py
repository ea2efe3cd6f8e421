"""Generalised advantage estimation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyfast_ppo import backends, reference
from pyfast_ppo.ops import _arguments as arguments
from pyfast_ppo.ops.shared_row import is_in_torch_func

_ARGUMENTS = (
    "rewards", "values", "dones", "last_values", "gamma", "lam", "time_outs", "final_values", "normalize",
)  # fmt: skip


def gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    gamma: float,
    lam: float,
    *,
    time_outs: Tensor | None = None,
    final_values: Tensor | None = None,
    normalize: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of T steps in E environments (Schulman et al. 2016; time-outs as in Pardo et al. 2018).

    δ_t = r_t + γ V(s_{t+1}) - V(s_t) and A_t = δ_t + γλ A_{t+1}; where an episode ends, A_{t+1} counts as 0, and
    V(s_{t+1}) as 0 or, on a time-out, as the value of the state in which the episode was cut off.

    Args:
        rewards: [T, E] (here and below also [T, E, 1], as rsl_rl stores it).
        values: V(s_t). [T, E].
        dones: Whether the step ended its episode, for any reason. Boolean, integer or floating. [T, E].
        last_values: V of the observation after the last step. [E] or [E, 1].
        gamma: Discount factor γ. Like λ a number; a tensor of one is read on the host, which waits for a GPU.
        lam: λ.
        time_outs: Whether the episode was ended by its time limit, not by the task. [T, E]. Only looked at where
            ``dones`` is true.
        final_values: On time-outs, the value of the observation before the reset; elsewhere anything. [T, E]. Without
            it a time-out bootstraps from V(s_t), as rsl_rl does.
        normalize: Also bring the advantages to mean 0 and unbiased standard deviation 1, as rsl_rl does:
            (A - mean) / (std + 1e-8).
        out: Where (advantages, returns) are written: contiguous tensors, shaped as ``rewards``, float64 if any argument
            is, else float32, in memory that neither an argument nor the other of the two shares. None: new ones.
        backend: "cuda", "triton", "cpu", "eager", or None for the best that is available. Under torch.compile
            and in torch.func the formula itself runs, and only the name is looked at.

    Returns:
        (advantages, returns), shaped as ``rewards``; returns = advantages (before normalisation) + values. They
        carry no gradients.

    Raises:
        ValueError: A shape, device or backend that does not fit; T = 0; E = 0; ``out`` that is not contiguous, shares
            memory, or requires a gradient where gradients are recorded.
        TypeError: A tensor of a type that does not fit; something that is no tensor, or no number.
        RuntimeError: The backend is not available.
    """
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}")
    shape, device = rewards.shape, rewards.device
    if not (rewards.dim() == 2 or (rewards.dim() == 3 and shape[-1] == 1)):
        raise ValueError(f"rewards must be [T, E] or [T, E, 1], got {list(shape)}")
    if rewards.numel() == 0:
        raise ValueError(f"rewards must have at least one step and one environment, got {list(shape)}")
    steps_by_envs = shape[:2]
    last = arguments.vector("last_values", last_values, steps_by_envs[1:], device).detach().reshape(-1)
    if final_values is not None and time_outs is None:
        raise ValueError("final_values needs time_outs, which say where it counts")
    args = (
        _floats("rewards", rewards, steps_by_envs, device),
        _floats("values", values, steps_by_envs, device),
        _flags("dones", dones, steps_by_envs, device),
        last,
        _number("gamma", gamma),
        _number("lam", lam),
        None if time_outs is None else _flags("time_outs", time_outs, steps_by_envs, device),
        None if final_values is None else _floats("final_values", final_values, steps_by_envs, device),
        bool(normalize),
    )
    dtype = reference.arithmetic_dtype(rewards, values, last, final_values)
    places = None if out is None else _places(out, steps_by_envs, dtype, device)
    if torch.compiler.is_compiling() or is_in_torch_func():
        backends.check_name(backend)
        with torch.no_grad():  # the compiler sees the formula itself, and fuses it; of torch.func kernels know nothing
            advantages, returns = reference.gae(*args, places)
    else:
        run = backends.select(backend, device, dtype)
        if out is not None and places is not None:
            _check_memory(out, places, args)
        advantages, returns = run.gae(*args, places)
        for t in out or ():  # autograd has to know that they are not what it may have saved
            if not t.is_inference():
                increment_version(t)
    return out if out is not None else (advantages.view(shape), returns.view(shape))


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, (int, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return float(value)
    if hasattr(value, "shape") and math.prod(value.shape) != 1:
        raise ValueError(f"{name} must be a number, got shape {list(value.shape)}")
    if isinstance(value, (bool, str, bytes)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _places(
    out: tuple[Tensor, Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError("out must be a tuple of two tensors, for the advantages and the returns")
    places = []
    for name, t in zip(("out[0]", "out[1]"), out, strict=True):
        own = arguments.tensor_on(name, t, device)
        if own is not t and not torch.compiler.is_compiling():
            raise ValueError(f"{name} has torch's negative bit; pass other memory and copy from it")
        place = _steps_by_envs(name, own, shape).detach()
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, as what is computed, got {t.dtype}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous; pass other memory and copy from it")
        places.append(place)
    return places[0], places[1]


def _check_memory(out: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor], args: tuple) -> None:
    """That a kernel may write ``out`` in any order: nothing else lies in its memory."""
    if torch.is_grad_enabled() and (out[0].requires_grad or out[1].requires_grad):
        name = "out[0]" if out[0].requires_grad else "out[1]"
        raise ValueError(f"{name} requires a gradient, and what is written has none; pass {name}.detach()")
    first, second = places[0].data_ptr(), places[1].data_ptr()
    if first == 0 or second == 0:  # no memory at all, as on the device "meta"
        return
    size = _extent(places[0])
    if abs(first - second) < size:
        raise ValueError("out[0] and out[1] share memory; pass two tensors of their own")
    lowest, highest = min(first, second), max(first, second) + size
    for name, t in zip(_ARGUMENTS, args, strict=True):
        if not isinstance(t, Tensor):
            continue
        begin = t.data_ptr()
        if begin >= highest or begin + _extent(t) <= lowest:  # most often so
            continue
        for place, start in (("out[0]", first), ("out[1]", second)):
            if begin < start + size and start < begin + _extent(t):
                raise ValueError(f"{place} shares memory with {name}; pass a tensor of its own")


def _extent(t: Tensor) -> int:
    """Bytes from the first element of ``t`` to behind its last."""
    if t.is_contiguous():
        return t.nbytes
    steps = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (steps + 1) * t.element_size()


def _floats(name: str, t: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    return _steps_by_envs(name, arguments.tensor_on(name, t, device), shape).detach()


def _flags(name: str, t: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """As bool or uint8: other integers and floating flags are compared with 0."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
    if t.device != device:
        raise ValueError(
            f"{name} is on {t.device}, the other arguments are on {device}; move it with .to({str(device)!r})"
        )
    flags = _steps_by_envs(name, t, shape)
    return flags if flags.dtype in (torch.bool, torch.uint8) else flags != 0


def _steps_by_envs(name: str, t: Tensor, shape: torch.Size) -> Tensor:
    if t.shape == shape:
        return t
    if t.shape == (*shape, 1):
        return t.squeeze(-1)
    raise ValueError(f"{name} must have the shape {list(shape)} or {[*shape, 1]}, got {list(t.shape)}")
