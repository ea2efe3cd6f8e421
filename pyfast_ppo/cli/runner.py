"""rsl_rl's runner with quiet output, whole checkpoints, and loading that runs no code."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner

from pyfast_ppo.cli.errors import UserError
from pyfast_ppo.files import write_atomically
from pyfast_ppo.rsl_rl import NonFiniteError
from pyfast_ppo.rsl_rl.export import export_policy_to_jit
from pyfast_ppo.vec_env import clip

_KEYS = ("actor_state_dict", "critic_state_dict", "optimizer_state_dict", "iter")
_STEP_COUNTER = "common_step_counter"
"""Attribute of Isaac Lab's and mjlab's environments: the steps so far, by which their curricula go."""


class TrainRunner(OnPolicyRunner):
    """``OnPolicyRunner`` for the command line. rsl_rl's prints are swallowed; its TensorBoard logs are kept."""

    def __init__(self, env: VecEnv, config: dict, run_dir: Path, device: str) -> None:
        """Build algorithm and logger.

        Args:
            env: The environments.
            config: Configuration of ``OnPolicyRunner``; it is not changed.
            run_dir: Where checkpoints and logs go.
            device: Where actor and critic live.
        """
        with _swallow_prints():
            super().__init__(env, copy.deepcopy(config), str(run_dir), device)
        self._stock_log = self.logger.log
        self.logger.log = self._log
        self.whole_iterations = 0  # of the run; rsl_rl's own count is one ahead between a resume and the next iteration

    @property
    def mean_reward(self) -> float | None:
        """Mean over the last 100 episodes; None before one has ended."""
        return _mean(self.logger.rewbuffer)

    @property
    def mean_episode_length(self) -> float | None:
        """Mean over the last 100 episodes; None before one has ended."""
        return _mean(self.logger.lenbuffer)

    def learn_until(
        self, iterations: int, on_iteration: Callable[..., None], random_first_lengths: bool = False
    ) -> None:
        """Train until the run has had so many iterations; checkpoints every ``save_interval`` and at the end.

        Args:
            iterations: Iterations of the whole run, counting those before a resume.
            random_first_lengths: Environments begin at random times within an episode, so that they do not all end
                together.
            on_iteration: Called after each iteration with the keyword arguments of ``Logger.log``. May raise.

        Raises:
            NonFiniteError: The environment has returned NaN, or an update met numbers that are not finite.
        """
        self._on_iteration = on_iteration
        with _swallow_prints(), _quiet_log_writer():
            done = self.current_learning_iteration
            try:
                self.learn(iterations - done, init_at_random_ep_len=random_first_lengths)
            except ValueError as error:
                if "NaN values" in str(error):  # rsl_rl's check of what the environment returns
                    raise NonFiniteError(str(error)) from error
                raise

    def save(self, path: str, infos: dict | None = None) -> None:
        """Save a checkpoint that stock rsl_rl can load, too; the file is there as a whole or not at all."""
        checkpoint = self.alg.save()
        checkpoint["iter"] = self.current_learning_iteration
        checkpoint["infos"] = {
            "env_steps": self.logger.tot_timesteps,
            "seconds": self.logger.tot_time,
            "recent_rewards": list(self.logger.rewbuffer),
            "recent_lengths": list(self.logger.lenbuffer),
            **(infos or {}),
        }
        if hasattr(self.env.unwrapped, _STEP_COUNTER):
            # in mjlab's form: its own runner goes on from here, too
            checkpoint["infos"]["env_state"] = {_STEP_COUNTER: getattr(self.env.unwrapped, _STEP_COUNTER)}
        # Through memory: a full disk is then an OSError with a reason; torch's own writer hides it
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())
        self.logger.save_model(path, self.current_learning_iteration)

    def restore(self, path: Path) -> None:
        """Load a checkpoint so that ``learn_until`` goes on with the iteration after it.

        Raises:
            UserError: The file is damaged, holds code, or was made for another task.
        """
        checkpoint = _read_checkpoint(path, self.device)
        try:
            self.alg.load(checkpoint, None, True)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} does not fit the networks of this task; it was made with other settings or another version."
            ) from error
        self.current_learning_iteration = self.whole_iterations = checkpoint["iter"] + 1
        infos = checkpoint.get("infos") or {}
        self.logger.tot_timesteps = infos.get("env_steps", 0)
        self.logger.tot_time = infos.get("seconds", 0)
        self.logger.rewbuffer.extend(infos.get("recent_rewards", ()))
        self.logger.lenbuffer.extend(infos.get("recent_lengths", ()))
        env_state = infos.get("env_state", {})
        if _STEP_COUNTER in env_state and hasattr(self.env.unwrapped, _STEP_COUNTER):
            setattr(self.env.unwrapped, _STEP_COUNTER, env_state[_STEP_COUNTER])

    def export_policy(self, path: Path) -> None:
        """Export the deterministic policy as TorchScript and see that the file gives the policy's actions.

        The file takes what rsl_rl's exports take: the observation groups side by side, ``[E, d]``, and for a CNN a
        list of the images besides; of a recurrent policy the observations of one robot, ``[1, d]``, whose state it
        keeps. It returns actions, ``[E, A]``; clipped, if the environment's wrapper clips them. The policy is on the
        CPU afterwards.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            export_policy_to_jit(self, temporary.parent, temporary.name)
            policy = self.get_inference_policy("cpu")  # as the file: a GPU may multiply in TF32
            obs = self.env.get_observations().to("cpu")
            if policy.is_recurrent:
                policy.reset()
                obs = obs[:1]
            flat = [obs[group] for group in policy.obs_groups] or [torch.zeros(len(obs), 0)]
            images = [obs[group] for group in getattr(policy, "obs_groups_2d", ())]
            inputs = (torch.cat(flat, dim=-1), *([images] if images else ()))
            with torch.inference_mode():
                expected = policy(obs)
                if getattr(self.env, "action_bounds", None) is not None:
                    low, high = self.env.action_bounds
                    expected = clip(expected, (low.cpu(), high.cpu()))
                torch.testing.assert_close(torch.jit.load(str(temporary))(*inputs), expected)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def close_logs(self) -> None:
        """Write out what TensorBoard still holds back. On a full disk that fails, as something has failed before."""
        if self.logger.writer is not None:
            with contextlib.suppress(OSError), _quiet_log_writer():
                self.logger.writer.close()

    def _log(self, **values: Any) -> None:
        self.whole_iterations = values["it"] + 1
        self._stock_log(**values)
        self._on_iteration(**values)


def _read_checkpoint(path: Path, device: str) -> dict:
    """Read a checkpoint of tensors and plain values; anything that needs code to be run is refused."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise UserError(
                f"{path} holds Python objects besides tensors; loading them can run code, so it is refused."
            ) from error
        raise UserError(f"{path} is damaged or no checkpoint; resume from another one.") from error
    except (EOFError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged or no checkpoint; resume from another one.") from error
    if not isinstance(checkpoint, dict) or not all(key in checkpoint for key in _KEYS):
        raise UserError(f"{path} is no checkpoint of a training run: it lacks {', '.join(_KEYS)}.")
    if type(checkpoint["iter"]) is not int:
        raise UserError(f"{path} is damaged: its iteration is {checkpoint['iter']!r}; resume from another one.")
    return checkpoint


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _swallow_prints() -> contextlib.redirect_stdout:
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _quiet_log_writer() -> Iterator[None]:
    """No traceback from TensorBoard's thread on a full disk: it keeps the error, and raises it at the next write."""
    show = threading.excepthook

    def show_others(args: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(args.exc_value, OSError)):
            show(args)

    threading.excepthook = show_others
    try:
        yield
    finally:
        threading.excepthook = show
