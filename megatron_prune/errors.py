"""Errors that are the user's to mend: one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """What was given, what is allowed, what to do: one line, printed by the command line as it stands."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
