"""One reader of text: what a file may look like, and that every verb reads it so."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.config import PreprocessConfig
from megatron_prune.data import pieces, preprocess, text
from megatron_prune.data.calibration import windows
from megatron_prune.data.dataset import TokenWindows, evaluation_windows
from megatron_prune.data.text import TEXT, hash_files, read_documents
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.evaluation import local_tasks
from tests.models import byte_tokenizer

MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def lines(*texts: str, end: bytes = b"\n") -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + end for text in texts)


def in_pieces(file: Path, limit: int) -> list[str]:
    """The documents as `preprocess` reads them, from a file cut at every `limit` bytes."""
    entries = [entry for piece in pieces.cut(str(file), limit) for _, entry in pieces.read(piece, TEXT, lambda _: None)]
    bad = [entry for entry in entries if isinstance(entry, text.BadDocument)]
    if bad:
        raise bad[0]
    return [entry for entry in entries if isinstance(entry, str)]


PACKED = gzip.compress(MARK + lines("a")) + gzip.compress(MARK + lines("b"))
GOOD: dict[str, tuple[str, bytes, list[str]]] = {
    "mark before a text": ("a.txt", MARK + b"one\r\ntwo", ["one\r\ntwo"]),
    "mark before lines": ("a.jsonl", MARK + lines("a", "b"), ["a", "b"]),
    "mark before packed lines": ("a.jsonl.gz", gzip.compress(MARK + lines("a", "b")), ["a", "b"]),
    "mark in each of several packed members": ("a.json.gz", PACKED, ["a", "b"]),
    "marks where files were joined": ("a.jsonl", MARK + lines("a") + MARK + lines("b") + MARK, ["a", "b"]),
    "nothing but a mark": ("a.jsonl", lines("a") + b"\n" + MARK + b"\r\n", ["a"]),
    "a mark inside a document": ("a.jsonl", lines("a\ufeff"), ["a\ufeff"]),
    "lines of Windows": ("a.jsonl", MARK + lines("a", "b", end=b"\r\n"), ["a", "b"]),
    "blank lines": ("a.jsonl", b"\n \t\r\n" + lines("a") + b"\n\n", ["a"]),
    "no end of the last line": ("a.jsonl", lines("a", "b")[:-1], ["a", "b"]),
    "line separators of Unicode": ("a.jsonl", '{"text": "a\u2028b\u0085"}\n'.encode(), ["a\u2028b\u0085"]),
    "a NUL": ("a.jsonl", lines("a\0b"), ["a\0b"]),
    "a few NULs": ("a.txt", b"a\0b", ["a\0b"]),
    "other keys twice": ("a.jsonl", b'{"id": 1, "id": 2, "text": "a"}\n', ["a"]),
    "an emoji in two halves": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "numbers without measure": ("a.jsonl", b'{"n": 1e999, "m": NaN, "text": "a"}\n', ["a"]),
}


@pytest.mark.parametrize(("name", "content", "documents"), GOOD.values(), ids=GOOD.keys())
def test_documents(tmp_path: Path, name: str, content: bytes, documents: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_documents([tmp_path / name]) == documents
    for limit in (1, 2, 3, 5, 11, 1000):
        assert in_pieces(tmp_path / name, limit) == documents, limit


BAD: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.txt", "one two".encode("utf-16"), "UTF-16 text.*iconv -f UTF-16"),
    "UTF-16 the other way": ("a.txt", b"\xfe\xff" + "one two".encode("utf-16-be"), "UTF-16 text"),
    "UTF-16 without a mark": ("a.txt", "one two".encode("utf-16-le"), "UTF-16 text"),
    "UTF-16 lines": ("a.jsonl", lines("a").decode().encode("utf-16"), "UTF-16 text"),
    "UTF-32": ("a.txt", "one two".encode("utf-32"), "UTF-16 text, or none"),
    "Latin-1": ("a.txt", "caf\xe9 au lait".encode("latin-1"), "not UTF-8 text.*LATIN1"),
    "an array": ("a.jsonl", b'[{"text": "a"}]\n', "a JSON array; expected one object a line: jq"),
    "an array of lines": ("a.jsonl", MARK + b'\n[\n{"text": "a"},\n{"text": "b"}\n]\n', "a JSON array"),
    "an object over several lines": ("a.jsonl", b'{\n"text": "a"\n}\n', "not JSON"),
    "the document twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', "the key 'text' is given twice"),
    "half an emoji": ("a.jsonl", b'{"text": "\\ud83d"}\n', "not Unicode text"),
    "a long number": ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "not JSON"),
    "a deep line": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "not JSON"),
    "a deep and whole line": ("a.jsonl", b'{"a": ' + b"[" * 9999 + b"]" * 9999 + b"}\n", "not JSON"),
    "a number": ("a.jsonl", b"5\n", "no object but 5"),
    "no gzip": ("a.jsonl.gz", lines("a"), "damaged gzip file.*name it without .gz"),
    "gzip and something behind": ("a.json.gz", gzip.compress(lines("a")) + b"behind", "damaged gzip"),
    "a number as document": ("a.jsonl", b'{"text": 5}\n', "no text under the key 'text'"),
}


@pytest.mark.parametrize(("name", "content", "part"), BAD.values(), ids=BAD.keys())
def test_bad_documents(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*: .*{part}") as caught:
        read_documents([tmp_path / name])
    assert len(str(caught.value)) < 450
    with pytest.raises(text.BadDocument, match=part):
        in_pieces(tmp_path / name, 10**9)


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a folder": ("a.txt", Path.mkdir, "is a folder; give files"),
    "a pipe": ("a.jsonl", os.mkfifo, "is no ordinary file"),
    "a device": ("a.jsonl", lambda path: path.symlink_to("/dev/zero"), "is no ordinary file"),
    "a socket": ("a.txt", lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "is no ordinary file"),
    "a link to nothing": ("a.txt", lambda path: path.symlink_to("nothing"), "no such file"),
    "a link to itself": ("a.txt", lambda path: path.symlink_to(path), "no such file|cannot be opened"),
    "an array": ("a.json", Path.touch, "name it .jsonl; an array becomes lines by jq"),
    "Arrow": ("a.arrow", Path.touch, "'arrow'"),
    "CSV": ("a.CSV", Path.touch, "'csv'"),
    "zstd": ("a.txt.zst", Path.touch, "zstd -d"),
    "bzip2": ("a.jsonl.bz2", Path.touch, "bunzip2"),
    "a packed text": ("a.txt.gz", Path.touch, "gunzip"),
    "a name without an end": ("text", Path.touch, "unknown kind of text; allowed"),
}


@pytest.mark.parametrize(("name", "make", "part"), FILES.values(), ids=FILES.keys())
def test_files_that_are_no_text(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[Path], Any],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    make(Path(name))
    loaded = load_tokenizer(tokenizer)
    config = PreprocessConfig(input=(name,), output=tmp_path / "out", tokenizer=tokenizer, workers=1)
    readers: list[Callable[[], Any]] = [
        lambda: read_documents([name]),
        lambda: hash_files([name]),
        lambda: evaluation_windows(name, loaded, 8),
        lambda: TokenWindows([name], loaded, 8, 0, cache=tmp_path),
        lambda: preprocess.preprocess(config),
        lambda: windows([name], loaded, 1, 8, 0),
    ]
    for read in readers:
        began = time.monotonic()
        with pytest.raises(UserError, match=part):
            read()
        assert time.monotonic() - began < 5
    assert not list(tmp_path.glob("out*"))


def test_every_verb_reads_a_file_from_windows(tmp_path: Path, tokenizer: Path) -> None:
    """Two documents with marks and Windows' line ends give the ids of the same documents without."""
    loaded = load_tokenizer(tokenizer)
    texts = ["the cat sat on the mat", "the dog had bones " * 3]
    results = []
    for name, content in (("plain", lines(*texts)), ("windows", MARK + lines(*texts, end=b"\r\n"))):
        file = tmp_path / name / "a.jsonl"
        file.parent.mkdir()
        file.write_bytes(content)
        prefix = tmp_path / name / "a"
        preprocess.preprocess(PreprocessConfig(input=(str(file),), output=prefix, tokenizer=tokenizer, workers=1))
        results.append(
            (
                prefix.with_suffix(".bin").read_bytes(),
                prefix.with_suffix(".idx").read_bytes(),
                windows([file], loaded, 3, 8, 0).sha256,
                evaluation_windows(file, loaded, 8).tokens.tolist(),
                TokenWindows([file], loaded, 8, 0, cache=tmp_path).tokens.tolist(),
                local_tasks._objects(file),
            )
        )
    assert results[0] == results[1]


