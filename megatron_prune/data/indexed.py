"""Opens preprocessed text, `PREFIX.bin` and `PREFIX.idx`, after a look at whether it is whole and fits the model.

megatron-core's reader maps both files into memory and trusts them: a truncated file is an assertion or a crash there,
here it is the user's error. Arrays that the data set returns are views that must not outlive it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import megatron_prune.backend  # noqa: F401  # isort: skip  (before megatron.core)
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_prune.data.text import SUFFIXES
from megatron_prune.errors import UserError
from megatron_prune.files import read_json

HEADER = struct.Struct("<9sQBQQ")
"""Of an index file: magic, version, type of the ids, sequences, document ends."""
MAGIC = b"MMIDIDX\0\0"


def open_indexed(prefix: Path, vocab_size: int) -> IndexedDataset:
    """The data set at `prefix`, whole, not empty and made by a tokenizer of at most `vocab_size` ids."""
    binary, index, about = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json"))
    for file in (binary, index):
        if not file.is_file():
            raise UserError(
                f"{prefix}: {file} does not exist; give text in {', '.join(SUFFIXES)}, or a prefix from `preprocess`"
            )
    if not _is_whole(index) or not binary.stat().st_size:
        raise UserError(f"{prefix}: empty or damaged; run `preprocess` again or copy both files again")
    dataset = IndexedDataset(str(prefix))
    end = int(dataset.index.sequence_pointers[-1]) + int(dataset.sequence_lengths[-1]) * DType.size(dataset.index.dtype)
    if binary.stat().st_size != end:
        raise UserError(f"{binary}: {binary.stat().st_size} bytes, its index describes {end}; copy both files again")
    if about.is_file():
        _check_vocabulary(prefix, read_json(about, "preprocessed text").get("vocab_size", 0), vocab_size)
    return dataset


def _is_whole(index: Path) -> bool:
    """Whether an index file has the size that its header promises."""
    with index.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return False
    magic, version, code, sequences, ends = HEADER.unpack(header)
    known = magic == MAGIC and version == 1 and code in [kind.value for kind in DType]
    return known and sequences > 0 and index.stat().st_size == HEADER.size + sequences * (4 + 8) + ends * 8


def _check_vocabulary(prefix: Path, given: int, vocab_size: int) -> None:
    if given > vocab_size:
        raise UserError(
            f"{prefix}: the tokenizer does not fit the model: it was preprocessed with a vocabulary of {given}, the"
            f" model's has {vocab_size}; preprocess it with the tokenizer that belongs to the model"
        )


def check_ids(largest: int, vocab_size: int, source: str) -> None:
    """A `UserError` when an id read from `source` has no embedding: files of other tools say nothing about theirs."""
    if largest >= vocab_size:
        raise UserError(
            f"{source}: the tokenizer does not fit the model: it holds the id {largest}, the model's vocabulary has"
            f" {vocab_size}; preprocess it with the tokenizer that belongs to the model"
        )
