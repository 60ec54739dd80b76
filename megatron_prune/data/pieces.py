"""The input of `preprocess`, cut into pieces that different processes can read, and the documents of a piece.

A plain `.jsonl` file is cut between lines; a packed file, a Parquet file and a file that is one document are one piece
read from its start. `hub:NAME[:CONFIG[:SPLIT]]` names a data set on the Hugging Face hub, streamed,
one piece per file that it consists of; nothing else in the input ever reaches the network. A bad line is yielded like a
document.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_prune.data.text import (
    PACKED,
    PARQUET,
    TEXT,
    WHOLE,
    BadDocument,
    Form,
    bytes_read,
    check_text_file,
    check_whole,
    decode,
    is_blank,
    open_text,
    parquet_documents,
    parse_line,
    read_lines,
)
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import fenced

HUB = "hub:"
HUB_NAME = re.compile(r"hub:\w[\w.-]*(/\w[\w.-]*)?(:[^:/\s]*){0,2}")
HUB_SECONDS = 8
HUB_ADVICE = "check its name and the network, or give local files"
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


def cut(source: str, limit: int, form: Form = TEXT) -> list[Piece]:
    """The pieces of one input in order, of at most `limit` bytes where it can be cut."""
    if source.startswith(HUB):
        count = _in_child(_hub_files, source)
        return [Piece(source, index, count) for index in range(count)]
    path = Path(source)
    check_text_file(path)
    if path.name.endswith(WHOLE):
        check_whole(path, form)
    size = path.stat().st_size
    if path.suffix in (*PACKED, PARQUET) or path.name.endswith(WHOLE):
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


def read(piece: Piece, form: Form, consumed: Callable[[int], None]) -> Iterator[Entry]:
    """Documents and bad lines of a piece in order; `consumed` is told how many bytes were read."""
    path = Path(piece.source)
    if piece.source.startswith(HUB):
        yield from _read_hub(piece, form)
        consumed(piece.size)
    elif path.name.endswith(WHOLE):
        with open_text(path) as file:
            yield 1, _or_bad(decode, file.read())
        consumed(piece.size)
    elif path.suffix == PARQUET:
        yield from enumerate(parquet_documents(path, form), start=1)
        consumed(piece.size)
    else:
        for number, line in enumerate(_lines(piece, consumed), start=1):
            if isinstance(line, BadDocument):
                yield number, line
            else:
                yield number, None if is_blank(line) else _or_bad(parse_line, line, form)


def _or_bad(function: Callable[..., str], *arguments: Any) -> str | BadDocument:
    try:
        return function(*arguments)
    except BadDocument as error:
        return error


def _lines(piece: Piece, consumed: Callable[[int], None]) -> Iterator[bytes | BadDocument]:
    """Lines that begin inside the piece; the last may end beyond it."""
    cuttable = not piece.source.endswith(PACKED)
    with open_text(Path(piece.source)) as file:
        if piece.start:
            file.seek(piece.start - 1)
            next(read_lines(file), None)
        position = bytes_read(file)
        for line in read_lines(file):
            if cuttable and position >= piece.stop:
                return
            now = bytes_read(file)
            consumed(now - position)
            position = now
            yield line


def lines_before(piece: Piece) -> int:
    """Number of lines of the file that belong to earlier pieces."""
    if piece.source.startswith(HUB) or not piece.start:
        return 0
    return sum(1 for _ in _lines(Piece(piece.source, 0, piece.start), lambda _: None))


# --- hub ---


def _in_child(function: Callable[[str], int], argument: str) -> int:
    """Call in a process of its own: streaming starts threads, which must not be there when workers are forked."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=gc.freeze) as pool:
        return pool.submit(function, argument).result()


def _hub_files(source: str) -> int:
    check_hub(source)
    return int(open_hub(source).num_shards)


def check_hub(source: str, given: str = "--input", advice: str = HUB_ADVICE) -> None:
    """A UserError when the name cannot be one, or when the hub does not answer: its library would ask on and on."""
    from huggingface_hub import HfApi, constants

    name = source.removeprefix(HUB).split(":")[0]
    if name and Path(name).is_dir():  # a data set on this machine, which the library reads as well
        return
    if not HUB_NAME.fullmatch(source):
        raise UserError(
            f"{given}: {brief(source)} given; allowed: {HUB}NAME, {HUB}NAME:CONFIG or {HUB}NAME:CONFIG:SPLIT"
        )
    if not constants.HF_HUB_OFFLINE:
        with fenced(f"{given}: {source!r} cannot be streamed", advice):
            HfApi().dataset_info(name, timeout=HUB_SECONDS)


def open_hub(source: str, given: str = "--input", advice: str = HUB_ADVICE) -> Any:
    """The streamed data set; without a network, or without such a data set, a `UserError`."""
    from datasets import load_dataset

    name, config, split, *_ = [*source.removeprefix(HUB).split(":"), "", ""]
    with fenced(f"{given}: {source!r} cannot be streamed", advice):
        return load_dataset(name, config or None, split=split or "train", streaming=True)


def _read_hub(piece: Piece, form: Form) -> Iterator[Entry]:
    with fenced(f"--input: {piece.source!r} cannot be read on", HUB_ADVICE):
        rows = open_hub(piece.source).shard(num_shards=piece.stop, index=piece.start)
        for number, row in enumerate(rows, start=1):
            yield number, _or_bad(form.document, row)
