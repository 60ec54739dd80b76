"""Folders that appear whole or not at all, and never over one that is already there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from megatron_prune import foreign
from megatron_prune.errors import UserError

PARTIAL = ".partial"
"""Suffix of a folder that is still being written."""
T = TypeVar("T")


def _dist() -> Any:
    """torch.distributed where processes are joined; None where they are not, also in environments without PyTorch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() and dist.get_world_size() > 1 else None


def _leader() -> bool:
    dist = _dist()
    return dist is None or dist.get_rank() == 0


def _barrier() -> None:
    dist = _dist()
    if dist is not None:
        dist.barrier()


def from_leader(value: T) -> T:
    """Rank 0's `value` on every rank: what files say may differ between nodes of a shared file system. Collective."""
    box = [value]
    dist = _dist()
    if dist is not None:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _complaint(work: Callable[[], object]) -> str | None:
    """Do the work; what to tell the user when it cannot be done."""
    try:
        work()
    except (UserError, SafetensorError) as error:
        return str(error)
    except OSError as error:
        return f"{error}: give a place that can be written and has room; what was there before is untouched"
    return None


def by_leader(work: Callable[[], None]) -> None:
    """Let rank 0 alone look at files or change them; when it cannot, every rank raises its UserError. Collective."""
    complaint = from_leader(_complaint(work) if _leader() else None)
    if complaint is not None:
        raise UserError(complaint)


def together(work: Callable[[], object]) -> None:
    """Let every rank do its own work; when one cannot, all raise its UserError. Collective."""
    complaints = [_complaint(work)]
    dist = _dist()
    if dist is not None:
        own, complaints = complaints[0], [None] * dist.get_world_size()
        dist.all_gather_object(complaints, own)
    for complaint in complaints:
        if complaint is not None:
            raise UserError(complaint)


def refuse_existing(path: Path, what: str = "output") -> None:
    """UserError when `path` exists: results are never overwritten silently."""
    if path.exists():
        raise UserError(
            f"{what} {path} already exists; give a folder that does not exist, or remove this one if it is not needed"
        )


def begin_folder(path: Path) -> Path:
    """The folder that everything meant for `path` is written into, empty. Collective; `path` must not exist."""
    partial = path.with_name(path.name + PARTIAL)

    def begin() -> None:
        refuse_existing(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    by_leader(begin)
    return partial


def publish_folder(partial: Path, path: Path) -> None:
    """Give a folder from `begin_folder` its name, once it is on the disk whole. Collective: rank 0 renames."""

    def publish() -> None:
        sync(partial)
        os.replace(partial, path)
        _fsync(path.parent)

    _barrier()
    by_leader(publish)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that gets its name `path` when everything is in it. All ranks take part.

    On an error the half-written folder is removed and `path` does not appear. Rank 0 looks and renames; the others
    wait for it.
    """
    partial = begin_folder(path)
    try:
        yield partial
    except BaseException:
        if _leader():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    publish_folder(partial, path)


def sync(folder: Path) -> None:
    """Push every file below `folder`, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """CRC-32 of a file, as eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=2) + "\n")
    _fsync(partial)
    os.replace(partial, path)


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; UserError when it is missing or damaged."""
    return foreign.read_json(path, what, Any)
