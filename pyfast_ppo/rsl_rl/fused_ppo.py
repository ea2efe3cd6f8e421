"""rsl_rl's PPO with the fused loss: its arguments, its update and its checkpoints."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from rsl_rl.storage import RolloutStorage
from torch import Tensor
from torch.optim import Optimizer

from pyfast_ppo import backends
from pyfast_ppo.ops.gaussian import gaussian_kl
from pyfast_ppo.ops.ppo_loss import KL_DIRECTIONS, ppo_loss_and_grad
from pyfast_ppo.ops.shared_row import first_row, is_shared_row
from pyfast_ppo.precision import matmul_precision
from pyfast_ppo.reference import METRICS
from pyfast_ppo.rsl_rl.captured import Captured, addresses, frozen, options, settings
from pyfast_ppo.rsl_rl.kl_control import KL_RULES, KLControl
from pyfast_ppo.rsl_rl.metrics import RULE_KL, Run
from pyfast_ppo.rsl_rl.mini_batches import fits_at_once, gathered, rows_of, works_row_by_row
from pyfast_ppo.rsl_rl.mlp import fused_hidden_layers, observations_in_place, widest_layer
from pyfast_ppo.rsl_rl.nonfinite import NonFiniteError, first_nonfinite, statistics_in_place
from pyfast_ppo.rsl_rl.optimizer import DeviceRate, fitting_option
from pyfast_ppo.rsl_rl.plain_networks import PlainNetworks
from pyfast_ppo.rsl_rl.policy import (
    NORMALIZES_IN_UPDATE,
    Instead,
    detach_last_forward,
    law_not_gaussian,
    mean_of,
    reason_not_fused,
    row_behind,
)
from pyfast_ppo.rsl_rl.ranks import from_first_rank, standardized_over_ranks
from pyfast_ppo.rsl_rl.rollout import FusedRollout
from pyfast_ppo.schedules import RslRlScheduleBefore5

logger = logging.getLogger(__name__)

_CHOICES = {
    "kl_direction": KL_DIRECTIONS,
    "kl_rule": tuple(KL_RULES),
    "time_out_bootstrap": ("final_obs", "rsl_rl"),
    "nonfinite": ("skip", "raise", "ignore"),
}
_CHECKPOINT_KEY = "pyfast_ppo"
_PIECE_BYTES = 2**21  # of the widest layer's activations


class FusedPPO(FusedRollout):
    """Proximal Policy Optimization, with the loss, its metrics and all its gradients from one kernel.

    A drop-in for ``rsl_rl.algorithms.PPO`` (5.4 and 5.5): name it in the algorithm section of a runner config,
    ``class_name = "pyfast_ppo.rsl_rl:FusedPPO"``. Every argument of PPO keeps its name and meaning, checkpoints of
    either load into the other, and with the defaults the results are those of PPO, to rounding. What changes:

    - A time-out bootstraps from the value of the observation before the reset, if the environment hands it out as
      ``extras["final_obs"]``; the stock wrappers do not, and then it is V(s_t) as in PPO (see ``time_out_bootstrap``).
      Where that value is not finite it is V(s_t), too, and is counted in ``loss_dict["nonfinite_final_values"]``.
    - ``update()`` draws no actions that nobody uses, and gathers each mini-batch once per update, not once per epoch,
      unless the rollout's observations are larger than 256 MiB: then memory is what counts.
    - Its losses stay on the device and are read once, at the end.
    - ``loss_dict`` also has ``kl`` (mean exact KL, in ``kl_direction``), ``first_kl`` (at the first mini-batch, before
      any step: more than rounding means that acting and updating see different policies), ``max_kl`` and ``last_kl``,
      ``approx_kl`` (k3), ``clip_fraction``, and under the adaptive schedule ``learning_rate_min`` and ``_max`` within
      the update.
    - A step whose gradients are not finite is not taken, and is counted in ``loss_dict["nonfinite_steps"]``; an update
      in which no step could be taken raises ``NonFiniteError`` (see ``nonfinite``). So the networks stay finite and the
      error names the frame. But one infinite reward ends the run: advantages are normalised over the rollout, and then
      all of them are NaN. With ``normalize_advantage_per_mini_batch`` only some mini-batches are lost: those with a row
      of that episode, of the infinite reward's step or before it. RND's steps are counted by themselves, as
      ``nonfinite_rnd_steps``, and are an error alike.
    - The adaptive learning rate is decided on the device, without a host sync: within an update a hook of the optimizer
      finds it as a 0-dim tensor. Clipping and the step of Adam or AdamW are one operation, which leaves an unusual
      optimizer to torch (see ``adam.py``); SGD without momentum takes torch's fused step.
    - A std that is a parameter is kept once for the whole rollout: nobody may change it between two of its steps.
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
        kl_target: float | None = None,
        kl_rule: str = "rsl_rl",
        early_stop_kl: float | None = None,
        time_out_bootstrap: str = "final_obs",
        nonfinite: str = "skip",
        reshuffle: bool = False,
        global_advantage_statistics: bool = False,
        cuda_graph: bool = False,
        keep_random_stream: bool = False,
        adapt_before_first_step: bool = False,
        **kwargs,
    ) -> None:
        """Initialize the algorithm. All other arguments are those of ``rsl_rl.algorithms.PPO``.

        Args:
            backend: "cuda", "triton", "cpu", "eager", or None for the best that is available.
            kl_coef: Weight of the exact KL between the old and the new policy in the loss. 0: none, as in PPO.
            kl_direction: "old_new" for KL(old‖new), "new_old" for KL(new‖old).
            kl_target: Adapt ``kl_coef`` after each update, so that the KL of its last epoch comes near this many nats:
                the adaptive penalty of PPO (Schulman et al. 2017, section 4). ``kl_coef`` must then be positive.
            kl_rule: What ``schedule="adaptive"`` does with the KL: "rsl_rl" (as rsl_rl 5), "rsl_rl_4" (as before 5.0,
                for comparisons with old runs) or "proportional" (once per update; holds the KL closer to
                ``desired_kl``, which then means another learning rate than in rsl_rl).
            early_stop_kl: Take no further steps in an update once a mini-batch's KL is beyond this many nats.
                RND's go on.
            time_out_bootstrap: "final_obs": a time-out bootstraps from V of the observation before the reset, where
                ``extras["final_obs"]`` has it (groups [E, ...], as observations; only rows that are done are looked
                at), and where it has not, or that value is not finite, from V(s_t), as PPO; rows that
                ``extras["terminated"]`` (a tensor with an entry for each environment) names do not bootstrap at all.
                Other forms of the two are ignored, with a warning. A subclass with a ``compute_returns`` of its own has
                final values once that has called this one's. The default, because it is right (Pardo et al. 2018), and
                the same as PPO with environments that publish neither. "rsl_rl": V(s_t) in any case.
            nonfinite: What happens to a step whose gradients are NaN or infinite. "skip": it is not taken, decided on
                the device; the adaptive learning rate goes down; ``loss_dict["nonfinite_steps"]`` counts; normalizers
                keep finite statistics (not with rsl_rl 5.4, which updates them at each step of the environment); an
                update in which no step could be taken raises
                ``NonFiniteError``, which names what was not finite first. "raise": the error comes after any update
                with such a step. "ignore": the step is taken, as in PPO, whose runs end where the std is NaN.
            reshuffle: Draw new mini-batches in each epoch; PPO draws them once per update. Not for recurrent policies,
                whose mini-batches are not drawn.
            global_advantage_statistics: With several processes, normalise advantages by the mean and std over all of
                them; PPO does it in each process by itself.
            cuda_graph: Record acting, the returns and the update as CUDA graphs and replay them, each with one launch
                in place of up to thousands. For feed-forward models; what cannot be recorded runs without, and the log
                says why. Recorded anew when a shape, an address or a number that they freeze changes. Not yet measured
                on a GPU, hence not the default.
            keep_random_stream: Draw the unused actions, so that random numbers come in the same order as in PPO: only
                for comparisons, number by number.
            adapt_before_first_step: Let the adaptive learning rate act on the first mini-batch, too, if its KL is more
                than rounding (1e-12): what PPO does in mixed precision, where rounding does not hide that KL.

        Raises:
            ValueError: An unknown ``backend``, ``kl_direction``, ``kl_rule``, ``time_out_bootstrap`` or ``nonfinite``;
                a negative ``kl_coef``, or ``desired_kl`` of the adaptive schedule; a ``kl_target``, ``early_stop_kl``,
                or ``desired_kl`` of ``kl_rule="proportional"``, that is not positive; a ``kl_target`` without a
                ``kl_coef``; ``reshuffle`` with recurrent models; ``kl_coef``, ``kl_rule``, ``early_stop_kl``,
                ``reshuffle`` or ``nonfinite="raise"`` with a policy that is not a diagonal Gaussian; ``early_stop_kl``
                with an optimizer that cannot skip a step.
            TypeError: One of those numbers is none.
            RuntimeError: The backend is not available.
        """
        super().__init__(
            *args,
            backend=backend,
            time_out_bootstrap=time_out_bootstrap,
            global_advantage_statistics=global_advantage_statistics,
            **kwargs,
        )
        # a wrong name is told now, not after the first rollout
        selected = backends.select(backend, torch.device(self.device))
        if selected.name == "eager" and backend is None:
            logger.warning(
                "No fused backend for %s: FusedPPO runs plain PyTorch, no faster than PPO; see `pyfast-ppo doctor`.",
                self.device,
            )
        if reshuffle and self._recurrent:
            raise ValueError("reshuffle needs feed-forward models: the mini-batches of recurrent ones are not drawn")
        self._piece_rows = _PIECE_BYTES // (4 * widest_layer(self._raw_actor, self._raw_critic)) or 1
        self.kl_coef = kl_coef
        self.kl_rule = kl_rule
        self.kl_direction = kl_direction
        self.keep_random_stream = keep_random_stream
        self.adapt_before_first_step = adapt_before_first_step
        self.nonfinite = nonfinite
        self.reshuffle = reshuffle
        self._iteration = 0  # as the runner counts, for messages
        self._captured = Captured[Run]("The update", self.device) if cuda_graph else None
        self.kl_target = kl_target
        self.early_stop_kl = early_stop_kl
        self._check_settings()
        self._stock_reason: str | None = None
        if reason := reason_not_fused(self._raw_actor):
            self._fall_back(reason)
            return
        reason = self._fuse_rollout(cuda_graph)
        self._controlled: tuple = ()
        self._num_controls = 0
        self._rates: list[DeviceRate] = []  # of the optimizers
        self._follow_settings()
        self._penalty_coef: Tensor | None = None  # the memory of kl_coef on the device, if it adapts
        self._rows: Any = None  # the order of the rollout's rows in each epoch, or in all
        if self._captured is not None and (reason := reason or self._reason_update_not_captured()):
            self._captured.give_up(reason)

    def _fall_back(self, reason: str) -> None:
        """The loss runs on rsl_rl's own formula from now on, unless something was asked for that it cannot do."""
        chosen = {"kl_coef": self.kl_coef != 0.0, "early_stop_kl": self.early_stop_kl is not None}
        chosen |= {"kl_rule": self.kl_rule != "rsl_rl", "reshuffle": self.reshuffle}
        chosen["nonfinite"] = self.nonfinite == "raise"
        if name := next((name for name, is_chosen in chosen.items() if is_chosen), None):
            raise ValueError(f"{name} needs a diagonal Gaussian policy: {reason}")
        self._stock_reason = reason
        logger.warning("The loss runs on rsl_rl's own formula: %s.", reason)
        if self._captured is not None and self._captured.reason is None:
            self._captured.give_up("rsl_rl's own waits for the device")

    def _follow_settings(self) -> None:
        """Makes what steers the optimizers: anew if one of them was changed, or what its steps follow."""
        desired_kl = self.desired_kl if self.schedule == "adaptive" else None
        rule = (desired_kl, self.kl_rule, self.kl_target, self.early_stop_kl, self.adapt_before_first_step)
        optimizers = self._optimizers()
        groups = [(o, len(o.param_groups), fitting_option(o)) for o in optimizers]
        wanted = (groups, rule, self.backend)
        if wanted == self._controlled:
            return
        before = [*self._rates, None, None]
        self._rates = [self._rate_of(o, rate) for o, rate in zip(optimizers, before, strict=False)]
        self._kl_control = KLControl(self._rate, *rule, self._world_size)
        self._controlled = wanted
        self._num_controls += 1

    def _optimizers(self) -> list[Optimizer]:
        """Those that an update steps: PPO's, and RND's if there is one."""
        return [self.optimizer, *([self.rnd.optimizer] if self.rnd else [])]

    def _rate_of(self, optimizer: Optimizer, before: DeviceRate | None) -> DeviceRate:
        """``before``: of the optimizer that was in this one's place."""
        if before is None or not before.is_of(optimizer):
            return DeviceRate(optimizer, self.backend, self._captured is not None)
        before.backend = self.backend
        before.prepare()
        return before

    @property
    def _rate(self) -> DeviceRate:
        """Of actor and critic."""
        return self._rates[0]

    def _check_settings(self) -> None:
        """Those that are this class's own."""
        for option, choices in _CHOICES.items():
            if (name := getattr(self, option)) not in choices:
                raise ValueError(f"{option} must be one of {choices}, got {name!r}")
        _check_number("kl_coef", self.kl_coef)
        for name in ("kl_target", "early_stop_kl"):
            if (number := getattr(self, name)) is not None:
                _check_number(name, number, positive=True)
        if self.schedule == "adaptive" and self.desired_kl is not None:
            _check_number("desired_kl", self.desired_kl, positive=self.kl_rule == "proportional")
        if self.kl_target is not None and not self.kl_coef > 0.0:
            raise ValueError(f"kl_target adapts kl_coef, which must then be positive, got {self.kl_coef}")

    def _follow_storage(self) -> bool:
        """Whether it has changed."""
        if not super()._follow_storage():
            return False
        if self._storage_draws:
            kind = type(self.storage).__name__
            logger.warning(
                "The mini-batches are those of %s: it has its own %s.", kind, " and ".join(self._own_methods)
            )
            if self._captured is not None and self._captured.reason is None:
                self._captured.give_up(f"{kind} draws its mini-batches itself")
        return True

    @property
    def _storage_draws(self) -> bool:
        """Whether the storage has its own way to draw the mini-batches that are used."""
        return f"{'recurrent_' if self._recurrent else ''}mini_batch_generator" in self._own_methods

    # --- update
    # -------------------------------------------------------------------------------------------------------------

    def update(self) -> dict[str, float]:
        """Run optimization epochs over stored batches and return mean losses."""
        if self._stock_reason is None:  # the user may have put in another policy; and its law shows once it has acted
            reason = reason_not_fused(self._raw_actor) or law_not_gaussian(self._raw_actor.distribution)
            if reason is not None:
                self._fall_back(reason)
        if self._stock_reason is not None:
            counts = {name: float(count) for name, count in self._final_values.counts().items()}
            return super().update() | counts

        self._check_settings()
        self._follow_settings()
        self._follow_storage()
        if self.max_grad_norm is None:
            raise TypeError("max_grad_norm must be a number, got None; math.inf clips nothing")
        _check_number("max_grad_norm", self.max_grad_norm)
        self._put_inputs_on_device()
        last_rate = None
        try:
            run = self._steps() if self._captured is None else self._captured.run(self._steps, self._key_of_update)
            loss_dict = run.read(self._final_values.counts())
            self.kl_coef = loss_dict.get("kl_coef", self.kl_coef)
            last_rate = loss_dict.pop("learning_rate", None)  # rsl_rl's logger has it from the algorithm
        finally:  # whatever happens, a checkpoint finds numbers
            for rate in self._rates:
                rate.end_steps()
            if self._kl_control.adaptive:
                self.learning_rate = self._rate.finish(last_rate)
        self._raise_if_lost(loss_dict, len(run.metrics))
        self._iteration += 1

        if NORMALIZES_IN_UPDATE:
            models = [self._raw_actor, self._raw_critic, *([self.rnd] if self.rnd else [])]
            with statistics_in_place(models, finite_only=self.nonfinite != "ignore"):
                obs = self.storage.observations.flatten(0, 1)
                self.actor.update_normalization(obs)
                self.critic.update_normalization(obs)
                if self.rnd:
                    self.rnd.update_normalization(obs)
        self.storage.clear()
        return loss_dict

    def _put_inputs_on_device(self) -> None:
        """What changes from one update to the next, and is not in the storage: in memory that stays."""
        if self._kl_control.adaptive:
            from_first_rank(self._rate.start(self.learning_rate), self._world_size)
        if self._kl_control.penalty is not None:  # filled in, not copied: a copy to a GPU would wait
            if self._penalty_coef is None:
                self._penalty_coef = torch.empty((), dtype=torch.float64, device=self.device)
            from_first_rank(self._penalty_coef.fill_(self.kl_coef), self._world_size)
        rows_each = self._rows_of_a_mini_batch()
        if not self._recurrent and not self._storage_draws:
            epochs = self.num_learning_epochs if self.reshuffle else 1
            num_rows = rows_each * self.num_mini_batches
            # the same draw as in PPO
            rows = torch.stack([torch.randperm(num_rows, device=self.storage.device) for _ in range(epochs)])
            if self._rows is None or self._rows.shape != rows.shape:
                self._rows = rows
            else:
                self._rows.copy_(rows)

    def _rows_of_a_mini_batch(self) -> int:
        """As PPO cuts the rollout: by environments for recurrent models; what is left over is not used."""
        for name in ("num_learning_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 for an update, got {getattr(self, name)}")
        envs, steps, count = self.storage.num_envs, self.storage.num_transitions_per_env, self.num_mini_batches
        rows = envs // count * steps if self._recurrent else envs * steps // count
        if rows == 0:
            units = "environments, by which recurrent models are cut" if self._recurrent else "rows"
            raise ValueError(
                f"num_mini_batches is {count}, more than the rollout has {units}: {envs} environments x {steps} steps"
            )
        ranks = self._world_size if self.global_advantage_statistics else 1
        if rows * ranks == 1 and self.normalize_advantage_per_mini_batch:
            raise ValueError(
                "normalize_advantage_per_mini_batch needs two rows or more in a mini-batch, got one: "
                f"{envs} environments x {steps} steps in {count} mini-batches"
            )
        if envs * steps * ranks == 1:
            raise ValueError(
                "advantages are normalised over the rollout, which needs two rows or more, got one: 1 environment x 1 "
                "step; take more environments or a larger num_steps_per_env"
            )
        return rows

    def _steps(self) -> Run:
        """All steps of an update. Nothing in it waits for the device; what it reads lies where it lay before."""
        adapted = self._penalty_coef if self._kl_control.penalty is not None else None
        run = Run(self.kl_coef if adapted is None else adapted)
        detach_last_forward(self._raw_actor.distribution)  # of the user's, and of the last step
        self._kl_control.begin()
        kernels = backends.select(self.backend, torch.device(self.device))
        whole = self._whole_mini_batches()  # asked before the models have other ways than their own
        plain = self._plain_networks(kernels)
        compiled = self.actor is not self._raw_actor
        models = () if compiled or plain is not None else (self._raw_actor, self._raw_critic)
        with observations_in_place(*models), fused_hidden_layers(kernels, *models):
            for pieces in self._mini_batches(whole):
                self._step(pieces, run, plain)
                del pieces  # before the next is gathered
        self._kl_control.after_last_step(run, self.num_mini_batches)
        detach_last_forward(self._raw_actor.distribution)
        return run

    def _reason_update_not_captured(self) -> str | None:
        """Why the update cannot be a CUDA graph where the rollout can."""
        if self.keep_random_stream:
            return "keep_random_stream draws random numbers within it"
        if not self._rate.on_device:
            return f"{self._rate.optimizer_name} reads its learning rate on the host"
        if not self._rate.can_skip and self.nonfinite != "ignore":
            return f"{self._rate.optimizer_name} has to be asked on the host whether it skips a step"
        return None

    def _key_of_update(self) -> tuple:
        """What a graph of ``_steps`` freezes: addresses, shapes, settings, and numbers on the host."""
        st = self.storage
        modules = [self.actor, self.critic]
        if self.rnd:  # not its normalizer of rewards, which moves during a rollout and is not used here
            modules += [self.rnd.predictor, self.rnd.target, self.rnd.state_normalizer]
        optimizers = self._optimizers()
        tensors = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
        tensors += [st.actions, st.values, st.returns, st.advantages, st.actions_log_prob, *st.distribution_params]
        tensors += [*st.observations.values(), self._rows]
        numbers = (
            *(options(o, rate=o is not self.optimizer or not self._kl_control.adaptive) for o in optimizers),
            *(self.clip_param, self.value_loss_coef, self.entropy_coef, self.max_grad_norm, self.desired_kl),
            *(self.use_clipped_value_loss, self.num_learning_epochs, self.num_mini_batches, self._num_controls),
            *(self.kl_coef if self._kl_control.penalty is None else None, self.normalize_advantage_per_mini_batch),
            *(self.nonfinite, self.kl_direction, self.global_advantage_statistics),
            *(self.symmetry and frozen(vars(self.symmetry)), getattr(self, "use_mixed_precision", False)),
        )
        return addresses(modules, tensors), settings(modules), numbers, matmul_precision()

    def _raise_if_lost(self, loss_dict: dict[str, float], steps: int) -> None:
        """If none of the steps could be taken, or one could not and that is an error; and where the policy is lost."""
        if self.nonfinite == "ignore" and math.isnan(loss_dict["entropy"]):
            self.storage.clear()
            raise NonFiniteError(
                f"iteration {self._iteration}: the std of the policy is not finite, so that no action can be drawn; "
                "nonfinite='skip' keeps steps that would make it so out of the networks"
            )
        counts = {name: loss_dict.get(name, 0.0) for name in ("nonfinite_steps", "nonfinite_rnd_steps")}
        of, count = max(counts.items(), key=lambda item: item[1])
        if count == 0.0 or (self.nonfinite == "skip" and count < steps):
            return
        models = [self._raw_actor, self._raw_critic, *([self.rnd] if self.rnd else [])]
        reason = first_nonfinite(
            self.storage,
            models,
            intrinsic_groups=self.rnd.obs_groups["rnd_state"] if self.rnd else (),
            normalized=not self.normalize_advantage_per_mini_batch,
            num_ranks=self._world_size,
        )
        self.storage.clear()
        raise NonFiniteError(
            f"iteration {self._iteration}: {round(count)} of {steps} steps{' of RND' if 'rnd' in of else ''} had "
            f"gradients that are not finite and were not taken: {reason}. The last finite step's networks are kept."
        )

    def _mini_batches(self, whole: bool) -> Iterator[list[RolloutStorage.Batch]]:
        """The mini-batches of all epochs, each in pieces: the same in each epoch, as in PPO, unless drawn anew."""
        st, count, epochs = self.storage, self.num_mini_batches, self.num_learning_epochs
        if self._storage_draws:
            generate = st.recurrent_mini_batch_generator if self._recurrent else st.mini_batch_generator
            yield from ([self._normalized(batch)] for batch in generate(count, epochs))
            return
        if self._recurrent:
            batches = [[self._normalized(batch)] for batch in st.recurrent_mini_batch_generator(count, 1)]
            for _ in range(epochs):
                yield from batches
            return
        at_once = fits_at_once(st.observations.values())
        for epoch in range(epochs):
            if epoch == 0 or self.reshuffle:
                kept = None  # those of the last epoch need not be there beside the new ones
                drawn = self._rows[epoch].chunk(count)
                if at_once:
                    kept = [self._pieces(self._gathered(rows), whole) for rows in drawn]
            yield from kept or (self._pieces(self._gathered(rows), whole) for rows in drawn)

    def _gathered(self, rows: Tensor) -> RolloutStorage.Batch:
        return self._normalized(gathered(self.storage, rows))

    def _normalized(self, batch: RolloutStorage.Batch) -> RolloutStorage.Batch:
        if self.normalize_advantage_per_mini_batch:
            ranks = self._world_size if self.global_advantage_statistics else 1
            batch.advantages = standardized_over_ranks(batch.advantages, ranks)
        return batch

    def _plain_networks(self, kernels: ModuleType) -> PlainNetworks | None:
        """Actor and critic, if nothing but their two passes is asked of them and those are the usual ones."""
        if self.symmetry or self.rnd or self._two_streams or getattr(self, "use_mixed_precision", False):
            return None
        if self._storage_draws or self.actor is not self._raw_actor or self.critic is not self._raw_critic:
            return None  # mini-batches of the user's own; compiled models
        return PlainNetworks.for_update(kernels, self._raw_actor, self._raw_critic, self.storage.observations)

    def _step(self, pieces: list[RolloutStorage.Batch], run: Run, plain: PlainNetworks | None) -> None:
        """One step of the optimizer, with a mini-batch in pieces."""
        self.optimizer.zero_grad()
        if self.rnd:
            self.rnd.optimizer.zero_grad()
        num_rows = sum(piece.observations.batch_size[0] for piece in pieces)
        rows = []
        for piece in pieces:
            share = piece.observations.batch_size[0] / num_rows
            names, row = self._backward(piece, share, run.kl_coef, plain)
            rows.append(row if share == 1.0 else row * share)
        run.add(names, rows[0] if len(rows) == 1 else torch.stack(rows).sum(0))
        self._kl_control.before_step(run)
        if self._kl_control.adaptive:
            # hooks of the optimizer may read it; a number again in the end
            self.learning_rate = self._rate.value  # type: ignore[assignment]
        self._apply(run)

    def _whole_mini_batches(self) -> bool:
        """Whether cutting them would change something, or gain nothing."""
        if self.symmetry or self.rnd or self.actor is not self._raw_actor:
            return True
        if self.keep_random_stream or torch.device(self.device).type != "cpu":  # torch draws other numbers for parts
            return True
        return not works_row_by_row([self._raw_actor, self._raw_critic])

    def _pieces(self, batch: RolloutStorage.Batch, whole: bool) -> list[RolloutStorage.Batch]:
        """The mini-batch, on the CPU in parts whose activations stay in the caches; their gradients add up."""
        num_rows = batch.observations.batch_size[0]
        if whole or num_rows < 2 * self._piece_rows:
            return [batch]
        return [rows_of(batch, slice(i, i + self._piece_rows)) for i in range(0, num_rows, self._piece_rows)]

    def _backward(
        self, batch: RolloutStorage.Batch, share: float, kl_coef: float | Tensor, plain: PlainNetworks | None
    ) -> tuple[list[str], Tensor]:
        """Forward and backward of a mini-batch, or of a piece of one that has this share of its rows.

        Gradients are added to those that there are. Returns a row of metrics for ``Run.add``, with their names.
        """
        original_batch_size = batch.observations.batch_size[0]
        augmented = self.symmetry is not None and self.symmetry.use_data_augmentation
        if self.symmetry:
            batch = copy.copy(batch)  # symmetry puts other tensors into the batch that it is given
            if augmented:  # and the user's function may write into the tensors
                batch.observations, batch.actions = batch.observations.clone(), batch.actions.clone()
            self.symmetry.augment_batch(batch, original_batch_size)

        rnd_loss = symmetry_loss = None
        if plain is not None:
            mean, std, values = plain.forward(batch.observations, sample=self.keep_random_stream)
        else:
            with self._autocast():
                drawing = nullcontext() if self.keep_random_stream else Instead(self._raw_actor, sample=mean_of)()
                with drawing, self._critic_beside_actor():
                    self.actor(
                        batch.observations,
                        masks=batch.masks,
                        hidden_state=batch.hidden_states[0],
                        stochastic_output=True,
                    )
                    values = self.critic(batch.observations, masks=batch.masks, hidden_state=batch.hidden_states[1])
                mean, std = self.actor.output_distribution_params
                if self.rnd:
                    rnd_loss = self.rnd.compute_loss(batch.observations[:original_batch_size])
                if self.symmetry:
                    if not augmented:  # so it may here; backward needs what the networks have read
                        batch.observations = batch.observations.clone()
                    symmetry_loss = self.symmetry.compute_loss(self.actor, batch, original_batch_size)
            std = row_behind(std)

        old_mean, old_std = batch.old_distribution_params
        if is_shared_row(old_std):
            old_std = first_row(old_std)
        num_original = original_batch_size if augmented else None
        out, loss_grads = ppo_loss_and_grad(
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
            kl_coef=kl_coef,
            kl_direction=self.kl_direction,
            num_original=num_original,
            backend=self.backend,
        )

        outputs, grads = [mean, std, values], list(loss_grads)
        if share < 1.0:  # one that is expanded over the rows cannot be written to
            grads = [grad.mul_(share) if grad.is_contiguous() else grad * share for grad in grads]
        if symmetry_loss is not None and self.symmetry.use_mirror_loss:
            mirror_loss = self.symmetry.mirror_loss_coeff * symmetry_loss
            outputs.append(mirror_loss)
            grads.append(torch.ones_like(mirror_loss))
        if plain is not None:
            plain.backward(*grads)
        else:
            learned = [i for i, output in enumerate(outputs) if output.requires_grad]
            torch.autograd.backward([outputs[i] for i in learned], [grads[i] for i in learned])
        if rnd_loss is not None:
            rnd_loss.backward()

        new_std = std.detach() if std.dim() == 1 else std[:num_original].detach()
        rule_kl = self._rule_kl((old_mean, old_std, mean[:num_original].detach(), new_std))
        more = {"rnd": rnd_loss, "symmetry": symmetry_loss, RULE_KL: rule_kl}
        there = {name: x.detach().to(out.stacked.dtype) for name, x in more.items() if x is not None}
        names = [*METRICS, *there]
        return names, torch.cat([out.stacked, torch.stack([*there.values()])]) if there else out.stacked

    def _rule_kl(self, policies: tuple[Tensor, ...]) -> Tensor | None:
        """The KL for the rule of the learning rate, where that is not the loss's. ``policies``: means and stds, old and
        new."""
        if self._kl_control.kl_before_5:
            return RslRlScheduleBefore5.kl(*policies).mean()
        if self._kl_control.adaptive and self.kl_direction == "new_old":
            return gaussian_kl(*policies, backend=self.backend).mean()
        return None

    def _apply(self, run: Run) -> None:
        """One step, with the gradients that there are."""
        if self.is_multi_gpu:
            self.reduce_parameters()
        keeps_finite = self.nonfinite != "ignore"
        models = (self.actor, self.critic)
        lost = self._rate.step(models, float(self.max_grad_norm), skip=run.stopped, skip_nonfinite=keeps_finite)
        if lost is not None:
            run.lost.append(lost)
        if self.rnd:
            lost = self._rates[1].step((self.rnd.predictor,), math.inf, skip=None, skip_nonfinite=keeps_finite)
            if lost is not None:
                run.lost_of_rnd.append(lost)

    def _autocast(self):
        # rsl_rl has mixed precision since 5.5
        enabled = getattr(self, "use_mixed_precision", False)
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=enabled)

    # --- checkpoints
    # -----------------------------------------------------------------------------------------------------------

    def save(self) -> dict:
        """Return a dict of all models for saving; PPO loads it, too."""
        saved_dict = super().save()
        if self._stock_reason is None:
            self._follow_settings()
            saved_dict["optimizer_state_dict"] = self._rate.state_dict()
            if self.rnd:
                saved_dict["rnd_optimizer_state_dict"] = self._rates[1].state_dict()
            if self._kl_control.penalty is not None:
                saved_dict[_CHECKPOINT_KEY] = {"kl_coef": self.kl_coef}
        return saved_dict

    def load(self, loaded_dict: dict, load_cfg: dict | None, strict: bool) -> bool:
        """Load specified models from a saved dict, of this class or of PPO."""
        iteration = super().load(loaded_dict, load_cfg, strict)
        if load_cfg is None or load_cfg.get("optimizer"):  # rsl_rl itself does so since 5.4.2
            self.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.learning_rate = float(self.learning_rate)
        if iteration:
            self._iteration = loaded_dict.get("iter", 0)
        if self._stock_reason is None:
            self._follow_settings()
            for rate in self._rates:
                rate.prepare()
            if self._kl_control.penalty is not None and (load_cfg is None or load_cfg.get("optimizer")):
                self.kl_coef = loaded_dict.get(_CHECKPOINT_KEY, {}).get("kl_coef", self.kl_coef)
        return iteration


def _check_number(name: str, value: Any, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):  # YAML's 1e-2 is a string
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.is_cuda:  # nobody waits for it
        return
    if positive and not value > 0.0:  # type: ignore[operator]
        raise ValueError(f"{name} must be positive, got {value}")
    if not value >= 0.0:  # type: ignore[operator]
        raise ValueError(f"{name} must be 0 or more, got {value}")
