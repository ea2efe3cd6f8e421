"""The Triton kernels (triton_kernels): one launch, on the current stream of the tensors' device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pyfast_ppo.backends import _gpu
from pyfast_ppo.backends._outputs import gradient_of, gradient_of_both
from pyfast_ppo.backends._scratch import ScratchPool, current_stream
from pyfast_ppo.reference import METRICS
from pyfast_ppo.versions import release

# Triton's interpreter runs the kernels on the CPU, slowly. To be set before triton is imported for the first time.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

name = "triton"
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
COMPUTES_IN = (torch.float32,)
FOR_TESTS_ONLY = INTERPRETED
GATHERS = False
FUSES_UPDATE = False

OLDEST = (3, 2)
MAX_PROGRAMS = 1024
LONGEST_STRIDE = 2**22  # within a block of rows the kernels count in 32 bits
WARPS_PER_PROCESSOR = 12  # as many as fit at once with up to 168 registers a thread; not measured on a GPU


# --- what is there ----------------------------------------------------------------------------------------------------


@functools.cache
def unavailable_reason() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported ({error}); run `pip install triton`"
    if release(version) < OLDEST:
        return f"triton {version} is too old; run `pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'`"
    if INTERPRETED:
        return None
    if reason := _gpu.missing_reason():
        return reason
    # as triton/runtime/build.py looks for one: what starts a kernel is C, built once (3.9) or per signature (3.6)
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"triton finds no C compiler ({', '.join(compilers)}), which a launch needs; install gcc or set CC"
    return None


def detail() -> str:
    version = importlib.import_module("triton").__version__
    where = "interpreted on the CPU, for tests" if INTERPRETED else torch.cuda.get_device_name()
    return f"Triton {version}, {where}"


@functools.cache
def _kernels(module: str) -> ModuleType:
    """``pyfast_ppo.triton_kernels.<module>``; in a checkout that folder lies beside the package, not in it."""
    package = "pyfast_ppo.triton_kernels"
    if importlib.util.find_spec(package) is None:
        folder = Path(__file__).parents[2] / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{module}")


_scratch = ScratchPool()


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# --- arguments --------------------------------------------------------------------------------------------------------


def _matrix(t: Tensor) -> tuple[Tensor, int]:
    """[N, A] or one row [A], and its row stride (0: one row for all): rows may be apart, a row's elements may not."""
    if t.dim() == 1:
        return t.contiguous(), 0
    if (t.shape[1] > 1 and t.stride(1) != 1) or t.stride(0) > LONGEST_STRIDE:
        t = t.contiguous()
    # a stride of 0 means one row for all; a single row may have any
    return (t, t.stride(0)) if t.stride(0) > 0 else (t.contiguous(), t.shape[1])


def _options() -> dict[str, bool]:
    """Fused multiply-adds by name: their default changes with Triton's version, and with it the bits."""
    return {} if INTERPRETED else {"enable_fp_fusion": True}


# --- operations -------------------------------------------------------------------------------------------------------


