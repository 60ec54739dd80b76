"""Memory of verbs: `memory.py FOLDER ...` runs the commands in each FOLDER/commands.json on two processes.

The most bytes that each process took for one are written to FOLDER/NUMBER_RANK.json.

Counted is anonymous memory, beyond what the process had when it was forked from this one, which has imported all:
files that are mapped are the system's to drop.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import megatron_prune.backend as backend  # isort: skip
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_prune.__main__ import main
from megatron_prune.verbs import VERBS

PROCESSES = 2


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class Watch:
    """Looks every few milliseconds while a block runs; `most` is then what it took at its peak."""

    def __init__(self) -> None:
        self.before = self.most = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self.ended.wait(0.003):
            self.most = max(self.most, anonymous() - self.before)

    def __enter__(self) -> Watch:
        self.before = anonymous()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()


def run(rank: int, number: int, command: list[str], folder: Path) -> None:
    """One command as one of the processes, which find what torchrun would tell them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    store = dist.FileStore(str(folder / f"{number}.store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=5))
    with Watch() as watch:
        status = main(command)
    (folder / f"{number}_{rank}.json").write_text(json.dumps(watch.most))
    assert status == 0, command
    backend.shutdown()


def load_all() -> None:
    """Import what the verbs import when they are run."""
    import megatron_prune.evaluation.verify
    import megatron_prune.exporting.export
    import megatron_prune.jobs.import_hf
    import megatron_prune.jobs.prune  # noqa: F401

    assert VERBS


if __name__ == "__main__":
    load_all()
    for folder in map(Path, sys.argv[1:]):
        for number, command in enumerate(json.loads((folder / "commands.json").read_text())):
            multiprocessing.start_processes(run, (number, command, folder), nprocs=PROCESSES, start_method="fork")
