"""Files of torch.save read as data: plain values and dense tensors, from a zip whose entries lie there uncompressed.

torch.load is not used: its list of allowed names belongs to all libraries of a process, and it reads older forms, too.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_prune.foreign import reason
from megatron_prune.model.pickled import ORDERED, Made, Name, Refused, Stored, check_plain, read_pickle

TORCH_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
REBUILD_BYTES = Name("torch._utils", "_rebuild_tensor_v3")
"""For types that have no storage class of their own: the storage counts bytes, the type is an argument."""
UNTYPED = Name("torch.storage", "UntypedStorage")
NAMES = {
    ORDERED,
    REBUILD,
    REBUILD_BYTES,
    UNTYPED,
    *(("torch", name) for name in (*STORAGES, *TORCH_DTYPES)),
}
MOST_PICKLE = 100_000_000
"""Bytes of the values of a file without its tensors."""


def read_saved(file: BinaryIO, start: int, length: int) -> Any:
    """What torch.save wrote to `length` bytes of `file` from `start` on; `Refused` when it is anything else."""
    try:
        saved = _Saved(file, start, length)
        described = read_pickle(saved.pickle(), NAMES, places=True)
        return check_plain(_with_tensors(described, saved), length)
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  (of zipfile, whose errors are no list)
        raise Refused(f"no file of torch.save ({reason(error)})") from None


def _with_tensors(value: Any, saved: _Saved) -> Any:
    """`value` with tensors instead of their descriptions, in place: lists and dicts stay the same objects."""
    if isinstance(value, Made):
        return saved.tensor(value)
    waiting, seen = [value], {id(value)}
    while waiting:
        holder = waiting.pop()
        places: Any = holder.items() if isinstance(holder, dict) else enumerate(holder) if _holds(holder) else ()
        for key, entry in list(places):
            if isinstance(entry, Made):
                if not isinstance(holder, dict | list):
                    raise Refused("a tensor inside a tuple")
                holder[key] = saved.tensor(entry)
            elif (isinstance(entry, dict) or _holds(entry)) and id(entry) not in seen:
                seen.add(id(entry))
                waiting.append(entry)
    return value


def _holds(value: Any) -> bool:
    return isinstance(value, list) or type(value) is tuple


class _Saved:
    """The zip: every entry stored as it is, so that nothing becomes larger than the file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.view = _View(file, start, length)
        with zipfile.ZipFile(self.view) as archive:
            entries = archive.infolist()
        self.entries = {info.filename: info for info in entries}
        if len(self.entries) != len(entries) or any(info.compress_type or info.flag_bits & 1 for info in entries):
            raise Refused("its zip has entries that are compressed, encrypted or there twice")
        pickles = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"its zip has {len(pickles)} entries data.pkl; expected one")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}
        if f"{self.folder}byteorder" in self.entries and self._bytes("byteorder", 20) != sys.byteorder.encode():
            raise Refused("its byte order is not that of this machine")

    def pickle(self) -> bytes:
        """The values."""
        return self._bytes("data.pkl", MOST_PICKLE)

    def _bytes(self, name: str, most: int) -> bytes:
        size = self._place(name)
        if size > most:
            raise Refused(f"its {name} has {size} bytes; allowed: at most {most}")
        return self.view.read(size)

    def _place(self, name: str) -> int:
        """Go to the bytes of an entry, which are told."""
        info = self.entries.get(self.folder + name)
        if info is None or info.header_offset < 0:
            raise Refused(f"its zip has no entry {name}")
        self.view.seek(info.header_offset + 26)
        names = struct.unpack("<HH", self.view.read(4))
        begin = info.header_offset + 30 + sum(names)
        if info.file_size != info.compress_size or not 0 <= begin <= begin + info.file_size <= self.view.length:
            raise Refused(f"the entry {name} of its zip goes beyond its end")
        self.view.seek(begin)
        return info.file_size

    def _storage(self, place: Any, dtype: torch.dtype | None) -> Tensor:
        """`[numbers]` of a storage, read once; `dtype`: of one that counts bytes."""
        if not isinstance(place, Stored) or len(place.place) != 5 or place.place[0] != "storage":
            raise Refused("a tensor without a storage")
        _, name, key, _device, count = place.place
        counts_bytes = name == UNTYPED
        found = dtype if counts_bytes else STORAGES.get(name.name) if isinstance(name, Name) else None
        if found is None or type(key) is not str or type(count) is not int:
            raise Refused("a storage of unknown type")
        if key not in self.storages:
            size = self._place(f"data/{key}")
            if size != count * (1 if counts_bytes else found.itemsize) or size % found.itemsize:
                raise Refused(f"a storage of another size than its {size} bytes")
            raw = torch.empty(size, dtype=torch.uint8)
            if self.view.readinto(raw.numpy().data) != size:
                raise Refused("the file ends too early")
            self.storages[key] = raw.view(found)
        if self.storages[key].dtype != found:
            raise Refused("a storage of two types")
        return self.storages[key]

    def tensor(self, made: Made) -> Tensor:
        """The tensor that a description stands for."""
        expected = {REBUILD: 6, REBUILD_BYTES: 7}.get(made.name)
        if expected is None or len(made.args) != expected or made.state is not None:
            raise Refused(f"it would run code: {made.name} is no plain tensor")
        place, offset, size, stride = made.args[:4]
        dtype = None
        if made.name == REBUILD_BYTES:
            named = made.args[6]
            dtype = TORCH_DTYPES.get(named.name) if isinstance(named, Name) and named.module == "torch" else None
        storage = self._storage(place, dtype)
        if not (_counts(size) and _counts(stride) and _counts((offset,)) and len(size) == len(stride)):
            raise Refused("a tensor without size")
        numbers = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numbers > len(storage) or (numbers and last >= len(storage)):
            raise Refused("a tensor that is larger than its storage")
        return storage.as_strided(size, stride, offset if numbers else 0)


def _counts(values: Any) -> bool:
    """Whether these are dimensions, or steps."""
    return (
        type(values) is tuple
        and len(values) <= 16
        and all(type(value) is int and 0 <= value < 2**48 for value in values)
    )


class _View(io.RawIOBase):
    """Part of a file, as a file; a read gives no more than there is."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if target < 0:
            raise OSError("before the beginning")
        self.at = target
        return target

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.length - self.at, 0)
        self.file.seek(self.start + self.at)
        found = self.file.read(left if size is None or size < 0 else min(size, left))
        self.at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        left = max(self.length - self.at, 0)
        self.file.seek(self.start + self.at)
        found = self.file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self.at += found
        return found
