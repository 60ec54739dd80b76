"""The input of `preprocess`, cut into pieces that different processes can read, and the documents of a piece.

A plain `.jsonl` file is cut between lines; a gzip file and a whole-document file are one piece, because they can only
be read from their start. `hub:NAME[:CONFIG[:SPLIT]]` names a data set on the Hugging Face hub, streamed, one piece per
file that it consists of; nothing else in the input ever reaches the network. A bad line is yielded like a document.
"""

from __future__ import annotations

import gc
import gzip
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_prune.data.text import DAMAGED_GZIP, WHOLE, BadDocument, check_text_file, decode, parse_line
from megatron_prune.errors import UserError

HUB = "hub:"
Entry = tuple[int, str | BadDocument | None]
"""Number of a line in its piece, from 1, and what it holds; None for a blank line."""


@dataclass(frozen=True)
class Piece:
    """Lines of `source` that begin at bytes [start, stop); of a hub data set, file `start` of `stop`."""

    source: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """What a report calls it; lines are numbered within."""
        return f"{self.source}[{self.start}]" if self.source.startswith(HUB) else self.source

    @property
    def size(self) -> int:
        """Bytes to read; a file on the hub counts as one, its size is unknown."""
        return 1 if self.source.startswith(HUB) else self.stop - self.start


def cut(source: str, limit: int) -> list[Piece]:
    """The pieces of one input in order, of at most `limit` bytes where it can be cut."""
    if source.startswith(HUB):
        count = _in_child(_hub_files, source)
        return [Piece(source, index, count) for index in range(count)]
    path = Path(source)
    check_text_file(path)
    size = path.stat().st_size
    if path.suffix == ".gz" or path.name.endswith(WHOLE):
        return [Piece(source, 0, size)]
    return [Piece(source, start, min(start + limit, size)) for start in range(0, size, limit)]


def gather(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Neighbouring pieces in lists of at most `limit` bytes, so that many small files make no more work than one."""
    parts: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not parts or piece.size > room or piece.source.startswith(HUB):
            parts.append([])
            room = limit
        parts[-1].append(piece)
        room -= piece.size
    return parts


def read(piece: Piece, key: str, consumed: Callable[[int], None]) -> Iterator[Entry]:
    """Documents and bad lines of a piece in order; `consumed` is told how many bytes were read."""
    path = Path(piece.source)
    if piece.source.startswith(HUB):
        yield from _read_hub(piece, key)
        consumed(piece.size)
    elif path.name.endswith(WHOLE):
        yield 1, _or_bad(decode, path.read_bytes())
        consumed(piece.size)
    else:
        lines = _gzip_lines(path, consumed) if path.suffix == ".gz" else _lines(piece, consumed)
        for number, line in enumerate(lines, start=1):
            if isinstance(line, BadDocument):
                yield number, line
            elif line.strip():
                yield number, _or_bad(parse_line, line, key)
            else:
                yield number, None


def _or_bad(function: Callable[..., str], *arguments: Any) -> str | BadDocument:
    try:
        return function(*arguments)
    except BadDocument as error:
        return error


def _lines(piece: Piece, consumed: Callable[[int], None]) -> Iterator[bytes]:
    """Lines that begin inside the piece; the last may end beyond it."""
    with open(piece.source, "rb") as file:
        position = piece.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < piece.stop and (line := file.readline()):
            position += len(line)
            consumed(len(line))
            yield line


def lines_before(piece: Piece) -> int:
    """Number of lines of the file that belong to earlier pieces."""
    if piece.source.startswith(HUB):
        return 0
    return sum(1 for _ in _lines(Piece(piece.source, 0, piece.start), lambda _: None))


def _gzip_lines(path: Path, consumed: Callable[[int], None]) -> Iterator[bytes | BadDocument]:
    """Lines of a gzip file up to where it is damaged, and then that as a bad line."""
    told = 0
    with path.open("rb") as packed, gzip.open(packed) as file:
        try:
            for line in file:
                consumed(packed.tell() - told)
                told = packed.tell()
                yield line
        except DAMAGED_GZIP as error:
            yield BadDocument(f"damaged gzip file from here on ({error}); fetch it again")


# --- hub ---


def _in_child(function: Callable[[str], int], argument: str) -> int:
    """Call in a process of its own: streaming starts threads, which must not be there when workers are forked."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=gc.freeze) as pool:
        return pool.submit(function, argument).result()


def _hub_files(source: str) -> int:
    return int(_open_hub(source).num_shards)


def _open_hub(source: str) -> Any:
    """The streamed data set; without a network, or without such a data set, a `UserError`."""
    from datasets import load_dataset

    name, config, split, *rest = [*source.removeprefix(HUB).split(":"), "", ""]
    if not name or any(rest):
        raise UserError(f"--input: {source!r} given; allowed: {HUB}NAME, {HUB}NAME:CONFIG or {HUB}NAME:CONFIG:SPLIT")
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--input: {source!r} cannot be streamed ({error}); check its name and the network, or give local files"
        ) from error


def _read_hub(piece: Piece, key: str) -> Iterator[Entry]:
    rows = _open_hub(piece.source).shard(num_shards=piece.stop, index=piece.start)
    for number, row in enumerate(rows, start=1):
        text = row.get(key)
        yield number, text if isinstance(text, str) else BadDocument(f"no text under the key {key!r}")
