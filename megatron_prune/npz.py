"""Reads .npz files of others: nothing is unpickled, and no array is made before its size is known to be bearable.

numpy's own reader makes an array of whatever shape a header claims, and raises whatever zip, zlib and tokenizer find
wrong. Needs numpy alone.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.errors import UserError, bare, brief
from megatron_prune.foreign import fenced, open_regular

SUFFIX = ".npy"
MOST_HEADER = 10_000
"""Bytes of an array's header."""
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""As numpy writes them."""


class Npz:
    """The arrays of an .npz file, each read when asked for; a context manager."""

    def __init__(self, path: Path, what: str) -> None:
        """`what` says what the file should be: "a mask .npz"."""
        self.path = path
        self.what = what
        self._file = open_regular(path, what, None)
        try:
            with self._fence(f"{path} is not {what}, or is damaged"):
                self._archive = zipfile.ZipFile(self._file)
                self._entries = self._listed()
        except BaseException:
            self._file.close()
            raise

    def _fence(self, told: str) -> Any:
        return fenced(told, f"give {self.what} that numpy.savez could have written")

    def _listed(self) -> dict[str, zipfile.ZipInfo]:
        """Name of each array -> its entry."""
        found: dict[str, zipfile.ZipInfo] = {}
        for entry in self._archive.infolist():
            name = entry.filename.removesuffix(SUFFIX)
            if name in found or name == entry.filename:
                raise ValueError(f"the entry {brief(entry.filename)} is there twice or is no {SUFFIX}")
            found[name] = entry
        return found

    def names(self) -> list[str]:
        """Of the arrays, as they stand there."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def array(self, name: str, most: int) -> np.ndarray:
        """An array of at most `most` bytes; UserError for anything else."""
        if name not in self._entries:
            raise UserError(f"{self.path} lacks {bare(name)}; it is not {self.what}")
        entry = self._entries[name]
        with self._fence(f"{self.path}: {bare(name)} cannot be read"):
            if entry.file_size > most + MOST_HEADER or entry.flag_bits & 1 or entry.compress_type not in _PACKED:
                raise ValueError(
                    f"{entry.file_size} bytes, {most} are expected, neither encrypted nor packed otherwise"
                )
            with self._archive.open(entry) as opened:
                shape, turned, kind = self._header(opened)
                data = opened.read(most + 1)
            if kind.hasobject or len(data) != math.prod(shape) * kind.itemsize or len(data) > most:
                raise ValueError(f"{len(data)} bytes for {kind} of shape {brief(list(shape))}")
            return np.frombuffer(data, kind).reshape(shape, order="F" if turned else "C")

    def text(self, name: str, most: int) -> str:
        """An array that is one text, of at most `most` bytes."""
        array = self.array(name, most)
        if array.dtype.kind != "U" or array.size != 1:
            raise UserError(f"{self.path}: {bare(name)} is {array.dtype}, one text is expected; it is not {self.what}")
        return str(array.item())

    def _header(self, opened: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = np.lib.format.read_magic(opened)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"version {version} of the header")
        shape, turned, kind = read[version](opened, max_header_size=MOST_HEADER)
        if any(type(size) is not int or size < 0 for size in shape) or not isinstance(kind, np.dtype):
            raise ValueError(f"shape {brief(list(shape))} of {brief(str(kind))}")
        return shape, turned, kind

    def close(self) -> None:
        """Close the file."""
        self._archive.close()
        self._file.close()

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
