"""Reading documents and tokenizers; each thing that can be wrong with a file is one line with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_prune.data.text import Plain, hash_files, read_documents
from megatron_prune.data.tokenizer import check_tokenizer, load_tokenizer, tokenize
from megatron_prune.errors import UserError


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in texts).encode()


def test_documents_of_all_kinds_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é\n".encode())
    (tmp_path / "b.jsonl").write_bytes(jsonl("three", "four") + b"\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl("five")))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(jsonl("six")))
    files = sorted(tmp_path.iterdir())
    assert read_documents(files) == ["one\r\ntwo é\n", "three", "four", "five", "six"]
    assert read_documents(files, slice(1, 3)) == ["three", "four"]
    assert read_documents([tmp_path / "b.jsonl"], form=Plain("body")) == ["THREE", "FOUR"]


def zstandard(path: Path, data: bytes) -> Path:
    """A packed file, by pyarrow."""
    with pyarrow.output_stream(path, compression="zstd") as stream:
        stream.write(data)
    return path


def test_zstandard_and_parquet(tmp_path: Path) -> None:
    """As the same lines in a plain file; more rows than are held at a time, and more bytes than are read at a time."""
    texts = [f"{number} é " * 40 for number in range(2500)]
    (tmp_path / "plain.jsonl").write_bytes(jsonl(*texts))
    zstandard(tmp_path / "a.jsonl.zst", jsonl(*texts))
    parquet.write_table(pyarrow.table({"text": texts, "body": texts[::-1]}), tmp_path / "a.parquet")
    expected = read_documents([tmp_path / "plain.jsonl"])
    assert expected == texts
    assert read_documents([tmp_path / "a.jsonl.zst"]) == read_documents([tmp_path / "a.parquet"]) == expected
    assert read_documents([tmp_path / "a.parquet"], slice(0, 1), Plain("body")) == texts[-1:]
    packed = (tmp_path / "a.jsonl.zst").read_bytes()
    (tmp_path / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "holes.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), tmp_path / "nothing.parquet")
    latin = pyarrow.array([b"x", b"\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    for name, part in (
        ("cut.jsonl.zst", "damaged zstandard"),
        ("holes.parquet", "holes.parquet:2: no text under the key 'text'"),
        ("nothing.parquet", "nothing.parquet:1: no text under the key 'text'"),
        ("latin.parquet", "latin.parquet:2: values that cannot be read .* expected text in UTF-8"),
        ("a.parquet", "no column 'none'; its columns are 'text', 'body'"),
    ):
        with pytest.raises(UserError, match=part):
            read_documents([tmp_path / name], form=Plain("none" if name == "a.parquet" else "text"))


MISTAKES = {
    "no JSON": ("a.jsonl", jsonl("x") + b"{oops}\n", "a.jsonl:2: not JSON"),
    "no object": (
        "a.jsonl",
        jsonl("x", "y") + b'"z"\n',
        "a.jsonl:3: no object but 'z'; expected one JSON object",
    ),
    "other key": ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: no text under the key 'text'"),
    "text is no string": ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: no text"),
    "no UTF-8 line": ("a.jsonl", jsonl("x") + b'{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
    "no UTF-8 file": ("a.txt", b"\xff", "a.txt: not UTF-8"),
    "no gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz:1: damaged gzip"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(jsonl("x" * 999))[:40], "damaged gzip"),
    "unknown kind": ("a.arrow", b"", "allowed: .txt, .raw, .jsonl"),
    "no zstandard": ("a.jsonl.zst", b"{}", "a.jsonl.zst:1: damaged zstandard"),
    "no Parquet": ("a.parquet", b"PAR1", "a.parquet is no Parquet file"),
    "empty": ("a.jsonl", b"\n", "no document found"),
}


@pytest.mark.parametrize(("name", "content", "part"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_file_and_line(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_documents([tmp_path / name])
    assert part in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    for function in (read_documents, hash_files):
        with pytest.raises(UserError, match="no such file"):
            function([tmp_path / "nothing.txt"])


def test_a_range_that_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("x"))
    with pytest.raises(UserError, match="no document found"):
        read_documents([tmp_path / "a.jsonl"], slice(5, 9))


def test_hash_tells_contents_and_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("1")
    b.write_text("2")
    assert len({hash_files([a]), hash_files([b]), hash_files([a, b]), hash_files([b, a])}) == 4


def small_tokenizer(size: int) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0} | {f"w{number}": number for number in range(1, size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<unk>")))


def test_tokenizer_that_does_not_fit() -> None:
    check_tokenizer(small_tokenizer(8), 8)
    with pytest.raises(UserError, match="does not fit the model: its ids reach 8, the model's vocabulary has 8"):
        check_tokenizer(small_tokenizer(9), 8)


def test_load_tokenizer(tmp_path: Path) -> None:
    small_tokenizer(8).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, 8)
    assert tokenize(loaded, ["w3"]) == [[3]]
    with pytest.raises(UserError, match="does not fit"):
        load_tokenizer(tmp_path, 7)


def test_tokenizer_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer found"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="does not load"):
        load_tokenizer(tmp_path)
