"""The console that verbs print on; needs rich alone."""

from __future__ import annotations

import errno

from rich.console import Console


class PipedConsole(Console):
    """rich's, which would end the program with status 1, and without a word, where nobody reads on."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command line."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")
