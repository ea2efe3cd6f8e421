"""What the command line tells its user instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. ``str()`` is one sentence that names what is wrong and the mend."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        """Keep the sentence and the process's exit code: 2, a wrong argument; 1, a run that failed."""
        super().__init__(message)
        self.exit_code = exit_code
