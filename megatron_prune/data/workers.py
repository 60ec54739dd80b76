"""Numbered pieces of work in forked processes, one process each, some at a time (Linux).

A forked process shares the parent's imports and tokenizer and starts in milliseconds. It is killed by the system when
the parent dies, even by SIGKILL, so that nothing goes on writing behind the back of the next run.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from typing import Any, NamedTuple

from megatron_prune.errors import Interrupted, UserError
from megatron_prune.ranks import ROOM, disk_fault

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that the process gets when its parent dies."""
LOOK_S = 0.2
"""Seconds between two reports of what was done."""

Count = Callable[[int], None]
Work = Callable[[int, Count], None]
"""Does the piece of a number and counts what it has done, in any unit."""


class Worker(NamedTuple):
    """A running process, its piece of work and the end of a pipe on which it tells the user's mistake."""

    process: Any
    number: int
    mistake: Any


def run_forked(work: Work, numbers: Sequence[int], limit: int) -> Iterator[int]:
    """Do every number, at most `limit` at a time; yields again and again what all have counted so far.

    The first piece that fails ends all others: a `UserError` or `OSError` in it, or a signal that ended it, is a
    `UserError` here, `Interrupted` where the input is not to blame.
    """
    context = get_context("fork")
    counted = context.Value("q", 0)
    pending, running = deque(numbers), list[Worker]()
    try:
        while pending or running:
            while pending and len(running) < limit:
                running.append(_start(context, work, pending.popleft(), counted))
            connection.wait([worker.process.sentinel for worker in running], timeout=LOOK_S)
            for worker in [worker for worker in running if not worker.process.is_alive()]:
                running.remove(worker)
                _check(worker)
            yield counted.value
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()


def _start(context: Any, work: Work, number: int, counted: Any) -> Worker:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_body, args=(work, number, counted, sender, os.getpid()))
    process.start()
    sender.close()
    return Worker(process, number, receiver)


def _check(worker: Worker) -> None:
    """An error unless the process ended well."""
    worker.process.join()
    code = worker.process.exitcode
    if code == 0:
        return
    if code < 0:
        cause = signal.Signals(-code).name
        raise Interrupted(f"a worker was ended by {cause} (out of memory?); give the same command again to go on")
    if worker.mistake.poll():
        raise worker.mistake.recv()
    raise RuntimeError(f"worker {worker.number} failed; its traceback is above")


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent, of that id, dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _body(work: Work, number: int, counted: Any, mistake: Any, parent: int) -> None:
    """What a worker process runs; Ctrl-C is the parent's to answer."""
    end_with_parent(parent)
    gc.freeze()  # what is inherited is the parent's to free: destructors of its threads and groups crash here
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def count(done: int) -> None:
        with counted.get_lock():
            counted.value += done

    try:
        work(number, count)
    except UserError as error:
        mistake.send(error)
        raise SystemExit(2) from error
    except OSError as error:
        kind = Interrupted if disk_fault(error) else UserError
        mistake.send(kind(f"{error}: {ROOM}"))
        raise SystemExit(2) from error
