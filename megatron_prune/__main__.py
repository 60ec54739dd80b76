"""`megatron-prune VERB` and `python -m megatron_prune VERB`: the table of verbs, and how a run ends.

What a verb works with is imported only when it runs, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_prune.command_line import parse
from megatron_prune.errors import UserError, brief, one_line
from megatron_prune.foreign import reason
from megatron_prune.outputs import held
from megatron_prune.ranks import ROOM, disk_fault, why
from megatron_prune.telling import another_told, first_to_tell, process, processes
from megatron_prune.verbs import VERBS
from megatron_prune.version import VERSION

PROGRAM = "megatron-prune"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; exit status: 0 done, 1 a check of the verb failed, 2 the user's mistake, 130 Ctrl-C,
    141 when nobody reads the output on.

    Also 0: a learning run that SIGTERM, SIGINT or its time limit made save and end.
    """
    try:
        status = _told_to_launcher(_silent_when_lost(_run))(list(sys.argv[1:] if argv is None else argv)) or 0
        if sys.stdout is not None:  # None: closed by who started this
            sys.stdout.flush()
        return status
    except UserError as error:
        _report(str(error))
        return 2
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to say goes nowhere
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        complaint = _refused(error)
        if complaint is None:
            raise
        _report(one_line(complaint))
        return 2


def _refused(error: Exception) -> str | None:
    """What to tell of an error that is the machine's answer to what was asked for; None for a defect of the program."""
    text = str(error)
    if disk_fault(error) or (isinstance(error, OSError) and error.filename is not None):
        return f"{why(error)}: {ROOM}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        asked = reason(error) or "no more is known"
        return f"more memory was asked for than there is ({asked}): give smaller batches or windows, or more processes"
    if "does not have a deterministic implementation" in text:
        return f"--deterministic: {text.split(' does not have')[0]} can give other bits in every run here: leave it out"
    if text.startswith("Symlink loop from "):
        return f"{text}: links lead in a circle; give a path that ends at a file or folder"
    return None


def _silent_when_lost(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`function`, with status 2 for an error that follows from another process's: the connection to it is lost."""

    def run(argv: list[str]) -> int:
        try:
            return function(argv)
        except Exception as error:
            if isinstance(error, UserError) or _refused(error) is not None or not another_told():
                raise
            return 2

    return run


def _told_to_launcher(function: Callable[[list[str]], int]) -> Callable[[list[str]], int | None]:
    """`function`, with its errors left where torchrun looks for them: it prints the first as the cause of a failure."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(PROGRAM, VERSION)
        return 0
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0][:100], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(VERBS)}"
        raise UserError(f"unknown verb {brief(argv[0])}; {hint}")
    verb = VERBS[argv[0]]
    if verb.alone and processes() > 1:
        raise UserError(f"{processes()} processes were started; {argv[0]} takes one: leave torchrun out")
    with _nothing_collected():
        settings = parse(verb.config, argv[1:], prog=f"{PROGRAM} {argv[0]}")
    with held(settings):
        if not verb.light:
            with _nothing_collected():
                importlib.import_module("megatron_prune.backend")  # PyTorch and megatron-core
        return 0 if verb.passed(verb.run(settings)) else 1


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """While modules are imported: what they make stays, and looking it through for garbage took a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [f"usage: {PROGRAM} VERB [--config FILE.yaml] [--flag VALUE ...]", "", "verbs:", *lines, ""]
        + [f"{PROGRAM} VERB --help lists the options of a verb. On several processes:"]
        + ["  torchrun --nproc-per-node N -m megatron_prune VERB ..."]
    )


def _report(message: str) -> None:
    """One line on stderr; of a launch of several processes, from the first that has something to tell."""
    if first_to_tell():
        message = f"[process {process()}] {message}" if process() else message
        print(f"{PROGRAM}: error: {message}", file=sys.stderr, flush=True)


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
