"""rsl_rl's PPO with the fused loss."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version

import torch
import torch.nn as nn
from rsl_rl.algorithms import PPO
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo import backends
from pyfast_ppo.ops.gae import gae
from pyfast_ppo.ops.gaussian import gaussian_kl
from pyfast_ppo.ops.ppo_loss import KL_DIRECTIONS, PPOLossOutput, ppo_loss_and_grad
from pyfast_ppo.rsl_rl.policy import SampleSkipper, first_row, reason_not_fused, row_behind, std_is_parameter
from pyfast_ppo.schedules import RslRlSchedule

logger = logging.getLogger(__name__)

# rsl_rl updates the observation normalizers once per iteration since 5.5, in update(); before, at each step of the
# environment
_NORMALIZES_IN_UPDATE = tuple(int(part) for part in version("rsl-rl-lib").split(".")[:2]) >= (5, 5)


class FusedPPO(PPO):
    """Proximal Policy Optimization, with the loss, its metrics and all its gradients from one kernel.

    A drop-in for ``rsl_rl.algorithms.PPO`` (5.4 and 5.5): name it in the algorithm section of a runner config,
    ``class_name = "pyfast_ppo.rsl_rl:FusedPPO"``. Every argument of PPO keeps its name and meaning, checkpoints of
    either load into the other, and with the defaults the results are those of PPO, to rounding. What changes:

    - ``update()`` draws no actions that nobody uses, and gathers each mini-batch once per update, not once per epoch.
    - Its losses stay on the device and are read once, at the end.
    - ``loss_dict`` also has ``kl`` (mean exact KL, in ``kl_direction``), ``first_kl`` (at the first mini-batch, before
      any step: more than rounding means that acting and updating see different policies), ``clip_fraction`` and
      ``approx_kl`` (k3).
    - The adaptive learning rate leaves out the mini-batch before the first step. rsl_rl does so only where rounding
      makes that KL exactly 0: not in bfloat16, and not in rsl_rl 5.4 with normalized observations, where the normalizer
      moves while the rollout is collected (see ``adapt_before_first_step``).

    A policy that is not a diagonal Gaussian (Beta, or formulas of its own) runs on PPO's own ``update()``; the log says
    so once.
    """

    def __init__(
        self,
        *args,
        backend: str | None = None,
        kl_coef: float = 0.0,
        kl_direction: str = "old_new",
        keep_random_stream: bool = False,
        adapt_before_first_step: bool = False,
        **kwargs,
    ) -> None:
        """Initialize the algorithm. All other arguments are those of ``rsl_rl.algorithms.PPO``.

        Args:
            backend: "cuda", "triton", "cpu", "eager", or None for the best that is available.
            kl_coef: Weight of the exact KL between the old and the new policy in the loss. 0: none, as in PPO.
            kl_direction: "old_new" for KL(old‖new), "new_old" for KL(new‖old).
            keep_random_stream: Draw the unused actions, so that random numbers come in the same order as in PPO: only
                for comparisons, number by number.
            adapt_before_first_step: Let the adaptive learning rate act on the first mini-batch, too, if its KL is not
                exactly 0: what PPO does in mixed precision, where rounding does not hide that KL.

        Raises:
            ValueError: An unknown backend or direction; ``kl_coef`` with a policy that is not a diagonal Gaussian.
            RuntimeError: The backend is not available.
        """
        super().__init__(*args, **kwargs)
        # a wrong name is told now, not after the first rollout
        selected = backends.select(backend, torch.device(self.device))
        if selected.name == "eager" and backend is None:
            logger.warning(
                "No fused backend for %s: FusedPPO runs plain PyTorch, no faster than PPO; see `pyfast-ppo doctor`.",
                self.device,
            )
        if kl_direction not in KL_DIRECTIONS:
            raise ValueError(f"kl_direction must be one of {KL_DIRECTIONS}, got {kl_direction!r}")
        self.backend = backend
        self.kl_coef = kl_coef
        self.kl_direction = kl_direction
        self.keep_random_stream = keep_random_stream
        self.adapt_before_first_step = adapt_before_first_step

        self._stock_reason = reason_not_fused(self._raw_actor)
        if self._stock_reason is not None:
            if kl_coef != 0.0:
                raise ValueError(f"kl_coef needs a diagonal Gaussian policy: {self._stock_reason}")
            logger.warning("The loss runs on rsl_rl's own formula: %s.", self._stock_reason)
            return
        distribution = self._raw_actor.distribution
        self._std_is_parameter = std_is_parameter(distribution)
        self._without_sampling = nullcontext if keep_random_stream else SampleSkipper(distribution)

    # --- returns
    # ------------------------------------------------------------------------------------------------------------

    def compute_returns(self, obs: TensorDict) -> None:
        """Compute return and advantage targets from stored transitions."""
        st = self.storage
        # Values of the last step; the forward pass must not move a recurrent critic on
        hidden_state = self.critic.get_hidden_state()
        last_values = self.critic(obs).detach()
        self.critic.reset(hidden_state=hidden_state)
        st.advantages, returns = gae(
            st.rewards,
            st.values,
            st.dones,
            last_values,
            self.gamma,
            self.lam,
            normalize=not self.normalize_advantage_per_mini_batch,
            backend=self.backend,
        )
        st.returns.copy_(returns)

    # --- update
    # -------------------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """Run optimization epochs over stored batches and return mean losses."""
        if self._stock_reason is not None:
            return super().update()

        metrics = []  # one row per mini-batch, on the device
        for step, batch in enumerate(self._mini_batches()):
            metrics.append(self._step(batch, step_taken=step > 0))

        if _NORMALIZES_IN_UPDATE:
            obs = self.storage.observations.flatten(0, 1)
            self.actor.update_normalization(obs)
            self.critic.update_normalization(obs)
            if self.rnd:
                self.rnd.update_normalization(obs)
        self.storage.clear()
        return self._loss_dict(torch.stack(metrics))

    def _mini_batches(self) -> Iterator[RolloutStorage.Batch]:
        """The mini-batches of all epochs. rsl_rl shuffles once per update, so that each epoch has the same ones."""
        recurrent = self.actor.is_recurrent or self.critic.is_recurrent
        storage = self.storage
        generate = storage.recurrent_mini_batch_generator if recurrent else storage.mini_batch_generator
        batches = list(generate(self.num_mini_batches, 1))
        if self.normalize_advantage_per_mini_batch:
            for batch in batches:
                batch.advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
        for _ in range(self.num_learning_epochs):
            for batch in batches:
                batch = copy.copy(batch)  # symmetry puts other tensors into the batch that it is given
                if self.symmetry:  # and the user's function may write into the tensors
                    batch.observations, batch.actions = batch.observations.clone(), batch.actions.clone()
                yield batch

    def _step(self, batch: RolloutStorage.Batch, step_taken: bool) -> Tensor:
        """One step of the optimizer; returns the row of metrics."""
        original_batch_size = batch.observations.batch_size[0]
        augmented = self.symmetry is not None and self.symmetry.use_data_augmentation
        if self.symmetry:
            self.symmetry.augment_batch(batch, original_batch_size)

        rnd_loss = symmetry_loss = None
        with self._autocast():
            with self._without_sampling():
                self.actor(
                    batch.observations,
                    masks=batch.masks,
                    hidden_state=batch.hidden_states[0],
                    stochastic_output=True,
                )
            mean, std = self.actor.output_distribution_params
            values = self.critic(batch.observations, masks=batch.masks, hidden_state=batch.hidden_states[1])
            if self.rnd:
                rnd_loss = self.rnd.compute_loss(batch.observations[:original_batch_size])
            if self.symmetry:
                symmetry_loss = self.symmetry.compute_loss(self.actor, batch, original_batch_size)

        std = row_behind(std)
        old_mean, old_std = batch.old_distribution_params
        if self._std_is_parameter:
            old_std = first_row(old_std)
        num_original = original_batch_size if augmented else None
        out, grads = ppo_loss_and_grad(
            mean,
            std,
            values,
            batch.actions,
            batch.old_actions_log_prob,
            old_mean,
            old_std,
            batch.advantages,
            batch.returns,
            batch.values,
            clip_param=self.clip_param,
            value_loss_coef=self.value_loss_coef,
            entropy_coef=self.entropy_coef,
            use_clipped_value_loss=self.use_clipped_value_loss,
            kl_coef=self.kl_coef,
            kl_direction=self.kl_direction,
            num_original=num_original,
            backend=self.backend,
        )

        if self.desired_kl is not None and self.schedule == "adaptive":
            kl = out.kl
            if self.kl_direction != "old_new":
                new_std = std if std.dim() == 1 else std[:num_original]
                new = (mean[:num_original].detach(), new_std.detach())
                kl = gaussian_kl(old_mean, old_std, *new, backend=self.backend).mean()
            self._adapt_learning_rate(kl, step_taken)

        self._backward([mean, std, values], list(grads), symmetry_loss, rnd_loss)
        return self._metrics(out, rnd_loss, symmetry_loss)

    def _autocast(self):
        # rsl_rl has mixed precision since 5.5
        enabled = getattr(self, "use_mixed_precision", False)
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=enabled)

    def _adapt_learning_rate(self, kl: Tensor, step_taken: bool) -> None:
        if self.is_multi_gpu:
            kl = kl.clone()
            torch.distributed.all_reduce(kl, op=torch.distributed.ReduceOp.SUM)
            kl /= self.gpu_world_size
        if self.adapt_before_first_step and not step_taken:
            step_taken = bool(kl > 0.0)
        lr = torch.tensor(self.learning_rate, dtype=torch.float64, device=kl.device)
        self.learning_rate = RslRlSchedule(self.desired_kl).update(kl, lr, step_taken).item()
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = self.learning_rate

    def _backward(
        self, outputs: list[Tensor], grads: list[Tensor], symmetry_loss: Tensor | None, rnd_loss: Tensor | None
    ) -> None:
        """Backward through the networks, from the gradients of their outputs; then one step."""
        if symmetry_loss is not None and self.symmetry.use_mirror_loss:
            mirror_loss = self.symmetry.mirror_loss_coeff * symmetry_loss
            outputs.append(mirror_loss)
            grads.append(torch.ones_like(mirror_loss))
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        self.optimizer.zero_grad()
        torch.autograd.backward(*zip(*pairs, strict=True))
        if self.rnd:
            self.rnd.optimizer.zero_grad()
            rnd_loss.backward()
        if self.is_multi_gpu:
            self.reduce_parameters()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.max_grad_norm)
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.rnd:
            self.rnd.optimizer.step()

    # --- metrics
    # ------------------------------------------------------------------------------------------------------------

    def _metrics(self, out: PPOLossOutput, rnd_loss: Tensor | None, symmetry_loss: Tensor | None) -> Tensor:
        """The mini-batch's entries of ``loss_dict``, in the order of ``_metric_names``."""
        row = [out.value_loss, out.surrogate, out.entropy]
        row += [loss.detach().to(out.loss.dtype) for loss in (rnd_loss, symmetry_loss) if loss is not None]
        return torch.stack([*row, out.kl, out.clip_fraction, out.approx_kl])

    def _metric_names(self) -> list[str]:
        names = ["value", "surrogate", "entropy"]
        names += ["rnd"] if self.rnd else []
        names += ["symmetry"] if self.symmetry else []
        return [*names, "kl", "clip_fraction", "approx_kl"]

    def _loss_dict(self, metrics: Tensor) -> dict[str, float]:
        """[mini-batches, metrics] -> means over the update; the only time that the host waits for them."""
        names = self._metric_names()
        means, first = torch.stack([metrics.mean(0), metrics[0]]).tolist()
        loss_dict = dict(zip(names, means, strict=True))
        loss_dict["first_kl"] = first[names.index("kl")]
        return loss_dict
