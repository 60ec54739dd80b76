"""Files -> documents (strings). One reader for every verb.

A `.txt` file is one document; `.jsonl`, `.jsonl.gz`, `.jsonl.zst` and `.json.gz` (the form in which C4 is published)
hold one JSON object a line with the document under a key, `.parquet` a column of them. A byte order mark, at the start
of a file or of any line of JSON, is no part of a text. Everything wrong with a file is a `UserError` with its name and
line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

from megatron_prune.data.packed_text import DamagedZstd, ZstdStream, parquet_rows
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import open_regular, reason

T = TypeVar("T")

WHOLE = (".txt", ".raw")
"""Suffixes of files that are one document."""
PARQUET = ".parquet"
ZSTD = ".zst"
SUFFIXES = (*WHOLE, ".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", PARQUET)
PACKED = (".gz", ZSTD)
"""Of files that can only be read from their start."""
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a damaged gzip or zstandard file raises."""
MARK = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8, which text from Windows begins with."""
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""Of UTF-16; that of UTF-32 on most machines begins like them."""
LOOK = 4096
"""Bytes of a text in which zeros are counted, to tell UTF-16 without a mark."""
LONGEST_LINE = 2**29
"""Bytes."""
FETCH = "datasets.load_dataset({!r}, data_files=OLD, split='train').to_json(NEW)"
KINDS = {
    ".json": "with one object a line, name it .jsonl; an array becomes lines by jq -c '.[]' OLD > NEW",
    ".zst": "unpack it: zstd -d, or name it .jsonl.zst",
    ".xz": "unpack it: xz -d",
    ".bz2": "unpack it: bunzip2",
    ".zip": "unpack it: unzip",
    ".gz": "unpack it: gunzip",
    ".arrow": f"write it as lines: {FETCH.format('arrow')}",
    ".csv": f"write it as lines: {FETCH.format('csv')}",
    ".tsv": f"write it as lines: {FETCH.format('csv')} with sep='\\t'",
    ".md": "name it .txt",
}
"""Suffix of text in other forms -> what to do with it."""


class BadDocument(ValueError):
    """A line or file that holds no document, and why; its place is the reader's to add."""


class OverLimit(BadDocument):
    """A document that would take more time, memory or room than one may."""


class Form(Protocol):
    """How the row of a file, with its keys, becomes a document."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Under the first of these that a row has stands the document."""

    def document(self, record: Mapping[str, Any]) -> str:
        """The document of a row; `BadDocument` says what is wrong with it."""


@dataclass(frozen=True)
class Plain:
    """Rows with a text under a key; files that are one document are read as they are."""

    key: str = "text"

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.key,)

    def document(self, record: Mapping[str, Any]) -> str:
        """The text."""
        text = record.get(self.key)
        if not isinstance(text, str):
            key = brief(self.key)
            raise BadDocument(f"no text under the key {key}; expected an object such as {{{key}: '...'}}")
        return check_document(text)


TEXT = Plain()


def read_documents(paths: Sequence[Path | str], chosen: slice = slice(None), form: Form = TEXT) -> list[str]:
    """All documents of all files, in order, cut to `chosen`; at least one, or a `UserError`."""
    documents = [document for path in paths for document in iterate_documents(Path(path), form)][chosen]
    if not documents:
        names = ", ".join(map(str, paths)) or "no file"
        raise UserError(f"{names}: no document found; give text in {', '.join(SUFFIXES)}, and a range that holds some")
    return documents


def iterate_documents(path: Path, form: Form = TEXT) -> Iterator[str]:
    """Documents of one file, one at a time."""
    check_text_file(path)
    if path.name.endswith(WHOLE):
        check_whole(path, form)
        yield read_whole(path)
    elif path.suffix == PARQUET:
        yield from _of_parquet(path, form)
    else:
        yield from iterate_lines(path, lambda line: parse_line(line, form))


def check_whole(path: Path, form: Form) -> None:
    """UserError for a file without rows where rows of a form are wanted."""
    if not isinstance(form, Plain):
        rows = ", ".join(suffix for suffix in SUFFIXES if suffix not in WHOLE)
        raise UserError(f"--apply-chat-template: {path} is one document; allowed: rows with messages, in {rows}")


def read_whole(path: Path) -> str:
    """The text of a file that is one document; UserError when it is no UTF-8."""
    with open_text(path) as file:
        try:
            return decode(file.read())
        except BadDocument as error:
            raise UserError(f"{path}: {error}") from error


def _of_parquet(path: Path, form: Form) -> Iterator[str]:
    for number, document in enumerate(parquet_documents(path, form), start=1):
        if isinstance(document, BadDocument):
            raise UserError(f"{path}:{number}: {document}") from document
        yield document


def parquet_documents(path: Path, form: Form) -> Iterator[str | BadDocument]:
    """Documents of a Parquet file, row by row, bad ones in their places."""
    for record in parquet_rows(path, form.keys):
        try:
            if isinstance(record, ValueError):
                raise BadDocument(f"values that cannot be read ({record}); expected text in UTF-8") from record
            yield form.document(record)
        except BadDocument as error:
            yield error


