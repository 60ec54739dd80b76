"""Files -> documents (strings), and the tokenizer that a checkpoint brings along.

A `.txt` file is one document; `.jsonl`, `.jsonl.gz` and `.json.gz` (the form in which C4 is published) hold
one JSON object a line with the document under a key. Everything wrong with a file is a `UserError` with its
name and line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prune.errors import UserError

WHOLE = (".txt", ".raw")
"""Suffixes of files that are one document."""
SUFFIXES = (*WHOLE, ".jsonl", ".jsonl.gz", ".json.gz")
DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a damaged gzip file raises."""


def read_documents(paths: Sequence[Path | str], chosen: slice = slice(None), key: str = "text") -> list[str]:
    """All documents of all files, in order, cut to `chosen`; at least one, or a `UserError`."""
    documents = [document for path in paths for document in iterate_documents(Path(path), key)][chosen]
    if not documents:
        names = ", ".join(map(str, paths)) or "no file"
        raise UserError(f"{names}: no document found; give text in {', '.join(SUFFIXES)}, and a range that holds some")
    return documents


class BadDocument(ValueError):
    """A line or file that holds no document, and why; its place is the reader's to add."""


def iterate_documents(path: Path, key: str = "text") -> Iterator[str]:
    """Documents of one file, one at a time."""
    check_text_file(path)
    place = str(path)
    try:
        if path.name.endswith(WHOLE):
            yield decode(path.read_bytes())
            return
        for number, line in enumerate(_lines(path), start=1):
            place = f"{path}:{number}"
            if line.strip():
                yield parse_line(line, key)
    except BadDocument as error:
        raise UserError(f"{place}: {error}") from error


def check_text_file(path: Path) -> None:
    """A `UserError` unless `path` is a file of a known kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give text in {', '.join(SUFFIXES)}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of text; allowed: {', '.join(SUFFIXES)}")


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except DAMAGED_GZIP as error:
            raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from error


def parse_line(line: bytes, key: str) -> str:
    """The document under `key` of one JSON object; `BadDocument` says what is wrong with the line."""
    words = decode(line)
    try:
        record = json.loads(words)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"not JSON ({error}); expected one object a line") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadDocument(f"no text under the key {key!r}; expected an object such as {{{key!r}: '...'}}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocument(f"not Unicode text ({error})") from error
    return text


def decode(data: bytes) -> str:
    """UTF-8, byte-exact: line ends stay as they are; otherwise `BadDocument`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(f"not UTF-8 text ({error})") from error


def hash_files(paths: Sequence[Path | str]) -> str:
    """SHA-256 over the contents of the files, in order; a missing file is a `UserError`."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file; give text in {', '.join(SUFFIXES)}")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
