"""Reading a distributed checkpoint without running what it holds.

torch's format keeps its table of contents (`.metadata`), tensors and small objects as pickles. Here none of them gets
to a library that would run it: the table is read once, as data, and becomes torch's own description by the tables
below; tensors and values are read by `saved`. What torch and megatron-core do is planning: which part of which file
goes where.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common as common_strategy
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future
from typing_extensions import TypedDict

from megatron_prune import foreign
from megatron_prune.errors import UserError, brief
from megatron_prune.model.pickled import ORDERED, Made, Name, Refused, read_pickle
from megatron_prune.model.saved import TORCH_DTYPES, read_saved

COMMON = MetadataIndex(ShardedObject("common_state", None, (1,), (0,)).unique_key)
TABLE = ".metadata"
FORMAT = "metadata.json"
MOST_TABLE = 2_000_000_000
"""Bytes of a table of contents; one of a 70B model in training, saved by 512 processes, has some 200 MB."""
TRUSTED = "use a checkpoint from a source you trust"
WHAT = "a distributed checkpoint"

METADATA = "torch.distributed.checkpoint.metadata"
PLANNER = "torch.distributed.checkpoint.planner"
SIZE = Name("torch", "Size")
INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
INDEX, TENSOR, BYTES, CHUNK, PROPERTIES, CONTENTS = (
    Name(METADATA, name)
    for name in (
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "Metadata",
    )
)
NAMES = {
    *(SIZE, INFO, INDEX, TENSOR, BYTES, CHUNK, PROPERTIES, CONTENTS, ORDERED),
    *((METADATA, name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    ("torch.serialization", "_get_layout"),
    ("builtins", "getattr"),  # how early Python 3.11 writes members of enumerations; nothing is looked up
    *(("torch", name) for name in TORCH_DTYPES),
}


class Format(TypedDict):
    """metadata.json of megatron-core."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: Literal[1]
    common_backend: NotRequired[Literal["torch"]]
    """Of megatron-core before 0.19."""
    common_backend_version: NotRequired[Literal[1]]


# --- the table of contents ---


def read_table(folder: Path) -> Metadata:
    """The table of contents of a distributed checkpoint; UserError when it holds anything but tensors' places."""
    data = foreign.read_regular(folder / TABLE, WHAT, MOST_TABLE)
    try:
        return _table(read_pickle(data, NAMES), _sizes(folder), len(data))
    except (Refused, RecursionError) as error:
        raise UserError(
            f"checkpoint {folder} is refused: {TABLE} is damaged or not what it should be "
            f"({foreign.reason(error)}); {TRUSTED}"
        ) from None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each ordinary file of the folder."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if stat.S_ISREG(entry.stat().st_mode)}


def _table(made: Any, sizes: dict[str, int], most: int) -> Metadata:
    fields = _fields(made, CONTENTS)
    described = _of_type(fields.get("state_dict_metadata"), dict)
    chunks = _Count(most)
    entries = {_of_type(key, str): _entry(value, chunks) for key, value in described.items()}
    places = _of_type(fields.get("storage_data"), dict)
    return Metadata(entries, storage_data={_index(key): _info(value, sizes) for key, value in places.items()})


class _Count:
    """Refuses more chunks than a file of that size can describe: a list of them may be shared by many tensors."""

    def __init__(self, most: int) -> None:
        self.left = most

    def take(self, number: int) -> None:
        self.left -= number
        if self.left < 0:
            raise Refused("more parts of tensors than it has room for")


def _fields(value: Any, name: Name) -> dict[Any, Any]:
    """State of an object that must be of the class `name`."""
    if not isinstance(value, Made) or value.name != name or value.args:
        raise Refused(f"{brief(type(value).__name__)} where {name.name} is expected")
    return _of_type(value.state, dict)


def _of_type(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise Refused(f"{type(value).__name__} where {kind.__name__} is expected")
    return value


def _entry(value: Any, count: _Count) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Made) and value.name == BYTES:
        return BytesStorageMetadata()
    fields = _fields(value, TENSOR)
    size = _size(fields.get("size"))
    chunks = _of_type(fields.get("chunks"), list)
    count.take(len(chunks))
    parts = [_chunk(chunk, size) for chunk in chunks]
    if sum(math.prod(part.sizes) for part in parts) != math.prod(size):
        raise Refused(f"the parts of a tensor of size {brief(tuple(size))} do not make it up")
    return TensorStorageMetadata(TensorProperties(dtype=_dtype(fields.get("properties"))), size, parts)


def _dtype(properties: Any) -> torch.dtype:
    """Of a tensor's properties, whose state is a tuple that begins with it; torch uses no other of them."""
    if not isinstance(properties, Made) or properties.name != PROPERTIES or type(properties.state) is not tuple:
        raise Refused("a tensor without properties")
    name = properties.state[0] if properties.state else None
    if not isinstance(name, Name) or name.module != "torch" or name.name not in TORCH_DTYPES:
        raise Refused("a tensor without a type")
    return TORCH_DTYPES[name.name]


def _size(value: Any) -> torch.Size:
    if not isinstance(value, Made) or value.name != SIZE or len(value.args) != 1 or value.state is not None:
        raise Refused("no size where one is expected")
    numbers = value.args[0]
    if not isinstance(numbers, list | tuple) or len(numbers) > 16:
        raise Refused("a size that is no short list of numbers")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise Refused("a size that is no number, negative or too large")
    return torch.Size(numbers)


