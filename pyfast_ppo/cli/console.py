"""Lines on the terminal while a run goes on: they may be lost, the run may not."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from typing import TextIO

from pyfast_ppo.cli.history import Record

HEADER = (
    f"{'iteration':>12} {'reward':>10} {'length':>8} {'kl':>9} {'lr':>9}"
    f" {'collect':>9} {'learn':>9} {'steps/s':>9} {'eta':>9}"
)
_HEADER_EVERY = 25


class Console:
    """Prints to the stream that is standard output when it is made, also while prints of others are swallowed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Keep the stream; None: standard output."""
        self._stream = sys.stdout if stream is None else stream
        if isinstance(self._stream, io.TextIOWrapper):  # a character that it does not know must not end the run
            self._stream.reconfigure(errors="replace")

    def say(self, text: str = "", end: str = "\n") -> None:
        """Print one line, or its beginning, at once.

        A reader that has gone away (``| tee`` after Ctrl-C), or a full disk, does not stop the run.
        """
        try:
            print(text, end=end, file=self._stream, flush=True)
        except OSError:
            # What is left in the stream's buffer would raise again when the interpreter exits
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def can_draw(self) -> bool:
        """Whether matplotlib is there; what that means is said where it is not."""
        if importlib.util.find_spec("matplotlib") is not None:
            return True
        self.say("No figure: it needs matplotlib; install with: pip install 'pyfast-ppo[gym]'")
        return False


class ProgressTable:
    """One line an iteration, at most one a second; the first and the last are always there."""

    def __init__(self, console: Console, total: int, seconds_between_lines: float = 1.0) -> None:
        """``total``: iterations of the whole run, counting those before a resume."""
        self._console = console
        self._total = total
        self._seconds_between_lines = seconds_between_lines
        self._last_line_at = float("-inf")
        self._lines = 0

    def row(self, record: Record, steps_per_second: float, eta: float) -> None:
        """Print a line unless the last one was a moment ago. ``eta``: seconds until the end of the run."""
        done = record.iteration + 1
        if record.wall_s - self._last_line_at < self._seconds_between_lines and done != self._total:
            return
        if self._lines % _HEADER_EVERY == 0:
            self._console.say(HEADER)
        self._last_line_at = record.wall_s
        self._lines += 1
        self._console.say(
            f"{f'{done}/{self._total}':>12} {number(record.mean_reward, '.1f'):>10}"
            f" {number(record.mean_episode_length, '.1f'):>8} {number(record.kl, '.5f'):>9}"
            f" {record.learning_rate:>9.1e} {f'{record.collect_s:.2f}s':>9} {f'{record.learn_s:.2f}s':>9}"
            f" {steps_per_second:>9.0f} {clock(eta):>9}"
        )


def number(value: float | None, form: str) -> str:
    """Format a number that may not be known yet."""
    return "-" if value is None else format(value, form)


def clock(seconds: float) -> str:
    """Format a duration: ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
