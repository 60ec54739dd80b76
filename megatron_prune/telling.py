"""Which process of a launch tells the user of a mistake: one, once, however late the others are.

torchrun keeps a store that outlives its processes and that those of all nodes reach. The first process that has
something to tell says so there; the others keep silent. Process 0 goes first where it is there in time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE_S = 5.0
"""Seconds that another process waits for process 0 to tell, and a failed one for somebody to have told why."""
STORE_S = 10.0
"""Seconds in which the launcher's store must answer."""
POLL_S = 0.1


def process() -> int:
    """This process's number in its launch, before the processes are connected, too."""
    return _number("RANK", 0)


def processes() -> int:
    """The number of processes of the launch."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, usual: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else usual


def first_to_tell() -> bool:
    """Whether this process is to tell of its mistake; another has not told of one. To be asked once."""
    if processes() == 1 and process() == 0:
        return True
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a launcher that nothing is known of: each for itself
        if process():
            time.sleep(PATIENCE_S)
        return True
    told, take = _board()
    if process() and _within_patience(told):
        return False
    return take()


def another_told() -> bool:
    """Whether another process has told of a mistake, or does so soon: that it cannot be reached is no news then."""
    return processes() > 1 and "TORCHELASTIC_RUN_ID" in os.environ and _within_patience(_board()[0])


def _within_patience(told: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if told():
            return True
        time.sleep(POLL_S)
    return told()


def _board() -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Whether somebody has told, and: be the first who tells (False for all who ask later)."""
    with contextlib.suppress(Exception):  # the launcher, or the node that it is on, may be gone
        return _in_store(_store())
    return _in_folder()


def _store() -> Any:
    from torch.distributed import TCPStore

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConnectionError("the store is a process's own and goes with it")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_S), wait_for_workers=False)


def _in_store(store: Any) -> tuple[Callable[[], bool], Callable[[], bool]]:
    key = f"megatron_prune/told/{_launch()}"
    return lambda: bool(store.check([key])), lambda: bool(store.add(key, 1) == 1)


def _launch() -> str:
    return f"{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _in_folder() -> tuple[Callable[[], bool], Callable[[], bool]]:
    """In the folder where torchrun looks for errors of this node's processes."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place is None:
        return lambda: False, lambda: True
    mark = Path(place).parent.parent / "megatron_prune.told"

    def take() -> bool:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # it cannot be written: better twice than never
            return True
        return True

    return mark.exists, take