def _chunk(value: Any, whole: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, CHUNK)
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    if not len(offsets) == len(sizes) == len(whole) or any(
        offset + size > most for offset, size, most in zip(offsets, sizes, whole, strict=True)
    ):
        raise Refused("a part that lies outside of its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, INDEX)
    offset = fields.get("offset")
    return MetadataIndex(_of_type(fields.get("fqn"), str), None if offset is None else _size(offset))


def _info(value: Any, sizes: dict[str, int]) -> _StorageInfo:
    """Where a part lies: in a file of the same folder, and within it."""
    fields = _fields(value, INFO)
    name, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if type(name) is not str or type(offset) is not int or type(length) is not int:
        raise Refused("a part without a place")
    if fields.get("transform_descriptors"):
        raise Refused("a part that is transformed")
    if name not in sizes:
        raise Refused(f"{brief(name)} is no file of this folder")
    if offset < 0 or length < 0 or offset + length > sizes[name]:
        raise Refused(f"a part that lies beyond the end of {name}")
    return _StorageInfo(name, offset, length)


# --- what the table speaks of ---


class TableReader(FileSystemReader):
    """torch's reader of a checkpoint whose table is known, and which reads tensors and values as data."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self.folder, self.table = folder, table

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The table that was read already."""
        return self.table

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As the base class."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            with foreign.open_regular(self.folder / name, WHAT, most=None) as file:
                for item in items:
                    place = self.storage_data[item.storage_index]
                    self._deliver(read_saved(file, place.offset, place.length), item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _deliver(self, value: Any, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type == LoadItemType.BYTE_IO:
            if not isinstance(planner, ValuePlanner):
                raise Refused("an object where a tensor is expected")
            planner.take(item, value)
            return
        if not isinstance(value, Tensor) or value.dim() != len(item.lengths):
            raise Refused(f"{type(value).__name__} where a tensor is expected, or one of other dimensions")
        for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            value = value.narrow(dimension, offset, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(value)
        planner.commit_tensor(item, target)


class ValuePlanner(DefaultLoadPlanner):
    """torch's planner, which would unpickle values itself."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never: `TableReader` hands over values that it has read."""
        raise Refused(f"{read_item.dest_index.fqn} would be unpickled")

    def take(self, item: ReadItem, value: Any) -> None:
        """A value that was read."""
        name = item.dest_index.fqn
        if not self.flatten_state_dict:
            self.state_dict[name] = value
            return
        *parents, last = self.mappings[name]
        holder: Any = self.original_state_dict
        for parent in parents:
            holder = holder[parent]
        holder[last] = value


class TableStrategy(torch_strategy.TorchDistLoadShardedStrategy):
    """megatron-core's way to load sharded tensors, over a `TableReader`."""

    def __init__(self, table: Metadata) -> None:
        super().__init__()
        self.table = table

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, *how: Any) -> Any:
        """As the base class, which asks a function of its module for a reader."""
        theirs = torch_strategy._get_filesystem_reader
        reader = TableReader(Path(checkpoint_dir), self.table)
        torch_strategy._get_filesystem_reader = lambda *_args, **_kwargs: reader
        try:
            return super().load(sharded_state_dict, checkpoint_dir, *how)
        finally:
            torch_strategy._get_filesystem_reader = theirs


def load(state: Any, folder: Path, table: Metadata) -> dict[str, Any]:
    """megatron-core's `dist_checkpointing.load`, over readers that take everything as data."""

    def common(*_args: Any) -> dict[str, Any]:
        return read_common(folder, table)

    if hasattr(common_strategy, "TorchCommonLoadStrategy"):  # 0.16
        strategy = common_strategy.TorchCommonLoadStrategy()
        strategy.load_common = common
        return dist_checkpointing.load(state, str(folder), TableStrategy(table), strategy)
    theirs = serialization.load_common_state_dict
    serialization.load_common_state_dict = common
    try:
        return dist_checkpointing.load(state, str(folder), TableStrategy(table))
    finally:
        serialization.load_common_state_dict = theirs


def read_common(folder: Path, table: Metadata) -> dict[str, Any]:
    """What is not sharded: in a file of its own, or since megatron-core 0.19 an object among the tensors."""
    path = folder / COMMON_STATE_FNAME
    if path.exists() or COMMON not in table.storage_data:
        with foreign.open_regular(path, WHAT, most=None) as file:
            return _common(read_saved(file, 0, path.stat().st_size), COMMON_STATE_FNAME)
    place = table.storage_data[COMMON]
    with foreign.open_regular(folder / place.relative_path, WHAT, most=None) as file:
        found = read_saved(file, place.offset, place.length)
    return _common(found[0] if type(found) is list and len(found) == 1 else found, place.relative_path)


def _common(found: Any, name: str) -> dict[str, Any]:
    if type(found) is not dict:
        raise Refused(f"{name} holds {type(found).__name__}; expected a dict")
    return found


def check_format(folder: Path) -> None:
    """UserError unless metadata.json says what megatron-core's own reader, which comes after, can bear."""
    foreign.read_json(folder / FORMAT, WHAT, Format)


def causes(error: BaseException) -> Iterator[BaseException]:
    """What processes raised while they read together, or what was raised."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        yield from (failure[0] for failure in failures.values())
    else:
        yield error
