"""The half of FusedPPO that collects: acting, what is stored, and the returns, without waiting for the device."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from rsl_rl.algorithms import PPO
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict
from torch import Tensor

from pyfast_ppo import backends
from pyfast_ppo.ops.gae import gae
from pyfast_ppo.precision import matmul_precision
from pyfast_ppo.reference import arithmetic_dtype
from pyfast_ppo.rsl_rl.bootstrap import FinalValues
from pyfast_ppo.rsl_rl.captured import Captured, addresses, settings
from pyfast_ppo.rsl_rl.mini_batches import has_running_statistics, own_methods
from pyfast_ppo.rsl_rl.plain_networks import PlainNetworks
from pyfast_ppo.rsl_rl.policy import (
    NORMALIZES_IN_UPDATE,
    Instead,
    comes_from,
    keep_all_stds,
    keeps_row,
    log_prob_at_once,
    normalizes,
    sample_without_waiting,
    store_std_once,
)
from pyfast_ppo.rsl_rl.ranks import standardized_over_ranks
from pyfast_ppo.rsl_rl.step_memory import RolloutMemory, StepMemory
from pyfast_ppo.rsl_rl.streams import beside

logger = logging.getLogger(__name__)


class FusedRollout(PPO):
    """PPO with a rollout of its own; its update is PPO's. For what the arguments mean see ``FusedPPO``."""

    # The critic's kernels run beside the actor's in a CUDA graph. Off until it is measured where that pays.
    _two_streams = False

    def __init__(
        self,
        *args,
        backend: str | None,
        time_out_bootstrap: str,
        global_advantage_statistics: bool,
        **kwargs,
    ) -> None:
        """All other arguments are those of PPO."""
        super().__init__(*args, **kwargs)
        self.backend = backend
        self.time_out_bootstrap = time_out_bootstrap
        self.global_advantage_statistics = global_advantage_statistics
        self._world_size = self.gpu_world_size if self.is_multi_gpu else 1
        self._final_values = self._new_final_values()
        self._warned: set[str] = set()
        self._computed_returns = False  # since the rollout began, by this class
        self._uses_final_values = True
        self._own_methods: list[str] = []  # of the storage
        self._is_gaussian = False
        self._captured_rollout: Captured[None] | None = None
        self._networks_key: tuple = ()  # of the rollout that has begun; none once it has its returns
        self._rollout_key: tuple = ()
        self._memory: RolloutMemory | None = None
        self._plain: PlainNetworks | None = None  # what the rollout acts by, if nothing is unusual
        self._stored: StepMemory | None = None  # where the storage has the transition already, but for its outcome
        self._last_obs: Any = None  # the memory of what the rollout ended with, for a graph

    def _fuse_rollout(self, cuda_graph: bool) -> str | None:
        """What can be done for a diagonal Gaussian policy only. Returns why it cannot be a CUDA graph, if it cannot."""
        self._is_gaussian = True
        if not cuda_graph:
            return None
        reason = self._reason_rollout_not_captured()
        if reason is None:
            self._captured_rollout = Captured[None]("The rollout", self.device)
        return reason

    def _new_final_values(self) -> FinalValues:
        critic = self._raw_critic
        # a model of the user's own need not tell what it reads, nor whether it normalizes
        groups = getattr(critic, "obs_groups", self.storage.observations.keys())
        return FinalValues(
            critic,
            [*groups, *getattr(critic, "obs_groups_2d", [])],
            self.storage,
            same_later=not critic.is_recurrent
            and not has_running_statistics(critic)
            and (NORMALIZES_IN_UPDATE or not normalizes(critic)),
        )

    def act(self, obs: TensorDict) -> Tensor:
        """Sample actions and store transition data.

        What is stored is in ``transition``, mostly as views of the storage's memory: other tensors that are put there
        before ``process_env_step`` are stored instead, while what is written into the actions that this returns is not.
        """
        st = self.storage
        if st.step >= st.num_transitions_per_env or obs.batch_size != st.observations.batch_size[1:]:
            return self._act(obs)  # of other environments, as for an evaluation
        if st.step == 0:
            self._follow_rollout()
        captured = self._captured_rollout
        usual = self._is_gaussian and not self._recurrent and not self._own_methods
        if st.distribution_params is None or not (usual or captured is not None):  # the first rollout makes them
            kept = st.observations[st.step]
            kept.copy_(obs)  # now: an environment may write into its observations while it steps
            actions = self._act(obs)
            self.transition.observations = kept
            return actions.clone()  # and into these
        memory = self._memory_of_step()
        memory.observations.copy_(obs)
        if captured is None:
            self._act_into(memory, obs)
            actions = self.transition.actions
        else:
            captured.run(lambda: self._act_into(memory, memory.observations), lambda: self._rollout_key, slot=st.step)
            actions = memory.actions.clone()
        self._put_into_transition(self._memory_of_step())  # acting may have made more room for the stds
        return actions

    def _act(self, obs: TensorDict) -> Tensor:
        if (plain := self._plain_now()) is None or obs.batch_dims != 1:
            with self._acting(), self._critic_beside_actor():
                return super().act(obs)
        acted = plain.act(obs)
        self.transition.hidden_states = (None, None)
        self.transition.observations = obs
        self.transition.actions, self.transition.values = acted.actions, acted.values
        self.transition.actions_log_prob = acted.log_prob
        self.transition.distribution_params = (acted.mean, acted.std)
        return acted.actions

    def _act_into(self, memory: StepMemory, obs: TensorDict) -> None:
        """Acts, and stores what that gives at the present step of the storage."""
        self._act(obs)
        st, acted = self.storage, self.transition
        memory.actions.copy_(acted.actions)
        memory.values.copy_(acted.values)
        memory.log_prob.copy_(acted.actions_log_prob.view(-1))
        mean, std = acted.distribution_params
        memory.params[0].copy_(mean)
        if not keeps_row(st, std):
            st.distribution_params[1][st.step].copy_(std)

    def _put_into_transition(self, memory: StepMemory) -> None:
        """What the storage has already."""
        self.transition.hidden_states = (None, None)
        self.transition.observations = memory.observations
        self.transition.actions, self.transition.values = memory.actions, memory.values
        self.transition.actions_log_prob, self.transition.distribution_params = memory.log_prob, memory.params
        self._stored = memory

    def _follow_rollout(self) -> None:
        """Before its first step: what may have changed since the last one."""
        self._follow_storage()
        self._plain = self._plain_networks_of_rollout()
        if self._captured_rollout is not None:
            self._networks_key = self._key_of_networks()
            self._rollout_key = self._key_of_rollout()

    def _memory_of_step(self) -> StepMemory:
        if self._memory is None or not self._memory.is_of(self.storage):
            self._memory = RolloutMemory(self.storage)
        return self._memory.steps[self.storage.step]

    def _plain_networks_of_rollout(self) -> PlainNetworks | None:
        """Actor and critic, if those are the usual ones."""
        compiled = self.actor is not self._raw_actor or self.critic is not self._raw_critic
        if compiled or self._two_streams or not self._is_gaussian:
            return None
        if super().act.__func__ is not PPO.act or not comes_from("rsl_rl", PPO.act):  # a mixin's, or replaced for all
            return None
        kernels = backends.select(self.backend, torch.device(self.device))
        return PlainNetworks.for_rollout(kernels, self.actor, self.critic, self.storage.observations)

    def _plain_now(self) -> PlainNetworks | None:
        plain = self._plain
        return plain if plain is not None and plain.serve(self.actor, self.critic) else None

    def _acting(self) -> AbstractContextManager[None]:
        compiled = self.actor is not self._raw_actor  # then the compiler makes of the sampling what it can
        if compiled or not self._is_gaussian:
            return nullcontext()
        log_prob = partial(log_prob_at_once, backend=self.backend)
        return Instead(self._raw_actor, sample=sample_without_waiting, log_prob=log_prob)()

    def _critic_beside_actor(self) -> AbstractContextManager[None]:
        if not self._two_streams or self.critic is not self._raw_critic:
            return nullcontext()
        # what the actor makes of shared parameters, as autocast's copies, the critic would have to wait for
        shared = set(self._raw_actor.parameters()) & set(self._raw_critic.parameters())
        return nullcontext() if shared else beside(self._raw_critic)

    def process_env_step(self, obs: TensorDict, rewards: Tensor, dones: Tensor, extras: dict[str, Any]) -> None:
        """Record one environment step."""
        if self.storage.step == 0:
            self._begin_rollout()
        tells_more = "terminated" in extras or extras.get("final_obs") is not None
        if self.time_out_bootstrap == "final_obs" and "time_outs" in extras and tells_more:
            extras = dict(extras)
            time_outs = extras["time_outs"].bool()  # costs nothing where they are boolean already
            if "terminated" in extras and self._names_environments(extras["terminated"]):
                time_outs = time_outs & ~extras["terminated"].to(time_outs.device).bool().reshape_as(time_outs)
            if self._takes_final_obs(extras.get("final_obs"), time_outs):
                del extras["time_outs"]
            else:  # PPO adds γ V(s_t) to the reward
                extras["time_outs"] = time_outs
        put_in = "add_transition" in vars(self.storage)  # by a user, since the rollout began
        if not self._is_gaussian or self._own_methods or put_in:
            if put_in:
                keep_all_stds(self.storage)
            super().process_env_step(obs, rewards, dones, extras)
            return
        self.storage.add_transition = self._add_transition  # hides the method of the class
        try:
            super().process_env_step(obs, rewards, dones, extras)
        finally:
            del self.storage.add_transition

    def _add_transition(self, transition: RolloutStorage.Transition) -> None:
        """``RolloutStorage.add_transition``, which leaves out what the storage has already."""
        st = self.storage
        stored, self._stored = self._stored, None
        if stored is not None:
            in_time = st.step < st.num_transitions_per_env and self._memory_of_step() is stored
            if in_time and stored.is_in(transition):
                stored.rewards.copy_(transition.rewards.view(-1, 1))
                stored.dones.copy_(transition.dones.view(-1, 1))
                st.step += 1
                return
            self._memory = None  # a user may have put something into the observations that it has
        store_std_once(st, transition)
        type(st).add_transition(st, transition)

    def _begin_rollout(self) -> None:
        if not self._final_values.fits(self._raw_critic, self.storage):  # the user has put in others
            self._final_values = self._new_final_values()
        self._final_values.begin()
        self._follow_storage()
        if self._own_methods:
            keep_all_stds(self.storage)
        own = type(self).compute_returns is FusedRollout.compute_returns and "compute_returns" not in vars(self)
        # one of the user's own need not come to ours, which alone knows of final values
        self._uses_final_values = own or self._computed_returns
        self._computed_returns = False

    def _names_environments(self, terminated: Any) -> bool:
        """Whether it has one entry for each; the key is nobody's in rsl_rl, and users log under it, too."""
        if isinstance(terminated, Tensor) and terminated.numel() == self.storage.num_envs and terminated.dim() > 0:
            return True
        form = f"a {type(terminated).__name__}"
        if isinstance(terminated, Tensor):
            form += f" of shape {tuple(terminated.shape)}"
        self._warn_once(
            f"extras['terminated'] is ignored: it is {form}, not a tensor with an entry for each of the "
            f"{self.storage.num_envs} environments. Time-outs bootstrap, whether the episode terminated in the same "
            "step or not."
        )
        return False

    def _takes_final_obs(self, final_obs: Any, time_outs: Tensor) -> bool:
        """Whether time-outs bootstrap from these; a user's environment may mean something else by that key, too."""
        if final_obs is None or self.storage.step >= self.storage.num_transitions_per_env:
            return False
        if not self._uses_final_values:
            self._warn_once(
                f"extras['final_obs'] is left out while {type(self).__name__} has a compute_returns of its own that "
                "has not called FusedPPO's: time-outs bootstrap from V(s_t), as in PPO."
            )
            return False
        try:
            groups = self._final_values.groups(final_obs)
        except (TypeError, KeyError, ValueError) as error:
            self._warn_once(f"{error.args[0]}. It is ignored: time-outs bootstrap from V(s_t), as in PPO.")
            return False
        self._final_values.record(self.storage.step, groups, time_outs)
        return True

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def compute_returns(self, obs: TensorDict) -> None:
        """Compute return and advantage targets from stored transitions."""
        self._computed_returns = True
        if self._captured_rollout is None:
            self._returns(obs)
        else:
            if self._last_obs is None or self._last_obs.batch_size != obs.batch_size:
                with torch.inference_mode(False):  # written to in and outside of inference mode
                    self._last_obs = torch.zeros_like(obs)
            self._last_obs.copy_(obs)
            slot = "returns with final values" if self._final_values.any_recorded else "returns"
            self._captured_rollout.run(lambda: self._returns(self._last_obs), self._key_of_rollout, slot=slot)
            self._networks_key = ()
        self._final_values.clear()

    def _returns(self, obs: TensorDict) -> None:
        st = self.storage
        # Values of the last step; the forward pass must not move a recurrent critic on
        if (plain := self._plain_now()) is not None:
            last_values = plain.values(obs)
        else:
            hidden_state = self.critic.get_hidden_state()
            last_values = self.critic(obs).detach()
            self.critic.reset(hidden_state=hidden_state)
        time_outs, final_values = self._final_values.collect(st.values)
        normalize = not self.normalize_advantage_per_mini_batch
        over_ranks = self.global_advantage_statistics and self._world_size > 1
        dtype = arithmetic_dtype(st.rewards, st.values, last_values)
        in_place = all(t.is_contiguous() and t.dtype == dtype for t in (st.advantages, st.returns))
        advantages, returns = gae(
            st.rewards,
            st.values,
            st.dones,
            last_values,
            self.gamma,
            self.lam,
            time_outs=time_outs,
            final_values=final_values,
            normalize=normalize and not over_ranks,
            out=(st.advantages, st.returns) if in_place else None,
            backend=self.backend,
        )
        if not in_place:  # a storage or a critic of the user's own
            st.advantages.copy_(advantages)
            st.returns.copy_(returns)
        if normalize and over_ranks:
            st.advantages.copy_(standardized_over_ranks(st.advantages, self._world_size))

    def _reason_rollout_not_captured(self) -> str | None:
        """Why acting and returns cannot be CUDA graphs, as far as it can be told before it is tried."""
        if torch.device(self.device).type != "cuda":
            return f"the device is {self.device}"
        if self._recurrent:
            return "recurrent models have states, and mini-batches of changing shapes"
        normalized = normalizes(self._raw_actor) or normalizes(self._raw_critic)
        if normalized and not NORMALIZES_IN_UPDATE:
            return "rsl_rl before 5.5 moves its normalizers to other memory in each rollout"
        return None

    def _key_of_rollout(self) -> tuple:
        """What graphs of acting and of the returns freeze."""
        st = self.storage
        tensors = [st.actions, st.values, st.returns, st.advantages, st.actions_log_prob, st.rewards, st.dones]
        tensors += [*st.observations.values(), *(st.distribution_params or ()), *self._final_values.memory()]
        numbers = (
            *(self.gamma, self.lam, self.normalize_advantage_per_mini_batch, self.global_advantage_statistics),
            self.backend,
        )
        return self._networks_key or self._key_of_networks(), addresses((), tensors), numbers, matmul_precision()

    def _key_of_networks(self) -> tuple:
        """Their part of it, which takes the host longer than all of the returns."""
        modules = [self.actor, self.critic]
        return addresses(modules, ()), settings(modules)

    def _follow_storage(self) -> bool:
        """Notices what a user's storage does in its own way. Returns whether that has changed."""
        own = own_methods(self.storage)
        changed = own != self._own_methods
        self._own_methods = own
        return changed

    @property
    def _recurrent(self) -> bool:
        return self.actor.is_recurrent or self.critic.is_recurrent
