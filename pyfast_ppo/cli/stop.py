"""Ctrl-C and SIGTERM as a request to stop between two iterations."""

from __future__ import annotations

import os
import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping after this iteration; once more stops at once\n"


class StopRequest:
    """While entered, the first signal only sets ``requested``; a second one raises ``KeyboardInterrupt``."""

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False

    def __enter__(self) -> StopRequest:
        # Python takes signal handlers from the main thread only
        numbers = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _NOTE)  # print is not safe here: the signal may have come in the middle of one
