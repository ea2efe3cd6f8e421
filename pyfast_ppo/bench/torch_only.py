"""What a skilled user makes of rsl_rl's PPO with PyTorch alone: the contender without a kernel of its own.

Networks and rsl_rl's formula are one ``torch.compile``, so are the returns; nothing is read on the host before the
end of the update, the adaptive learning rate is decided on the device, Adam is fused, each mini-batch is gathered
once per update and no unused action is drawn. On a GPU the whole step, backward and optimizer with it, is a CUDA
graph: what LeanRL does. For the models of ``synthetic.py`` only.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
import torch.nn as nn
from rsl_rl.algorithms import PPO
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo.bench.stock import stock_gae, stock_loss
from pyfast_ppo.cuda_graph import Graph


class Replayed:
    """``work`` as a CUDA graph with memory of its own for what it is given: tensordict's ``CudaGraphModule``.

    That one records with ``torch.cuda.graph``, which spoils the process for the other contenders where it fails; see
    ``Graph.record``.
    """

    _WARMUP = 3  # calls: the compiler, and the optimizer's first step

    def __init__(self, work: Callable[..., Tensor]) -> None:
        """Records nothing yet."""
        self._work = work
        self._stream = torch.cuda.Stream()
        self._num_calls = 0
        self._graph: Graph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What ``work`` returns."""
        self._num_calls += 1
        if self._num_calls <= self._WARMUP:
            return self._beside(inputs)
        if self._graph is None:
            self._inputs = [t.clone() for t in inputs]
            graph = Graph(inputs[0].device)
            self._output = graph.record(lambda: self._work(*self._inputs))
            self._graph = graph
        else:
            torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._output.clone()

    def _beside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On another stream: backward nodes made on the current one would wait for it in the recording."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = self._work(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return output


class TorchOnlyPPO(PPO):
    """Computes what ``PPO`` computes, to rounding, for MLPs, a state-independent std and the adaptive schedule."""

    learning_rate: float

    def __init__(self, *args, **kwargs) -> None:
        """As ``PPO``."""
        super().__init__(*args, **kwargs)
        on_gpu = torch.device(self.device).type == "cuda"
        self._rate = torch.tensor(self.learning_rate, device=self.device)
        parameters = list(chain(self.actor.parameters(), self.critic.parameters()))
        self.optimizer = torch.optim.Adam(parameters, lr=self._rate, fused=True, capturable=on_gpu)
        self._compiled_loss = torch.compile(self._loss, dynamic=False)
        self._compiled_gae = torch.compile(stock_gae, dynamic=False)
        self._replayed_step: Callable[..., Tensor] = Replayed(self._step) if on_gpu else self._step

    def compute_returns(self, obs: TensorDict) -> None:
        """As ``PPO``; the loop over the steps is unrolled by the compiler."""
        st = self.storage
        last_values = self.critic(obs).detach()
        advantages, returns = self._compiled_gae(st.rewards, st.values, st.dones, last_values, self.gamma, self.lam)
        st.returns.copy_(returns)
        st.advantages = advantages

    def update(self) -> dict[str, float]:
        """As ``PPO``."""
        batches = list(self.storage.mini_batch_generator(self.num_mini_batches, 1))
        metrics = [
            self._replayed_step(
                batch.observations["policy"],
                batch.actions,
                batch.old_actions_log_prob,
                *batch.old_distribution_params,
                batch.advantages,
                batch.returns,
                batch.values,
            )
            for _ in range(self.num_learning_epochs)
            for batch in batches
        ]
        *means, rate = [*torch.stack(metrics).mean(0).unbind(), self._rate]
        surrogate, value, entropy, self.learning_rate = torch.stack([*means, rate]).tolist()
        self.storage.clear()
        return {"value": value, "surrogate": surrogate, "entropy": entropy}

    def _step(self, obs: Tensor, *rollout: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        out = self._compiled_loss(obs, *rollout)
        self._adapt_rate(out.kl)
        out.loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.max_grad_norm)
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return torch.stack([out.surrogate, out.value_loss, out.entropy]).detach()

    def _loss(self, obs: Tensor, *rollout: Tensor):
        distribution = self.actor.distribution
        mean, std = self.actor.mlp(obs), distribution.std_param.clamp(*distribution.std_range)
        coefficients = (self.clip_param, self.value_loss_coef, self.entropy_coef)
        names = ("clip_param", "value_loss_coef", "entropy_coef")
        return stock_loss(mean, std, self.critic.mlp(obs), *rollout, **dict(zip(names, coefficients, strict=True)))

    def _adapt_rate(self, kl: Tensor) -> None:
        lowered, raised = (self._rate / 1.5).clamp(min=1e-5), (self._rate * 1.5).clamp(max=1e-2)
        rate = torch.where((kl < self.desired_kl / 2.0) & (kl > 0.0), raised, self._rate)
        self._rate.copy_(torch.where(kl > self.desired_kl * 2.0, lowered, rate))
