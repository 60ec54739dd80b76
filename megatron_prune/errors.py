"""Errors that are the user's to mend: one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

from typing import Any

LONGEST = 440
"""Characters of a message; with the program's name and the process before it a line stays below 500."""


def one_line(text: str, limit: int = LONGEST) -> str:
    """`text` on one line of printable characters, its middle left out where it is longer than `limit`."""
    words = " ".join(str(text[: 4 * limit] + text[-4 * limit :] if len(text) > 8 * limit else text).split())
    clean = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in words)
    if len(clean) <= limit:
        return clean
    head = limit * 3 // 5
    return f"{clean[:head]} ... {clean[head + 5 - limit :]}"


def brief(value: Any, limit: int = 60) -> str:
    """A value from outside as a message shows it: short, on one line, with quotes around text."""
    if isinstance(value, str):
        shown = value if len(value) <= limit else value[: limit // 2] + "..." + value[-limit // 4 :]
        return one_line(repr(shown), limit + 20)
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > 3:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return one_line(repr(value), limit)
    except (RecursionError, ValueError):  # deeper, or longer a number, than Python prints
        return f"a {type(value).__name__}"


def shown(name: str) -> str:
    """A name from outside in a message, as it is but for its length."""
    return one_line(name, 100)


def bare(text: str, limit: int = 100) -> str:
    """As `brief`, without quotes: a name where it is one of the user's own words."""
    return brief(text, limit)[1:-1]


class UserError(ValueError):
    """What was given, what is allowed, what to do: one line, printed by the command line as it stands.

    A longer message loses its middle: names from outside can have any length.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(str(message)))


class Interrupted(UserError):
    """Not the fault of what was given: what is finished can be gone on with."""


class DiskFault(Interrupted):
    """The file system is full or broken."""
