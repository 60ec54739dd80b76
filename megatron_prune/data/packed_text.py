"""Text in zstandard files and in Parquet, read by pyarrow, which datasets brings along."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import fenced, open_regular, reason

ROWS = 1024
"""Of a Parquet file that are held at a time."""


class DamagedZstd(zlib.error):
    """A zstandard file that ends too early, or is none."""


class ZstdStream(io.RawIOBase):
    """The unpacked bytes of a file, which is closed with it."""

    def __init__(self, packed: IO[bytes]) -> None:
        import pyarrow

        self.packed = packed
        self._stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase` says; `DamagedZstd` for a damaged file."""
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            raise DamagedZstd(reason(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """With the file that it was made from."""
        super().close()
        self.packed.close()


def parquet_rows(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any] | ValueError]:
    """Rows with the columns of `keys` that there are, or why one has no values that Python knows.

    UserError for a damaged file, and one without any of the columns.
    """
    from pyarrow import parquet

    advice = "fetch it again"
    with open_regular(path, "a folder of text", None) as opened, fenced(f"{path} is no Parquet file", advice):
        file = parquet.ParquetFile(opened)
        names = file.schema_arrow.names
        found = [key for key in keys if key in names]
        if not found:
            wanted = " or ".join(map(brief, keys))
            raise UserError(f"{path}: no column {wanted}; its columns are {', '.join(map(brief, names[:8]))}")
        for batch in file.iter_batches(batch_size=ROWS, columns=found):
            yield from _rows(batch)


def _rows(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    """Of a batch; one by one where some value is none, such as text that is no UTF-8 or a time of no year."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            rows = [ValueError(reason(error))]
        else:
            rows = [row for number in range(len(batch)) for row in _rows(batch.slice(number, 1))]
    yield from rows