def iterate_lines(path: Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    """What `parse` makes of each line that is not blank, packed file or not; UserError names file and line."""
    with open_text(path) as file:
        for number, line in enumerate(read_lines(file), start=1):
            try:
                if isinstance(line, BadDocument):
                    raise line
                if not is_blank(line):
                    yield parse(line)
            except BadDocument as error:
                raise UserError(f"{path}:{number}: {error}") from error


# --- bytes ---


def open_text(path: Path) -> IO[bytes]:
    """The unpacked bytes of an ordinary file, however long."""
    file: IO[bytes] = open_regular(path, "a folder of text", None)
    if path.suffix == ZSTD:
        return cast(IO[bytes], _Unpacked(ZstdStream(file)))
    return cast(IO[bytes], _Packed(file)) if path.suffix == ".gz" else file


class _Unpacked(io.BufferedReader):
    """A zstandard file, with lines."""

    raw: ZstdStream


class _Packed(gzip.GzipFile):
    """A gzip file that closes what it was made from."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self.packed = packed

    def close(self) -> None:
        super().close()
        self.packed.close()


def bytes_read(file: IO[bytes]) -> int:
    """How far a file of `open_text` has been read, in bytes on the disk."""
    if isinstance(file, _Unpacked):
        return file.raw.packed.tell()
    return file.packed.tell() if isinstance(file, _Packed) else file.tell()


def read_lines(file: IO[bytes]) -> Iterator[bytes | BadDocument]:
    """Lines with their ends; a bad document for one that is too long, and where a packed file is damaged."""
    try:
        while line := file.readline(LONGEST_LINE):
            if len(line) < LONGEST_LINE or line.endswith(b"\n"):
                yield line
            else:
                while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                yield BadDocument(f"a line of more than {LONGEST_LINE} bytes; divide it")
    except DAMAGED as error:
        kind, end = ("zstandard", ZSTD) if isinstance(error, DamagedZstd) else ("gzip", ".gz")
        yield BadDocument(
            f"damaged {kind} file from here on ({reason(error)}); fetch it again, or name it without {end}"
        )


def is_blank(line: bytes) -> bool:
    """Whether nothing stands in a line."""
    return not line.removeprefix(MARK).strip()


def decode(data: bytes) -> str:
    """UTF-8, byte-exact but for a byte order mark in front: line ends stay as they are; otherwise `BadDocument`."""
    if data.startswith(WIDE_MARKS) or _is_wide(data[:LOOK]):
        raise BadDocument("UTF-16 text, or none; expected UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    try:
        return data.removeprefix(MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(f"not UTF-8 text ({reason(error)}); expected UTF-8, from Latin-1: iconv -f LATIN1") from error


def _is_wide(data: bytes) -> bool:
    """Whether every second byte or so is zero, as in English of UTF-16."""
    return data.count(0) > max(3, len(data) // 4)


# --- checks ---


def check_text_file(path: Path) -> None:
    """A `UserError` unless `path` is an ordinary file of a known kind."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}; give files of text")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give text in {', '.join(SUFFIXES)}")
    if not path.name.endswith(SUFFIXES):
        known = next((KINDS[suffix] for suffix in KINDS if path.name.lower().endswith(suffix)), None)
        advice = f"; {known}" if known else ""
        raise UserError(f"{path}: unknown kind of text; allowed: {', '.join(SUFFIXES)}{advice}")


def hash_files(paths: Sequence[Path | str]) -> str:
    """SHA-256 over the contents of the files, in order; a missing file is a `UserError`."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        check_text_file(path)
        with open_regular(path, "a folder of text", None) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- lines of JSON ---


def parse_line(line: bytes, form: Form = TEXT) -> str:
    """The document in a line that is one JSON object; `BadDocument` says what is wrong with the line."""
    return form.document(parse_object(line, form.keys))


def parse_object(line: bytes, once: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON object in a line, whose keys `once` may not stand twice; `BadDocument` says what is wrong."""
    words = decode(line)
    try:
        record = json.loads(words, object_pairs_hook=_Unique(once) if once else None)
    except (ValueError, RecursionError) as error:
        _refuse_array(words)
        raise BadDocument(f"not JSON ({reason(error)}); expected one object a line") from error
    if not isinstance(record, dict):
        _refuse_array(words)
        raise BadDocument(f"no object but {brief(record)}; expected one JSON object a line")
    return record


def _refuse_array(words: str) -> None:
    if words.lstrip().startswith("["):
        raise BadDocument("a JSON array; expected one object a line: jq -c '.[]' OLD > NEW")


class _Unique:
    """Makes JSON objects, and refuses one that has one of certain keys twice."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            given = [key for key, _ in pairs]
            for key in self.keys:
                if given.count(key) > 1:
                    raise ValueError(f"the key {brief(key)} is given twice")
        return found


def check_document(text: str) -> str:
    """`text`, when it is Unicode; `BadDocument` otherwise."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocument(f"not Unicode text ({reason(error)})") from error
    return text
