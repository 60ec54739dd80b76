"""Reading a distributed checkpoint without running what it holds.

torch's format keeps its table of contents (`.metadata`) and small objects as pickles, and its reader lets them name any
function. Here a checkpoint is read only after every name in its table has been compared with the few that such a table
needs, and objects are read with torch's `weights_only`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_prune.errors import UserError

TABLE = ".metadata"
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable that overrides `weights_only=False` in torch.load, as torch's own checkpoint reader has it."""
PARENTS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
NAMES = {
    *((PARENTS[0], name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta")),
    *((PARENTS[0], name) for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties")),
    *((PARENTS[0], name) for name in ("_MEM_FORMAT_ENCODING",)),
    *((PARENTS[1], name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


def _member(owner: Any, name: str) -> enum.Enum:
    """What early Python 3.11 and older write `getattr` for: a member of an enumeration, and nothing else."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"builtins.getattr({owner!r}, {name!r}) has no place in a checkpoint")
    return owner[name]


class _TableReader(pickle.Unpickler):
    """Knows the names of a table of contents and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def check_table(folder: Path) -> None:
    """UserError when the table of contents of a distributed checkpoint names anything but tensors and their places."""
    try:
        with (folder / TABLE).open("rb") as file:
            _TableReader(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {folder} is refused: {TABLE} is damaged or would run code ({error}); use a checkpoint from a "
            "source you trust"
        ) from error


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """While active, torch.load reads tensors and plain values only, whatever its caller asks for."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