def test_rows_and_articles_of_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(MARK + b'{"a": 1}\r\n\r\n{"a": 2}')
    assert local_tasks._objects(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "wiki.raw").write_bytes(MARK + b" = Title = \n\n text\n")
    assert local_tasks._articles(tmp_path / "wiki.raw")[0]["page"].startswith(" = Title = ")
    for content, part in ((b"[]\n", "a JSON array"), (b"5\n", "no object but 5"), (b"{" * 9999, "not JSON")):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=f"a.jsonl:1: {part}"):
            local_tasks._objects(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="no ordinary file"):
        local_tasks._objects(tmp_path / "pipe.jsonl")


def test_a_line_of_a_hundred_megabytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"a " * 50_000_000 + b'"}\n' + lines("b"))
    assert [len(document) for document in read_documents([tmp_path / "a.jsonl"])] == [100_000_000, 1]
    assert [len(document) for document in in_pieces(tmp_path / "a.jsonl", 8 * 2**20)] == [100_000_000, 1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_longer_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(text, "LONGEST_LINE", 64)
    content = lines("a", "b" * 300, "c", "d" * (64 - len(lines("")) + 1))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=f"{name}:2: a line of more than 64 bytes"):
        read_documents([tmp_path / name])
    for limit in (1, 7, 64, 1000):
        entries = [
            entry
            for piece in pieces.cut(str(tmp_path / name), limit)
            for _, entry in pieces.read(piece, TEXT, lambda _: None)
        ]
        assert [str(entry)[:6] for entry in entries] == ["a", "a line", "c", "a line"], limit