def ppo_loss(
    mean: Tensor,  # [N, A]
    std: Tensor,  # [A] or [N, A]
    values: Tensor,  # [N]; so are the other vectors
    actions: Tensor,
    old_log_prob: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    clip_param: float | Tensor,
    value_loss_coef: float | Tensor,
    entropy_coef: float | Tensor,
    kl_coef: float | Tensor,
    use_clipped_value_loss: bool,
    kl_new_old: bool,
    num_original: int,
    dtype: torch.dtype,  # of the arithmetic: float32
    keep_scratch: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(metrics, grad_mean, grad_std, grad_values)."""
    kernels = _kernels("ppo_loss")
    num_rows, num_actions = mean.shape
    device = mean.device
    shape = _kernels("shapes").block_shape(num_actions)
    tiles = -(-num_rows // shape["BLOCK_N"])
    programs_at_once = max(1, WARPS_PER_PROCESSOR // shape["num_warps"]) * _num_processors(device)
    max_programs = min(MAX_PROGRAMS, programs_at_once)
    num_partials = (kernels.NUM_SUMS.value + shape["BLOCK_A"]) * max_programs
    scratch = _scratch.get(device, current_stream(device), num_partials, dtype, keep_scratch)
    metrics = torch.empty(len(METRICS), dtype=torch.float32, device=device)
    grads = gradient_of(mean), gradient_of(std), gradient_of(values)
    matrices = [_matrix(t) for t in (mean, std, actions, old_mean, old_std)]
    (mean, mean_stride), (std, std_stride), (actions, actions_stride) = matrices[:3]
    (old_mean, old_mean_stride), (old_std, old_std_stride) = matrices[3:]
    coefficients = (clip_param, value_loss_coef, entropy_coef, kl_coef)
    given = sum(1 << i for i, c in enumerate(coefficients) if isinstance(c, Tensor))
    clip = 0.0 if isinstance(clip_param, Tensor) else clip_param
    with torch.cuda.device_of(mean):
        kernels.ppo_loss_kernel[(min(tiles, max_programs),)](
            mean,
            std,
            values.contiguous(),
            actions,
            old_log_prob.contiguous(),
            old_mean,
            old_std,
            advantages.contiguous(),
            returns.contiguous(),
            old_values.contiguous(),
            *(c.float() if isinstance(c, Tensor) else metrics for c in coefficients),
            *(0.0 if isinstance(c, Tensor) else c for c in coefficients),
            1.0 - clip,
            1.0 + clip,
            given,
            metrics,
            *grads,
            scratch.partials,
            scratch.counter,
            num_rows,
            num_original,
            A=num_actions,
            MEAN_STRIDE=mean_stride,
            STD_STRIDE=std_stride,
            ACTIONS_STRIDE=actions_stride,
            OLD_MEAN_STRIDE=old_mean_stride,
            OLD_STD_STRIDE=old_std_stride,
            CLIP_VALUE=use_clipped_value_loss,
            KL_NEW_OLD=kl_new_old,
            **shape,
            **_options(),
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
    kernels = _kernels("gae")
    num_steps, num_envs = rewards.shape
    programs = -(-num_envs // kernels.BLOCK_E)
    dtype = torch.float32
    advantages, returns = out or (torch.empty(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2))
    moments = torch.empty(3 * programs if normalize else 1, dtype=dtype, device=rewards.device)
    absent = [rewards if t is None else t for t in (time_outs, final_values)]
    with torch.cuda.device_of(rewards):
        kernels.gae_kernel[(programs,)](
            rewards, values, dones, *absent, last_values, advantages, returns, moments, gamma, gamma * lam,
            num_steps, num_envs,
            *rewards.stride(), *values.stride(), *dones.stride(), *absent[0].stride(), *absent[1].stride(),
            last_values.stride(0),
            HAS_TIME_OUTS=time_outs is not None, HAS_FINAL_VALUES=final_values is not None, NORMALIZE=normalize,
            BLOCK_T=kernels.block_t(num_steps), BLOCK_E=kernels.BLOCK_E, num_warps=kernels.NUM_WARPS,
            **_options(),
        )  # fmt: skip
        if normalize:
            blocks = -(-advantages.numel() // kernels.NORMALIZE_BLOCK)
            kernels.normalize_kernel[(blocks,)](
                advantages,
                moments,
                programs,
                advantages.numel(),
                BLOCK=kernels.NORMALIZE_BLOCK,
                BLOCK_M=128,
                **_options(),
            )
    return advantages, returns


def gaussian_log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[N, A], [N, A], [A] or [N, A] -> [N]."""
    return _row_sums("log_prob_kernel", {"ACTIONS": actions, "MEAN": mean, "STD": std})


def gaussian_log_prob_backward(grad: Tensor, actions: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_mean, grad_std); the actions have the negative of the first, whose dtype suits both."""
    inputs = {"ACTIONS": actions, "MEAN": mean, "STD": std}
    return _gradients("log_prob_backward_kernel", grad, inputs, (mean, std), (actions, None))


def gaussian_kl_loss(
    which: int, actions: Tensor, mean: Tensor, std: Tensor, old_log_prob: Tensor
) -> tuple[Tensor, Tensor]:
    """(value, coefficient), each [N], of the loss ``KL_LOSSES[which]``."""
    # two tensors: the second row of one would be aligned for some N alone, which costs another compilation
    value, coefficient = (torch.empty(mean.shape[0], dtype=torch.float32, device=mean.device) for _ in range(2))
    inputs = {"ACTIONS": actions, "MEAN": mean, "STD": std}
    _launch("kl_loss_kernel", (old_log_prob.contiguous(),), inputs, [value, coefficient], WHICH=which)
    return value, coefficient


def gaussian_entropy(std: Tensor) -> Tensor:
    """[N, A] -> [N]."""
    return _row_sums("entropy_kernel", {"STD": std})


def gaussian_entropy_backward(grad: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """(grad_std,)."""
    return _gradients("entropy_backward_kernel", grad, {"STD": std}, (std,), (None,))


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """[N, A], [A] or [N, A], [N, A], [A] or [N, A] -> [N]."""
    return _row_sums("kl_kernel", {"MEAN_P": mean_p, "STD_P": std_p, "MEAN_Q": mean_q, "STD_Q": std_q})


def gaussian_kl_backward(
    grad: Tensor, mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor
) -> tuple[Tensor, ...]:
    """(grad_mean_p, grad_std_p, grad_std_q); mean_q has the negative of the first, whose dtype suits both."""
    inputs = {"MEAN_P": mean_p, "STD_P": std_p, "MEAN_Q": mean_q, "STD_Q": std_q}
    return _gradients("kl_backward_kernel", grad, inputs, (mean_p, std_p, std_q), (mean_q, None, None))


def _launch(
    kernel: str, leading: tuple[Tensor, ...], inputs: dict[str, Tensor], outputs: list[Tensor], **constants: int
) -> None:
    num_rows, num_actions = _num_rows(inputs), next(iter(inputs.values())).shape[-1]
    shape = _kernels("shapes").block_shape(num_actions)
    matrices = {key: _matrix(t) for key, t in inputs.items()}
    with torch.cuda.device_of(outputs[0]):
        getattr(_kernels("gaussian"), kernel)[(-(-num_rows // shape["BLOCK_N"]),)](
            *leading,
            *(t for t, _ in matrices.values()),
            *outputs,
            num_rows,
            A=num_actions,
            **{f"{key}_STRIDE": stride for key, (_, stride) in matrices.items()},
            **constants,
            **shape,
            **_options(),
        )


def _num_rows(inputs: dict[str, Tensor]) -> int:
    return max(t.shape[0] for t in inputs.values() if t.dim() == 2)


def _row_sums(kernel: str, inputs: dict[str, Tensor]) -> Tensor:
    out = torch.empty(_num_rows(inputs), dtype=torch.float32, device=next(iter(inputs.values())).device)
    _launch(kernel, (), inputs, [out])
    return out


def _gradients(
    kernel: str,
    grad: Tensor,
    inputs: dict[str, Tensor],
    of: tuple[Tensor, ...],
    shared_with: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The gradients of the tensors ``of``; where another tensor gets the negated one, in a dtype that suits both."""
    num_rows, num_actions = _num_rows(inputs), of[0].shape[-1]
    programs = -(-num_rows // _kernels("shapes").block_shape(num_actions)["BLOCK_N"])
    outputs = []
    for t, other in zip(of, shared_with, strict=True):
        if t.dim() == 1:  # partial sums, one row per program
            outputs.append(torch.empty(programs, num_actions, dtype=torch.float32, device=t.device))
        else:
            outputs.append(gradient_of(t) if other is None else gradient_of_both(t, other))
    _launch(kernel, (grad.contiguous(),), inputs, outputs)
    return tuple(o.sum(0).to(t.dtype) if t.dim() == 1 else o for o, t in zip(outputs, of, strict=True))
