"""gae against a loop over Python floats, against rsl_rl's own formula, and against worlds whose values are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyfast_ppo import gae

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
IN_FLOAT64 = ["cpu", "eager"]
GAMMA, LAM = 0.99, 0.95
NAMES = ("rewards", "values", "dones", "last_values", "time_outs", "final_values")


def make_rollout(
    num_steps: int,
    num_envs: int,
    seed: int = 0,
    *,
    done_share: float = 0.2,
    time_outs: bool = False,
    final_values: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """time_outs are true also where no episode ends, final_values NaN wherever nothing may look at them."""
    g = torch.Generator().manual_seed(seed)
    dones = torch.rand(num_steps, num_envs, generator=g) < done_share
    timed = torch.rand(num_steps, num_envs, generator=g) < 0.5
    final = torch.randn(num_steps, num_envs, generator=g).masked_fill(~(dones & timed), float("nan"))
    rollout = {
        "rewards": torch.randn(num_steps, num_envs, generator=g),
        "values": torch.randn(num_steps, num_envs, generator=g),
        "dones": dones,
        "last_values": torch.randn(num_envs, generator=g),
        "time_outs": timed if time_outs else None,
        "final_values": final if time_outs and final_values else None,
    }
    return {name: None if t is None else t.to(device) for name, t in rollout.items()}


def call(
    rollout: dict[str, Tensor | None],
    backend: str | None = None,
    gamma: float = GAMMA,
    lam: float = LAM,
    **options: object,
) -> tuple[Tensor, Tensor]:
    positional = [rollout[name] for name in ("rewards", "values", "dones", "last_values")]
    keywords = {name: rollout.get(name) for name in ("time_outs", "final_values")}
    return gae(*positional, gamma, lam, **keywords, backend=backend, **options)


def expected(rollout: dict[str, Tensor | None], gamma: float = GAMMA, lam: float = LAM) -> tuple[Tensor, Tensor]:
    """A_t = Σ_k (γλ)^k δ_{t+k} up to the end of the episode, each sum by itself and from its own first step, in Python
    floats: the definition, not the recursion."""
    num_steps, num_envs = rollout["rewards"].shape[:2]
    plain = {
        name: None if t is None else t.detach().double().reshape(-1, num_envs).tolist() for name, t in rollout.items()
    }
    advantages = torch.empty(num_steps, num_envs, dtype=torch.float64)
    for env in range(num_envs):
        for start in range(num_steps):
            terms = []
            for t in range(start, num_steps):
                value, done = plain["values"][t][env], plain["dones"][t][env] != 0
                if not done:
                    following = plain["values"][t + 1][env] if t + 1 < num_steps else plain["last_values"][0][env]
                elif plain["time_outs"] is None or plain["time_outs"][t][env] == 0:
                    following = 0.0
                else:
                    following = value if plain["final_values"] is None else plain["final_values"][t][env]
                delta = plain["rewards"][t][env] + gamma * following - value
                terms.append((gamma * lam) ** (t - start) * delta)
                if done:
                    break
            advantages[start, env] = math.fsum(terms)
    return advantages, advantages + torch.tensor(plain["values"], dtype=torch.float64)


def rsl_rl_returns(
    rewards: Tensor, values: Tensor, dones: Tensor, last_values: Tensor, time_outs: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The lines of rsl_rl 5.5.1's PPO.process_env_step and PPO.compute_returns, [T, E, 1] as its storage has them."""
    rewards = rewards.clone()
    if time_outs is not None:
        rewards += GAMMA * values * time_outs
    returns = torch.zeros_like(values)
    num_steps = rewards.shape[0]
    advantage = 0
    for step in reversed(range(num_steps)):
        next_values = last_values if step == num_steps - 1 else values[step + 1]
        next_is_not_terminal = 1.0 - dones[step].to(values.dtype)
        delta = rewards[step] + next_is_not_terminal * GAMMA * next_values - values[step]
        advantage = delta + next_is_not_terminal * GAMMA * LAM * advantage
        returns[step] = advantage + values[step]
    advantages = returns - values
    if normalize:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return advantages, returns


