"""Opens preprocessed text, `PREFIX.bin` and `PREFIX.idx`, after a look at whether it is whole and fits the model.

megatron-core's reader maps both files into memory and trusts them: what is wrong in them is an assertion, a crash, a
hang or another text there, here it is the user's error. The whole index is looked at, in one pass over its arrays:
lengths above 0, each pointer the sum of the lengths before it, document ends that rise to the number of sequences, and
a `.bin` of exactly that size. Of the token ids those of a `.bin` of up to `LOOKED_AT` bytes are looked at before
anything begins (a second); of a larger one, which would take minutes, those of every window as it is read. Arrays that
the data set returns are views that must not outlive it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import megatron_prune.backend  # noqa: F401  # isort: skip  (before megatron.core)
import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_prune.data.about import About, read_about
from megatron_prune.data.text import SUFFIXES, check_text_file
from megatron_prune.errors import UserError, brief
from megatron_prune.files import checksum

HEADER = struct.Struct("<9sQBQQ")
"""Of an index file: magic, version, type of the ids, sequences, document ends."""
MAGIC = b"MMIDIDX\0\0"
CHUNK = 1 << 24
"""Numbers of a file that are in memory at once."""
LOOKED_AT = 1 << 31
"""Bytes of a `.bin` whose ids are all looked at before training."""
CHECKED = (".bin", ".idx")
"""Files whose CRC-32 `preprocess` writes beside them."""
AGAIN = "run `preprocess` again or copy both files again"
IDS = {kind.value: found for kind in DType if np.issubdtype(found := DType.dtype_from_code(kind.value), np.integer)}
"""Types of ids, by their number in an index file."""


class Header(NamedTuple):
    """What an index file says about itself."""

    dtype: Any
    """numpy's, of the ids."""
    sequences: int
    ends: int


def open_indexed(prefix: Path, vocab_size: int) -> IndexedDataset:
    """The data set at `prefix`, whole, not empty and made by a tokenizer of at most `vocab_size` ids."""
    binary, index, about = _files(prefix)
    for file in (binary, index):
        if not file.is_file():
            if prefix.exists():  # text of another kind
                check_text_file(prefix)
            raise UserError(
                f"{prefix}: {file} does not exist; give text in {', '.join(SUFFIXES)}, or a prefix from `preprocess`"
            )
    if not binary.stat().st_size:
        raise UserError(f"{prefix}: empty or damaged; {AGAIN}")
    header = _header(prefix, index)
    described = _check_arrays(prefix, index, header, binary.stat().st_size)
    if binary.stat().st_size != described:
        raise UserError(
            f"{binary}: {binary.stat().st_size} bytes, its index describes {described}; copy both files again"
        )
    if about.is_file():
        told = read_about(about)
        _check_told(prefix, told, header, described)
        _check_vocabulary(prefix, told, vocab_size)
    return IndexedDataset(str(prefix))


def _files(prefix: Path) -> tuple[Path, Path, Path]:
    if not prefix.name:
        raise UserError(
            f"{prefix}: no name of a text; give text in {', '.join(SUFFIXES)}, or a prefix from `preprocess`"
        )
    binary, index, about = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json"))
    return binary, index, about


def _header(prefix: Path, index: Path) -> Header:
    """What an index file says about itself; UserError unless it is one and has the size that it promises."""
    with index.open("rb") as file:
        data = file.read(HEADER.size)
    if len(data) < HEADER.size:
        raise UserError(f"{prefix}: empty or damaged; {AGAIN}")
    magic, version, code, sequences, ends = HEADER.unpack(data)
    size = HEADER.size + sequences * (4 + 8) + ends * 8
    if magic != MAGIC or version != 1 or code not in IDS or not sequences or index.stat().st_size != size:
        raise UserError(f"{prefix}: empty or damaged; {AGAIN}")
    return Header(IDS[code], sequences, ends)


