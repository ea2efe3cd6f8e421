"""Export a policy together with the clip of its actions.

rsl_rl's exported policy returns the mean of the distribution as it is, while the environment executed clipped actions
in training. Here the file clips, so that whoever runs it cannot forget to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from pyfast_ppo.vec_env import Limit, clip_range

ActionBounds = str | float | tuple[Limit, Limit] | None
"""``"env"``, ``None``, a number or (low, high)."""


def export_policy_to_jit(
    runner: Any, path: str | os.PathLike, filename: str = "policy.pt", action_bounds: ActionBounds = "env"
) -> None:
    """Write the file that ``runner.export_policy_to_jit`` writes, with its actions clipped.

    Args:
        runner: An rsl_rl runner.
        path: Folder; made if need be.
        filename: Name of the file in it.
        action_bounds: ``"env"``: ``runner.env.action_bounds``, no clip if it has none. ``None``: no clip. A number c:
            [-c, c]. A pair (low, high): each a number or one per action dimension ``[A]``.

    Raises:
        TypeError, ValueError: The bounds do not fit, or the policy's export has another form than rsl_rl's.
    """
    with _clipped(runner, "as_jit", action_bounds):
        runner.export_policy_to_jit(os.fspath(path), filename)


def export_policy_to_onnx(
    runner: Any,
    path: str | os.PathLike,
    filename: str = "policy.onnx",
    action_bounds: ActionBounds = "env",
    verbose: bool = False,
) -> None:
    """Write the file that ``runner.export_policy_to_onnx`` writes, with its actions clipped.

    Arguments and errors as in :func:`export_policy_to_jit`; ``verbose`` goes to the exporter.
    """
    with _clipped(runner, "as_onnx", action_bounds):
        runner.export_policy_to_onnx(os.fspath(path), filename, verbose=verbose)


class _Clip(nn.Module):
    """The last layer: clips ``[..., A]``."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, actions: Tensor) -> Tensor:
        # TorchScript cannot read the annotations that would tell a type checker what these are
        return torch.clamp(actions, self.low, self.high)  # type: ignore[arg-type]


def _clipped(runner: Any, method: str, action_bounds: ActionBounds) -> Any:
    """Inside, the policy's ``as_jit`` or ``as_onnx`` returns a module that clips."""
    if isinstance(action_bounds, str):
        if action_bounds != "env":
            raise ValueError(f'action_bounds must be "env", None, a number or (low, high), got {action_bounds!r}.')
        action_bounds = getattr(runner.env, "action_bounds", None)
    if action_bounds is None:
        return nullcontext()
    low, high = clip_range(action_bounds, runner.env.num_actions, name="action_bounds")
    layer = _Clip(torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32))
    return _with_last_layer(runner.alg.get_policy(), method, layer)


@contextmanager
def _with_last_layer(policy: nn.Module, method: str, layer: nn.Module) -> Iterator[None]:
    # at the policy, not at the runner: a runner may export in its own way, as mjlab's does
    export: Callable[..., nn.Module] = getattr(policy, method)

    def export_and_append(*args: Any, **kwargs: Any) -> nn.Module:
        module = export(*args, **kwargs)
        output = getattr(module, "deterministic_output", None)
        if not isinstance(output, nn.Module):
            raise TypeError(
                f"{type(policy).__name__}.{method}() returns a {type(module).__name__} without the submodule"
                " deterministic_output that rsl_rl's exports end with; pass action_bounds=None and clip where the"
                " policy runs."
            )
        module.deterministic_output = nn.Sequential(output, layer)
        return module

    attributes = dict(vars(policy))
    setattr(policy, method, export_and_append)
    try:
        yield
    finally:
        vars(policy).clear()
        vars(policy).update(attributes)