def assert_close(got: Tensor, want: Tensor, rtol: float = 3e-6) -> None:
    """float32: each of up to 1/(1 - γλ) = 17 terms that count is rounded a few times."""
    assert got.shape == want.shape
    error = (got.double().cpu() - want.double().cpu()).abs().max()
    assert error <= rtol * float(want.abs().max()) + 1e-6, f"off by {error}"


# --- against the definition -------------------------------------------------------------------------------------------


@given(
    num_steps=st.integers(1, 30),
    num_envs=st.one_of(st.integers(1, 20), st.sampled_from([127, 128, 129])),
    done_share=st.sampled_from([0.0, 0.2, 1.0]),
    time_outs=st.booleans(),
    final_values=st.booleans(),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_advantages_and_returns(
    backend: str,
    device: str,
    num_steps: int,
    num_envs: int,
    done_share: float,
    time_outs: bool,
    final_values: bool,
    gamma: float,
    lam: float,
    seed: int,
) -> None:
    rollout = make_rollout(
        num_steps,
        num_envs if num_steps < 8 else min(num_envs, 20),
        seed,
        done_share=done_share,
        time_outs=time_outs,
        final_values=final_values,
        device=device,
    )
    for got, want in zip(call(rollout, backend, gamma, lam), expected(rollout, gamma, lam), strict=True):
        assert_close(got, want, rtol=1e-5 if gamma * lam == 1.0 else 3e-6)


@pytest.mark.parametrize("time_outs", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_steps", "num_envs"), [(24, 300), (1, 7), (50, 1), (3, 4096)])
def test_rsl_rl_formula(
    backend: str, device: str, time_outs: bool, normalize: bool, num_steps: int, num_envs: int
) -> None:
    """Without final_values it is the stock's bootstrap from V(s_t); time_outs of the stock come with a done."""
    rollout = make_rollout(num_steps, num_envs, time_outs=time_outs, device=device)
    if time_outs:
        rollout["time_outs"] &= rollout["dones"]
    got = call(rollout, backend, normalize=normalize)
    doubles = {name: None if t is None else t.double() for name, t in rollout.items()}
    stock = rsl_rl_returns(
        doubles["rewards"], doubles["values"], doubles["dones"], doubles["last_values"], doubles["time_outs"], normalize
    )
    for one, other in zip(got, stock, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("names", [("rewards",), ("values", "last_values"), ("final_values",), NAMES])
def test_dtypes(backend: str, device: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """float32 out of anything but float64; the arithmetic rounds nothing to the small dtypes."""
    rollout = make_rollout(10, 33, time_outs=True, final_values=True, device=device)
    rollout |= {name: rollout[name].to(dtype) for name in names}
    advantages, returns = call(rollout, backend)
    has_double = dtype == torch.float64
    for got, want in zip((advantages, returns), expected(rollout), strict=True):
        assert got.dtype == (torch.float64 if has_double else torch.float32)
        assert_close(got, want)
    if has_double:
        torch.testing.assert_close(advantages.cpu(), expected(rollout)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["dones", "time_outs"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_flags_of_any_type(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    """rsl_rl stores dones as bytes, Isaac Lab's wrapper hands them out as int64, others as floats; 2 is true, too."""
    rollout = make_rollout(9, 21, time_outs=True, final_values=True, device=device)
    want = call(rollout, backend)
    rollout[name] = rollout[name].to(dtype)
    if dtype != torch.bool:
        rollout[name] = rollout[name] * 2
    for one, other in zip(call(rollout, backend), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_one", [(), ("rewards",), ("values", "dones"), NAMES])
def test_trailing_one(backend: str, device: str, with_one: tuple[str, ...]) -> None:
    """[T, E, 1], as rsl_rl stores it; the result is shaped as the rewards."""
    rollout = make_rollout(9, 21, time_outs=True, final_values=True, device=device)
    want = call(rollout, backend, normalize=True)
    rollout |= {name: rollout[name].unsqueeze(-1) for name in with_one}
    for one, other in zip(call(rollout, backend, normalize=True), want, strict=True):
        assert one.shape == rollout["rewards"].shape
        assert torch.equal(one.view(9, 21), other)


def gaps(t: Tensor) -> Tensor:
    """A view with something else between its elements, in both dimensions."""
    shape = (*(2 * n + 1 for n in t.shape),)
    buffer = torch.full(shape, float("nan") if t.is_floating_point() else 1, dtype=t.dtype, device=t.device)
    view = buffer[(slice(1, None, 2),) * t.dim()]
    return view.copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": gaps,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "expanded steps": lambda t: t[:1].expand_as(t),
    "expanded environments": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (1, 1), (7, 1), (1, 9), (3, 200)])
def test_views(backend: str, device: str, layout: str, shape: tuple[int, int]) -> None:
    rollout = make_rollout(*shape, time_outs=True, final_values=True, device=device)
    rollout["final_values"] = rollout["final_values"].nan_to_num(0.5)  # expanding moves where it counts
    views = {name: LAYOUTS[layout](t) for name, t in rollout.items()}
    copies = {name: t.contiguous() for name, t in views.items()}
    for got, want in zip(call(views, backend), expected(copies), strict=True):
        assert_close(got, want)


# --- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 37), (24, 1100), (2, 1), (1, 2), (5, 819), (1, 4097)])
def test_normalize(backend: str, device: str, shape: tuple[int, int]) -> None:
    """Mean 0 and the unbiased standard deviation 1; the returns are those of the advantages before."""
    rollout = make_rollout(*shape, device=device)
    advantages, returns = call(rollout, backend, normalize=True)
    plain, plain_returns = call(rollout, backend)
    assert torch.equal(returns, plain_returns)
    plain = plain.double()
    assert_close(advantages, (plain - plain.mean()) / (plain.std() + 1e-8), rtol=2e-6)


def test_normalize_far_from_zero(backend: str, device: str) -> None:
    """A large common part must not eat the digits of what differs: two passes, not E[A²] - E[A]²."""
    rollout = make_rollout(20, 100, device=device)
    rollout["rewards"] += 1e4
    rollout["dones"][:] = True
    plain = call(rollout, backend)[0].double()
    advantages = call(rollout, backend, normalize=True)[0]
    assert_close(advantages, (plain - plain.mean()) / (plain.std() + 1e-8), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
def test_normalize_one_advantage(backend: str, device: str) -> None:
    """One number has no unbiased standard deviation: NaN, as in torch, not a division that traps."""
    rollout = make_rollout(1, 1, device=device)
    advantages, returns = call(rollout, backend, normalize=True)
    assert torch.isnan(advantages).all()
    assert torch.isfinite(returns).all()


def test_normalize_equal_advantages(backend: str, device: str) -> None:
    """All the same: 0 / 1e-8."""
    one = torch.ones(4, 8, device=device)
    advantages, _ = gae(one, 0 * one, one, one[0], GAMMA, LAM, normalize=True, backend=backend)
    assert not advantages.any()


# --- worlds whose values are known ------------------------------------------------------------------------------------


def fixed_point(
    backend: str,
    device: str,
    states: list[list[int]],  # [E][T]: the state at each step
    rewards: list[list[float]],
    dones: list[list[int]],
    time_outs: list[list[int]],
    next_states: list[list[int]],  # the state after each step, before any reset
    bootstrap_from_final: bool,
) -> list[float]:
    """V of each state after V <- mean return of its visits, many times over: where PPO's critic would settle."""
    as_steps = [torch.tensor(x, device=device).t() for x in (states, rewards, dones, time_outs, next_states)]
    states, rewards, dones, time_outs, next_states = as_steps
    num_states = int(states.max()) + 1
    value = torch.zeros(num_states, dtype=torch.float64, device=device)
    counts = torch.bincount(states.flatten(), minlength=num_states)
    final = next_states.clamp(max=num_states - 1)
    for _ in range(1800):  # 0.99^1800 = 1e-8
        _, returns = gae(
            rewards.double(),
            value[states],
            dones,
            value[final[-1]],
            GAMMA,
            LAM,
            time_outs=time_outs,
            final_values=value[final] if bootstrap_from_final else None,
            backend=backend,
        )
        value = torch.zeros_like(value).index_add_(0, states.flatten(), returns.flatten()) / counts
    return value.tolist()


@pytest.mark.parametrize("backend", IN_FLOAT64, indirect=True)
@pytest.mark.parametrize(("bootstrap_from_final", "values"), [(True, [100.0]), (False, [100.0])])
def test_world_of_one_state(backend: str, device: str, bootstrap_from_final: bool, values: list[float]) -> None:
    """r = 1 for ever, cut every 10 steps: 1 / (1 - γ), with either bootstrap, since the next state is the same."""
    limit = [0] * 9 + [1]
    got = fixed_point(backend, device, [[0] * 10], [[1.0] * 10], [limit], [limit], [[0] * 10], bootstrap_from_final)
    assert got == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("backend", IN_FLOAT64, indirect=True)
@pytest.mark.parametrize(("bootstrap_from_final", "values"), [(True, [99.0, 100.0]), (False, [0.0, 100.0])])
def test_world_of_two_states(backend: str, device: str, bootstrap_from_final: bool, values: list[float]) -> None:
    """0 -> 1 without reward, 1 -> 1 with 1, cut after each step. From V(s_t) the stock never learns V(0)."""
    got = fixed_point(
        backend, device, [[0, 0], [1, 1]], [[0.0, 0.0], [1.0, 1.0]], [[1, 1], [1, 1]], [[1, 1], [1, 1]],
        [[1, 1], [1, 1]], bootstrap_from_final,
    )  # fmt: skip
    assert got == pytest.approx(values, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", IN_FLOAT64, indirect=True)
@pytest.mark.parametrize(("time_out", "bootstrap", "value"), [(0, True, 1.0), (0, False, 1.0), (1, False, 100.0)])
def test_world_that_ends_at_its_limit(backend: str, device: str, time_out: int, bootstrap: bool, value: float) -> None:
    """A true end on the step of the limit is worth its reward, 1. The stock takes it for a time-out: 100."""
    got = fixed_point(backend, device, [[0]], [[1.0]], [[1]], [[time_out]], [[0]], bootstrap)
    assert got == pytest.approx([value], rel=1e-5)


# --- PyTorch, threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(7, 33), (7, 33, 1)])
def test_out(backend: str, device: str, shape: tuple[int, ...], normalize: bool) -> None:
    """The same bits, in the memory that was given."""
    rollout = make_rollout(7, 33, time_outs=True, final_values=True, device=device)
    wanted = call(rollout, backend, normalize=normalize)
    shaped = {name: t if name == "last_values" else t.view(shape) for name, t in rollout.items()}
    out = torch.full(shape, torch.nan, device=device), torch.full(shape, torch.nan, device=device)
    found = call(shaped, backend, normalize=normalize, out=out)
    assert found[0] is out[0]
    assert found[1] is out[1]
    assert torch.equal(out[0].view(7, 33), wanted[0])
    assert torch.equal(out[1].view(7, 33), wanted[1])


def test_out_of_float64(backend: str, device: str) -> None:
    if backend not in IN_FLOAT64:
        pytest.skip("float32 only")
    rollout = {name: t if t is None or t.dtype == torch.bool else t.double() for name, t in make_rollout(3, 4).items()}
    out = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    call(rollout, backend, out=out)
    assert all(map(torch.equal, out, call(rollout, backend)))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(3, 4), TypeError, "out must be a tuple of two tensors"),
        ((torch.zeros(3, 4), None), TypeError, r"out\[1\] must be a tensor"),
        ((torch.zeros(3, 4), torch.zeros(4, 3)), ValueError, r"out\[1\] must have the shape \[3, 4\]"),
        ((torch.zeros(4, 3).T, torch.zeros(3, 4)), ValueError, r"out\[0\] must be contiguous"),
        ((torch.zeros(3, 4).double(), torch.zeros(3, 4)), TypeError, r"out\[0\] must be torch.float32"),
        ((torch.zeros(3, 4, device="meta"), torch.zeros(3, 4)), ValueError, r"out\[0\] is on meta"),
    ],
)
def test_out_that_does_not_fit(out: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make_rollout(3, 4), out=out)


@pytest.mark.parametrize("name", ["rewards", "values", "dones", "last_values", "time_outs", "final_values"])
@pytest.mark.parametrize("which", [0, 1])
def test_out_in_memory_of_an_argument(name: str, which: int) -> None:
    """Wholly, in part, and where the argument is a view that begins before it."""
    memory = torch.zeros(40)
    out = [torch.zeros(3, 4), torch.zeros(3, 4)]
    out[which] = memory[12:24].view(3, 4)
    rollout = make_rollout(3, 4, time_outs=True, final_values=True)
    num_rows = 1 if name == "last_values" else 3
    views = [memory[begin : begin + 4 * num_rows].view(num_rows, 4) for begin in (12, 13, 23, 13 - 4 * num_rows)]
    views.append(memory[: 10 * num_rows].view(num_rows, 10)[:, ::3][:, :4])
    for view in views[: 4 if num_rows == 1 else 5]:
        given = view[0] if name == "last_values" else view
        if name in ("dones", "time_outs"):  # flags of other types are converted, to memory of their own
            given = memory.view(torch.uint8)[4 * view.storage_offset() :][: 4 * num_rows].view(num_rows, 4)
            if given.data_ptr() + given.numel() <= out[which].data_ptr():
                continue
        with pytest.raises(ValueError, match=rf"^out\[{which}\] shares memory with {name}"):
            call({**rollout, name: given}, out=tuple(out))


def test_out_that_overlaps() -> None:
    memory = torch.zeros(24)
    first, second = memory[:12].view(3, 4), memory[12:].view(3, 4)
    call(make_rollout(3, 4), out=(first, second))
    for one, other in ((first, first), (first, memory[11:23].view(3, 4)), (memory[1:13].view(3, 4), first)):
        with pytest.raises(ValueError, match=r"^out\[0\] and out\[1\] share memory"):
            call(make_rollout(3, 4), out=(one, other))


def test_out_beside_the_arguments() -> None:
    """Slices of one allocation, and columns of one array, that end where the next begins."""
    rollout = make_rollout(3, 4)
    memory = torch.zeros(4, 12)
    memory[0], memory[2] = rollout["rewards"].flatten(), rollout["values"].flatten()
    rollout |= {"rewards": memory[0].view(3, 4), "values": memory[2].view(3, 4)}
    want = call(rollout)
    call(rollout, out=(memory[1].view(3, 4), memory[3].view(3, 4)))
    assert torch.equal(memory[1].view(3, 4), want[0])
    assert torch.equal(memory[3].view(3, 4), want[1])


def test_autograd_sees_what_is_written(backend: str, device: str) -> None:
    """A tensor that a graph has saved and that gae then overwrites: an error, as everywhere in torch."""
    out = tuple(torch.ones(3, 4, device=device) for _ in range(2))
    for i in (0, 1):
        x = torch.ones(3, 4, device=device, requires_grad=True)
        product = (x * out[i]).sum()
        call(make_rollout(3, 4, device=device), backend, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_out_of_inference(backend: str, device: str) -> None:
    rollout = make_rollout(3, 4, device=device)
    with torch.inference_mode():
        inference = torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)
        call(rollout, backend, out=inference)
        normal = call(rollout, backend)
        assert all(map(torch.equal, inference, normal))
    out = torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)
    with torch.inference_mode():
        call(rollout, backend, out=out)
    assert all(map(torch.equal, out, normal))


def test_out_that_requires_a_gradient(backend: str, device: str) -> None:
    rollout = make_rollout(3, 4, device=device)
    for i in (0, 1):
        out = [torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device)]
        out[i].requires_grad_()
        with pytest.raises(ValueError, match=rf"^out\[{i}\] requires a gradient"):
            call(rollout, backend, out=tuple(out))
        with torch.no_grad():
            call(rollout, backend, out=tuple(out))


def test_out_with_the_negative_bit() -> None:
    lazy = torch.zeros(1, 1, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match=r"^out\[1\] has torch's negative bit"):
        call(make_rollout(1, 1), out=(torch.zeros(1, 1), lazy))


def test_no_gradients(backend: str, device: str) -> None:
    rollout = make_rollout(5, 6, time_outs=True, final_values=True, device=device)
    for name in ("rewards", "values", "last_values", "final_values"):
        rollout[name] = rollout[name].requires_grad_()
    assert not any(t.requires_grad for t in call(rollout, backend))


def test_inputs_are_left_alone(backend: str, device: str) -> None:
    rollout = make_rollout(5, 6, time_outs=True, device=device)
    before = {name: t.clone() for name, t in rollout.items() if t is not None}
    call(rollout, backend, normalize=True)
    assert all(torch.equal(rollout[name], t) for name, t in before.items())


def test_inference_tensors(backend: str, device: str) -> None:
    rollout = make_rollout(5, 6, time_outs=True, final_values=True, device=device)
    want = call(rollout, backend)
    with torch.inference_mode():
        stored = {name: t.clone() for name, t in rollout.items()}
        under = call(stored, backend)
    for one, other, third in zip(call(stored, backend), under, want, strict=True):
        assert torch.equal(one, third)
        assert torch.equal(other, third)


@pytest.mark.parametrize("names", [(name,) for name in NAMES] + [NAMES], ids=str)
def test_batches_of_vmap(backend: str, device: str, names: tuple[str, ...]) -> None:
    """Of all arguments, or of one that then meets others without a batch."""
    rollouts = [make_rollout(5, 6, seed, time_outs=True, final_values=True, device=device) for seed in (0, 1)]
    rollouts[1] = {**rollouts[0], **{name: rollouts[1][name] for name in names}}
    batch = {name: torch.stack([rollout[name] for rollout in rollouts]) for name in names}
    got = torch.func.vmap(lambda batch: call({**rollouts[0], **batch}, backend))(batch)
    for i, rollout in enumerate(rollouts):
        for one, want in zip(got, call(rollout, backend), strict=True):
            torch.testing.assert_close(one[i], want, equal_nan=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_compiled(backend: str, device: str, normalize: bool) -> None:
    torch.compiler.reset()
    rollout = make_rollout(5, 6, time_outs=True, final_values=True, device=device)

    def double(rollout: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        advantages, returns = call(rollout, backend, normalize=normalize)
        return advantages * 2, returns

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(rollout), double(rollout), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_with_other_numbers(backend: str, device: str) -> None:
    """An integer among them; the compiler makes symbols of those that change."""
    torch.compiler.reset()
    rollout = make_rollout(5, 6, device=device)
    tensors = [rollout[name] for name in ("rewards", "values", "dones", "last_values")]

    def returns(gamma: float, lam: float) -> Tensor:
        return gae(*tensors, gamma, lam, backend=backend)[1]

    compiled = torch.compile(returns, fullgraph=True, backend="aot_eager")
    for numbers in ((0.99, 0.95), (0.9, 0.95), (1, 0.95), (0.9, 1), (0.9, 0), (1, 2)):
        torch.testing.assert_close(compiled(*numbers), returns(*numbers))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("num_envs", [1, 130, 4096])
def test_same_bits_on_any_number_of_threads(backend: str, device: str, restore_threads: None, num_envs: int) -> None:
    rollout = make_rollout(24, num_envs, time_outs=True, final_values=True, device=device)
    want = call(rollout, backend, normalize=True)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for got, first in zip(call(rollout, backend, normalize=True), want, strict=True):
            assert torch.equal(got, first)


@pytest.mark.parametrize("name", ["rewards", "values", "last_values"])
def test_nan_shows_in_its_environment(backend: str, device: str, name: str) -> None:
    """And nowhere else: the others' advantages stay what they were."""
    rollout = make_rollout(6, 140, done_share=0.0, device=device)
    good, _ = call(rollout, backend)
    rollout[name].view(-1, 140)[0, 129] = float("nan")
    bad, returns = call(rollout, backend)
    assert torch.isnan(bad[0, 129])
    assert torch.isnan(returns[0, 129])
    others = [env for env in range(140) if env != 129]
    assert torch.equal(bad[:, others], good[:, others])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("gamma", "lam"), [(GAMMA, 0.0), (GAMMA, LAM)])
def test_what_does_not_count_does_not_leak(backend: str, device: str, value: float, gamma: float, lam: float) -> None:
    """λ = 0, or an episode that ends: a later reward of NaN or infinity leaves the advantages before it alone."""
    rollout = make_rollout(50, 40, done_share=0.0, device=device)
    rollout["dones"][29] = lam != 0.0
    good = call(rollout, backend, gamma, lam)
    rollout["rewards"][30, 7] = value
    bad = call(rollout, backend, gamma, lam)
    for one, other in zip(bad, good, strict=True):
        assert not torch.isfinite(one[30, 7])
        one[30, 7] = other[30, 7]  # everything else is the same
        assert torch.equal(one, other)


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_wrong_tensors_are_named(name: str) -> None:
    rollout = make_rollout(4, 5, time_outs=True, final_values=True)
    t = rollout[name]
    shaped_by_rewards = "values" if name == "rewards" else name  # rewards say what the others must be
    with pytest.raises(ValueError, match=rf"^(last_)?{shaped_by_rewards} must have the shape"):
        call({**rollout, name: t[:-1]})
    with pytest.raises(ValueError, match=rf"^{name} must be|^{name} must have the shape"):
        call({**rollout, name: t.reshape(-1, 1, 1, 1)})
    if name not in ("time_outs", "final_values"):
        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got NoneType"):
            call({**rollout, name: None})
    if name in ("dones", "time_outs"):
        with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got list"):
            call({**rollout, name: t.tolist()})
    else:
        with pytest.raises(TypeError, match=rf"^{name} must be float32.*got torch.int64"):
            call({**rollout, name: t.long()})
    if name == "rewards":
        with pytest.raises(ValueError, match=r"^\w+ is on cpu, the other arguments are on meta"):
            call({**rollout, name: t.to("meta")})
    else:
        with pytest.raises(ValueError, match=rf"^{name} is on meta, the other arguments are on cpu"):
            call({**rollout, name: t.to("meta")})


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5,), (4, 5, 2)])
def test_wrong_shape_of_the_rewards(shape: tuple[int, ...]) -> None:
    t = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"^rewards must"):
        gae(t, t, t, torch.zeros(shape[-1:]), GAMMA, LAM)


