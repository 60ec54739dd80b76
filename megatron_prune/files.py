"""Folders that appear whole or not at all, and never over one that is already there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prune.errors import UserError

PARTIAL = ".partial"
"""Suffix of a folder that is still being written."""


def _leader() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def refuse_existing(path: Path, what: str = "output") -> None:
    """UserError when `path` exists: results are never overwritten silently."""
    if path.exists():
        raise UserError(
            f"{what} {path} already exists; give a folder that does not exist, or remove this one if it is not needed"
        )


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that gets its name `path` when everything is in it. All ranks take part.

    On an error the half-written folder is removed and `path` does not appear. Rank 0 looks and renames; the others
    wait for it.
    """
    refuse_existing(path)
    partial = path.with_name(path.name + PARTIAL)
    if _leader():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    try:
        yield partial
    except BaseException:
        if _leader():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _barrier()
    if _leader():
        sync(partial)
        os.replace(partial, path)
    _barrier()


def sync(folder: Path) -> None:
    """Push every file below `folder`, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that a reader sees the old file or the new one, never a part."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is not {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {what} cannot be read from it: restore or rewrite it") from None
