"""Runs the operations of a GPU backend through its compiled PTX, and prints what came of it as JSON.

python tests/ptx/on_ptx.py triton          # or cuda
A process of its own: Triton must not interpret, and the backend stays changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[1] / "ops" / "oracles"))

import torch
import torch.nn.functional as F
from ptx import load_machine
from torch import Tensor

from pyfast_ppo import backends, gae, gaussian_entropy, gaussian_kl, gaussian_log_prob
from pyfast_ppo.ops.adam import AdamRow, AdamRule, adam_step
from pyfast_ppo.ops.learning_rate import adapted_rate
from pyfast_ppo.ops.ppo_loss import ppo_loss_and_grad

Case = Callable[[str, bool], list[Tensor]]  # (backend, whether in float64) -> results
SECTOR = 32


def in_precision(tensors: list[Tensor], exact: bool) -> list[Tensor]:
    return [t.double() if exact else t for t in tensors]


def loss(
    num_rows: int,
    num_actions: int,
    *,
    std_rows: bool = False,
    old_std_rows: bool = True,
    network: torch.dtype = torch.float32,
    kl_direction: str = "old_new",
    use_clipped_value_loss: bool = True,
    num_original: int | None = None,
    far: bool = False,
    fault: bool = False,
) -> Case:
    """The loss with all metrics and gradients.

    ``far``: ratios of two policies that have little in common. ``fault``: an old mean is NaN.
    """
    g = torch.Generator().manual_seed(num_rows * 1000 + num_actions)
    n, a = num_rows, num_actions
    mean, noise, shift = torch.randn(3, n, a, generator=g)
    std = 0.5 + torch.rand(*((n, a) if std_rows else (a,)), generator=g)
    old_std = 0.5 + torch.rand(*((n, a) if old_std_rows else (a,)), generator=g)
    values, advantages, returns, old_values = torch.randn(4, n, generator=g)
    mean, std, values = mean.to(network), std.to(network), values.to(network)
    old_mean = mean.float() + (1.0 if far else 0.1) * shift
    actions = old_mean + old_std * noise
    old_log_prob = torch.distributions.Normal(mean.double(), std.double()).log_prob(actions.double()).sum(-1)
    old_log_prob = (old_log_prob + (5.0 if far else 0.3) * torch.randn(n, generator=g).double()).float()
    if fault:
        old_mean[n // 2, a // 2] = float("nan")
    m = n if num_original is None else num_original
    old_mean, old_std = old_mean[:m], old_std[:m] if old_std_rows else old_std
    inputs = [mean, std, values, actions, old_log_prob, old_mean, old_std, advantages, returns, old_values]
    coefficients = {"clip_param": 0.2, "value_loss_coef": 1.0, "entropy_coef": 0.01, "kl_coef": torch.tensor(0.5)}

    def run(backend: str, exact: bool = False) -> list[Tensor]:
        out, grads = ppo_loss_and_grad(
            *in_precision(inputs, exact),
            **coefficients,
            kl_direction=kl_direction,
            use_clipped_value_loss=use_clipped_value_loss,
            num_original=num_original,
            backend=backend,
        )
        return [*out, *grads]

    return run


def returns(num_steps: int, num_envs: int, normalize: bool = True) -> Case:
    g = torch.Generator().manual_seed(num_steps)
    rewards, values, final_values = torch.randn(3, num_steps, num_envs, generator=g)
    dones = torch.rand(num_steps, num_envs, generator=g) < 0.1
    time_outs = dones & (torch.rand(num_steps, num_envs, generator=g) < 0.5)
    last_values = torch.randn(num_envs, generator=g)

    def run(backend: str, exact: bool = False) -> list[Tensor]:
        r, v, last, final = in_precision([rewards, values, last_values, final_values], exact)
        out = gae(
            r, v, dones, last, 0.99, 0.95, time_outs=time_outs, final_values=final, normalize=normalize, backend=backend
        )
        return list(out)

    return run


def gaussian(num_rows: int, num_actions: int, shared: bool) -> Case:
    g = torch.Generator().manual_seed(num_actions)
    mean_p, mean_q, actions = torch.randn(3, num_rows, num_actions, generator=g)
    std_p, std_q = 0.5 + torch.rand(2, *(() if shared else (num_rows,)), num_actions, generator=g)

    def run(backend: str, exact: bool = False) -> list[Tensor]:
        of = [t.clone().requires_grad_() for t in in_precision([mean_p, std_p, mean_q, std_q, actions], exact)]
        log_prob = gaussian_log_prob(of[4], of[0], of[1], backend=backend)
        kl = gaussian_kl(*of[:4], backend=backend)
        entropy = gaussian_entropy(of[1].expand(num_rows, num_actions), backend=backend)
        grads = torch.autograd.grad([log_prob.sum() + kl.square().sum() + entropy.square().sum()], of)
        return [t.detach() for t in (log_prob, kl, entropy, *grads)]

    return run


def adam(shapes: list[tuple[int, ...]], rule: AdamRule, *, lost: bool = False) -> Case:
    """Two modules, of which the first has all shapes but the last; in float64 by torch.

    ``lost``: a gradient is NaN.
    """
    g = torch.Generator().manual_seed(len(shapes))
    starts = [torch.randn(3, *shape, generator=g) for shape in shapes]  # parameter, gradient, exp_avg
    squares = [torch.rand(shape, generator=g) for shape in shapes]
    if lost:
        starts[0].view(-1)[starts[0][0].numel()] = torch.nan
    modules = [*[0] * (len(shapes) - 1), 1]

    def run(backend: str, exact: bool = False) -> list[Tensor]:
        kept = in_precision([t for start in starts for t in start], exact)
        parameters = [torch.nn.Parameter(t.clone()) for t in kept[::3]]
        averages = [t.clone() for t in kept[2::3]]
        of_squares = [t.clone() for t in in_precision(squares, exact)]
        steps = [torch.tensor(4.0) for _ in shapes]
        for parameter, gradient in zip(parameters, kept[1::3], strict=True):
            parameter.grad = gradient.clone()
        state = zip(parameters, averages, of_squares, steps, modules, strict=True)
        if not exact:
            rate = torch.tensor(1e-2, dtype=torch.float64)
            rows = [AdamRow(*row) for row in state]
            kernels = backends.select(backend, torch.device("cpu"))
            adam_step(rows, rule, max_norm=1.0, rate=rate, skip=None, skip_nonfinite=True, backend=kernels)
        elif not lost:
            kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
            options = {"betas": (rule.beta1, rule.beta2), "eps": rule.eps, "weight_decay": rule.weight_decay}
            optimizer = kind(parameters, lr=1e-2, **options)
            for parameter, average, of_square, step, _ in state:
                optimizer.state[parameter] = {"step": step, "exp_avg": average, "exp_avg_sq": of_square}
            for module in set(modules):
                of = [p for p, i in zip(parameters, modules, strict=True) if i == module]
                torch.nn.utils.clip_grad_norm_(of, 1.0)
            optimizer.step()
        return [t.detach() for t in (*parameters, *averages, *of_squares, *steps)]

    return run


def rate() -> Case:
    kls, present = torch.tensor([0.1, 1e-3, 0.01, torch.nan]), torch.tensor([1e-3, 1e-5, 1e-2], dtype=torch.float64)
    rule = {"desired_kl": 0.01, "min_rate": 1e-5, "max_rate": 1e-2, "factor": 1.5}

    def run(backend: str, exact: bool = False) -> list[Tensor]:
        flags = [None, torch.tensor(True), torch.tensor(False)]
        return [adapted_rate(kl, lr, **rule, lost=f, backend=backend) for kl in kls for lr in present for f in flags]

    return run


def hidden_layer(num_rows: int, num_units: int, aligned: bool = True, activation: str = "elu") -> Case:
    """Bias and activation, and their gradients: into memory of its own, and in place."""
    g = torch.Generator().manual_seed(num_units)
    x, grad = torch.randn(2, num_rows, num_units, generator=g)
    bias = torch.randn(num_units, generator=g)

    def placed(t: Tensor) -> Tensor:
        memory = torch.empty(t.numel() + 1)
        return (memory[:-1] if aligned else memory[1:]).view(t.shape).copy_(t)

    def run(backend: str, exact: bool = False) -> list[Tensor]:
        if exact:
            of = [x.double().requires_grad_(), bias.double().requires_grad_()]
            y = {"elu": F.elu, "relu": torch.relu, "tanh": torch.tanh}[activation](of[0] + of[1])
            grads = torch.autograd.grad(y, of, grad.double())
            return [y.detach(), *grads, *grads]
        kernels: Any = backends._module(backend)
        y = kernels.add_bias_and_activate(activation, placed(x), bias)
        into_other, in_place = (
            kernels.add_bias_and_activate_backward(activation, placed(grad), y, choice) for choice in (False, True)
        )
        return [y, *into_other, *in_place]

    return run


def cases(backend: str) -> Iterator[tuple[str, Case]]:
    for a in (1, 2, 4, 12, 19, 23, 29, 37, 256):
        yield f"loss A={a}", loss(333 if a < 64 else 37, a)
    yield "loss N=1", loss(1, 12)
    yield "loss far", loss(333, 12, far=True)
    for a in (12, 19):
        yield f"loss A={a} std [A], old std [A]", loss(333, a, old_std_rows=False)
        yield f"loss A={a} std [N, A], new_old", loss(333, a, std_rows=True, kl_direction="new_old", num_original=111)
        yield (
            f"loss A={a} std [N, A], old std [A], plain values",
            loss(333, a, std_rows=True, old_std_rows=False, use_clipped_value_loss=False),
        )
    for dtype in (torch.bfloat16, torch.float16):
        yield f"loss A=12 {dtype}", loss(333, 12, network=dtype)
        yield f"loss A=29 {dtype}", loss(333, 29, network=dtype)
    yield "gae T=24", returns(24, 128)
    yield "gae T=70", returns(70, 33)
    yield "gae T=1", returns(1, 7)
    yield "gae T=2, one environment", returns(2, 1)
    yield "gae T=24, not normalized", returns(24, 40, normalize=False)
    for a in (1, 12, 37):
        for shared in (True, False):
            yield f"gaussian A={a} std {'[A]' if shared else '[N, A]'}", gaussian(200, a, shared)
    if backend == "cuda":  # with Triton hidden layers and steps are torch's
        for n, h in ((1, 1), (300, 3), (130, 19), (500, 130), (1, 128), (1300, 128), (333, 32)):
            yield f"hidden layer N={n} H={h}", hidden_layer(n, h)
        for activation in ("elu", "relu", "tanh"):
            layer = hidden_layer(200, 64, aligned=False, activation=activation)
            yield f"hidden layer N=200 H=64 {activation}, not aligned", layer
        for activation in ("relu", "tanh"):
            yield f"hidden layer N=333 H=128 {activation}", hidden_layer(333, 128, activation=activation)
        shapes = [(3, 700), (1024,), (1,), (5,)]
        yield "adam", adam(shapes, AdamRule(0.9, 0.999, 1e-8, 0.1, False))
        yield "adamw", adam([*shapes, (2, 2)], AdamRule(0.9, 0.99, 1e-6, 0.05, True))
        yield "adam, lost", adam(shapes, AdamRule(0.9, 0.999, 1e-8, 0.0, False), lost=True)
        yield "learning rate", rate()


def largest_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """In units of the largest magnitude of each result (0.1 or more for a mean, whose terms cancel)."""
    worst = 0.0
    for got, want in zip(results, exact, strict=True):
        assert got.shape == want.shape
        scale = want.abs().max().clamp_min(0.1 if want.dim() == 0 else 1e-6)
        rounding = torch.finfo(got.dtype).eps / torch.finfo(torch.float32).eps
        worst = max(worst, float((got.double() - want).abs().max() / scale / rounding))
    return worst


def judged(launcher: Any, backend: str, case: Case) -> dict[str, Any]:
    """Errors against float64, whether three orders of warps and blocks give the same bits, and what the kernels did."""
    exact = case("eager", True)
    found = []
    for seed in range(3):
        launcher.seed = seed
        launcher.launches.clear()
        found.append(case(backend))
    counts = [counts for _, _, counts in launcher.launches]
    loaded, stored = (sum(getattr(c, name) for c in counts) for name in ("load_sectors", "store_sectors"))
    return {
        "error": largest_error(found[0], exact),
        "same": all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)),
        "kernels": [name for name, _, _ in launcher.launches],
        "instructions": sum(c.instructions for c in counts),
        "prefetched_bytes": sum(c.prefetched_bytes for c in counts),
        "load_efficiency": sum(c.load_bytes for c in counts) / (SECTOR * loaded),
        "store_efficiency": sum(c.store_bytes for c in counts) / (SECTOR * stored),
    }


def without_barriers(launcher: Any, backend: str, case: Case, name: str) -> list[str]:
    """What is said, or "nothing", when the kernel lacks one of its barriers, for each of them."""
    launcher.launches.clear()
    case(backend)
    kernel = next(kernel for launched, kernel, _ in launcher.launches if launched == name)
    said = []
    for i, statement in enumerate(kernel.statements):
        if statement.startswith("bar.sync"):
            less = kernel.without(i)
            launcher.change = lambda other, less=less: less if other is kernel else other
            try:
                for launcher.seed in range(4):
                    case(backend)
                said.append("nothing")
            except RuntimeError as error:
                said.append(str(error).split("\n")[0])
                launcher.forget_scratch()  # whose counter was left somewhere
    launcher.change = lambda other: other
    return said


def compilations(launcher: Any, backend: str) -> dict[str, int]:
    """How many kernels were compiled for how many numbers of rows, and of environments."""
    before = len(launcher.read)
    for num_rows in (1, 5, 16, 96, 1000):
        loss(num_rows, 8)(backend)
    between = len(launcher.read)
    for num_envs in (3, 16, 64, 65):
        returns(8, num_envs, normalize=False)(backend)
    return {"loss": between - before, "gae": len(launcher.read) - between}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["triton", "cuda"])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--ptx", type=Path, help="run what is in this folder, not what nvcc makes of csrc/cuda")
    parser.add_argument("--cases", type=re.compile, help="only those whose names begin so, with all barriers in place")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN: what a kernel leaves out shows
    machine = load_machine()
    if args.backend == "triton":
        from triton_on_ptx import TritonOnPtx

        launcher: Any = TritonOnPtx(machine, args.capability)
    else:
        from cuda_on_ptx import CudaOnPtx

        launcher = CudaOnPtx(machine, args.capability, args.ptx)
    found: dict[str, Any] = {"cases": {}}
    with launcher:
        for name, case in cases(args.backend):
            if args.cases and not args.cases.match(name):
                continue
            found["cases"][name] = judged(launcher, args.backend, case)
            launcher.forget_tensors()
            print(name, found["cases"][name], file=sys.stderr, flush=True)
        if args.cases:
            return json.dump(found, sys.stdout)
        returns(1, 1)(args.backend)  # NaN, but it runs: a size of 1 is a constant to Triton's JIT
        found["without_barriers"] = {
            "loss": without_barriers(launcher, args.backend, loss(700, 12, fault=True), "ppo_loss_kernel"),
            "gae": without_barriers(launcher, args.backend, returns(40, 64), "gae_kernel"),
            "normalize": without_barriers(launcher, args.backend, returns(40, 64), "normalize_kernel"),
        }
        if args.backend == "cuda":
            found["without_barriers"]["hidden layer"] = without_barriers(
                launcher, args.backend, hidden_layer(700, 40), "add_bias_and_activate_backward_kernel"
            )
            case = adam([(3, 700), (5,)], AdamRule(0.9, 0.999, 1e-8, 0.0, False))
            found["without_barriers"]["adam"] = without_barriers(launcher, args.backend, case, "adam_norms_kernel")
        else:
            found["compilations"] = compilations(launcher, args.backend)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