def test_final_values_without_time_outs() -> None:
    rollout = make_rollout(4, 5, time_outs=True, final_values=True)
    with pytest.raises(ValueError, match=r"^final_values needs time_outs"):
        call({**rollout, "time_outs": None})


def test_wrong_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        call(make_rollout(4, 5), "gpu")


@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_wrong_number(name: str) -> None:
    numbers = {"gamma": 0.9, "lam": 0.9}
    for wrong in (None, "0.9", [0.9], True):
        with pytest.raises(TypeError, match=rf"^{name} must be a number, got {type(wrong).__name__}"):
            call(make_rollout(3, 4), **{**numbers, name: wrong})
    with pytest.raises(ValueError, match=rf"^{name} must be a number, got shape \[2\]"):
        call(make_rollout(3, 4), **{**numbers, name: torch.ones(2)})
    want = call(make_rollout(3, 4), **{**numbers, name: 1.0})
    for right in (1, torch.ones(()), np.float32(1.0)):
        assert all(map(torch.equal, call(make_rollout(3, 4), **{**numbers, name: right}), want))


def test_wrong_backend_under_torch_compile() -> None:
    """The formula is compiled whatever the backend; a name that is none is wrong all the same."""
    torch.compiler.reset()
    compiled = torch.compile(lambda rollout: call(rollout, "gpu"), backend="aot_eager")
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        compiled(make_rollout(3, 4))