def _check_arrays(prefix: Path, index: Path, header: Header, most: int) -> int:
    """The bytes of ids that an index describes; UserError unless its arrays fit each other and `most` bytes."""
    count, ends = header.sequences, header.ends
    lengths = np.memmap(index, np.int32, "r", HEADER.size, (count,))
    pointers = np.memmap(index, np.int64, "r", HEADER.size + 4 * count, (count,))
    done = 0
    for part in _parts(count):
        sizes = lengths[part].astype(np.int64) * np.dtype(header.dtype).itemsize
        places = done + np.cumsum(sizes) - sizes
        bad = _first((sizes <= 0) | (pointers[part] != places))
        if bad is not None:
            raise UserError(
                f"{prefix}: damaged: sequence {part.start + bad} has {lengths[part][bad]} tokens from byte "
                f"{pointers[part][bad]} on, where {places[bad]} is its place; {AGAIN}"
            )
        done += int(sizes.sum())
        if done > most:
            break  # more than there is; sums of what follows might not fit a number
    documents = np.memmap(index, np.int64, "r", HEADER.size + 12 * count, (ends,)) if ends else np.zeros(1, np.int64)
    _check_documents(prefix, documents, count)
    return done


def _check_documents(prefix: Path, ends: np.ndarray, sequences: int) -> None:
    falls = any(_first(np.diff(ends[part.start : part.stop + 1]) < 0) is not None for part in _parts(len(ends)))
    if falls or ends[0] != 0 or ends[-1] != sequences:
        raise UserError(f"{prefix}: damaged: its document ends do not rise from 0 to {sequences}; {AGAIN}")


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _first(wrong: np.ndarray) -> int | None:
    """Where the first True is."""
    return int(np.argmax(wrong)) if wrong.any() else None


def check_tokens(prefix: Path, vocab_size: int) -> None:
    """UserError when an id in `PREFIX.bin`, which `open_indexed` has seen, has no embedding, or when it has changed.

    Of more than `LOOKED_AT` bytes nothing is read: `check_ids` looks at every window then.
    """
    binary, index, about = _files(prefix)
    if binary.stat().st_size > LOOKED_AT:
        return
    if about.is_file():
        _check_checksums(prefix, read_about(about).get("crc32", {}))
    ids = np.memmap(binary, _header(prefix, index).dtype, "r")
    for part in _parts(len(ids)):
        check_ids(ids[part], vocab_size, str(prefix))


def _check_checksums(prefix: Path, stated: dict[str, str]) -> None:
    """UserError when a file is not what `preprocess` has written."""
    for suffix, expected in stated.items():
        file = prefix.with_name(prefix.name + suffix)
        if suffix in CHECKED and checksum(file) != expected:
            raise UserError(f"{file} has changed since `preprocess` wrote it; {AGAIN}")


def _check_told(prefix: Path, about: About, header: Header, size: int) -> None:
    """UserError when what `preprocess` noted is of other text than the index with its `size` bytes of ids."""
    kind = np.dtype(header.dtype)
    found = {"documents": header.ends - 1, "tokens": size // kind.itemsize, "dtype": kind.name}
    for key, value in found.items():
        if about.get(key, value) != value:
            raise UserError(
                f"{prefix}: its .json says {key} {brief(about.get(key))}, its .idx {value}: they are not of one text; "
                "run `preprocess` again or copy all three files again"
            )


def _check_vocabulary(prefix: Path, about: About, vocab_size: int) -> None:
    """What `preprocess` noted: the largest id that it wrote, or in old files only what the tokenizer could give."""
    largest = about.get("largest_id")
    given = about.get("vocab_size", 0)
    if largest is not None:
        check_ids(largest, vocab_size, str(prefix))
    elif given > vocab_size:
        raise UserError(
            f"{prefix}: the tokenizer does not fit the model: it was preprocessed with a vocabulary of {given}, the"
            f" model's has {vocab_size}; preprocess it with the tokenizer that belongs to the model"
        )


def check_ids(ids: Any, vocab_size: int, source: str) -> None:
    """A `UserError` when an id read from `source` has no embedding: files of other tools say nothing about theirs."""
    found = np.asarray(ids)
    smallest, largest = (int(found.min()), int(found.max())) if found.size else (0, 0)
    if largest >= vocab_size or smallest < 0:
        raise UserError(
            f"{source}: the tokenizer does not fit the model: it holds the id {min(smallest, 0) or largest}, the"
            f" model's vocabulary has {vocab_size}; preprocess it with the tokenizer that belongs to the model"
        )
