"""When a run has to end early: SIGTERM, SIGINT or its time limit, agreed upon by all ranks at the end of a step.

The run then saves and ends with status 0: a launcher that restarts failures leaves it alone, and `--resume` goes on.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

import megatron_prune.backend as backend

REASONS = ["", "time limit", "SIGINT", "SIGTERM"]
"""Why to stop, by code; when ranks differ the largest counts."""


class Stopped(Exception):
    """The run was asked to end before its last step, and has saved."""


class StopRequest:
    """Notices signals while it is entered, and that `minutes` have passed since it was made.

    SIGTERM may come several times (a scheduler and a launcher both send it); a second SIGINT is a KeyboardInterrupt.
    Python hands signals to the main thread alone: a run in another one ends by its time limit only.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else None
        self._signalled = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        code = REASONS.index(signal.Signals(number).name)
        if number == signal.SIGINT and self._signalled == code:
            raise KeyboardInterrupt
        self._signalled = max(self._signalled, code)

    def code(self) -> int:
        """This process's reason to stop, an index of `REASONS`; 0 for none."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return max(self._signalled, int(late))


def largest(*values: int) -> list[int]:
    """The largest of each value over all ranks. Collective."""
    tensor = torch.tensor(values, device=backend.device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]