def test_random_bytes_never_escape(tmp_path: Path) -> None:
    """Whatever stands in a file, it is documents or one line."""
    draw = random.Random(5)
    parts = [MARK, b"\n", b"\r\n", b"\0", b"{", b"}", b"[", b'"text"', b":", b'"a"', b"\xff\xfe", b"\\ud83d", b"9" * 50]
    for number in range(300):
        name = draw.choice(["a.txt", "a.jsonl", "a.jsonl.gz"])
        content = b"".join(draw.choices(parts, k=draw.randrange(1, 12)))
        if name.endswith(".gz") and number % 2:
            content = gzip.compress(content)[: draw.randrange(40)]
        (tmp_path / name).write_bytes(content)
        for read in (lambda file: read_documents([file]), lambda file: in_pieces(file, 5)):
            try:
                read(tmp_path / name)
            except (UserError, text.BadDocument) as error:
                assert len(str(error)) < 450 and "\n" not in str(error)


# --- the hub ---


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    yield


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_told_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="'hub:nobody/nothing' cannot be streamed .*check its name and the network"):
        pieces.check_hub("hub:nobody/nothing")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "name", ["hub:", "hub:/nothing", "hub:../nothing", "hub:a/b/c", "hub:a:b:c:d", "hub:a b", "hub:./nothing", "hub:~"]
)
def test_names_that_no_hub_has(name: str) -> None:
    with pytest.raises(UserError, match="allowed: hub:NAME"):
        pieces.cut(name, 100)
