"""What comes from outside is read whole and in shape, or is one line that names the file, the key and the cure."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import LONGEST, UserError, brief, one_line
from megatron_prune.foreign import fenced, parse_json, quiet, read_json, read_regular, read_yaml, strict


@dataclass
class Shape:
    """A schema."""

    __pydantic_config__ = strict()
    count: int
    rate: float = 0.0
    files: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"count": "1"}', "'count': '1' given"),
        ('{"count": true}', "'count': True given"),
        ('{"count": 1.5}', "'count': 1.5 given"),
        ("{}", "'count'"),
        ("[]", "object"),
        ("null", "object"),
        ('{"count": 1, "more": 2}', "'more'"),
        ('{"count": 1, "count": 2}', "twice"),
        ('{"count": 1, "rate": NaN}', "'rate'"),
        ('{"count": 1, "rate": 1e999}', "'rate'"),
        ('{"count": 1, "files": ["a", 1]}', "'files.1'"),
        ('{"count": 1, "files": "a"}', "'files'"),
        ('{"a": "\\ud800"}', "Unicode"),
        ('{"a\\u0000": 1}', "NUL"),
        ("[" * 100_000, "recursion"),
        ('{"count": %s}' % ("9" * 5000), "5000 digits"),
        ('{"%s": 1}' % ("k" * 100_000), "'count'"),
        ("", "damaged"),
        ("{", "damaged"),
    ],
)
def test_json_of_another_shape_is_one_short_line(text: str, word: str) -> None:
    with pytest.raises(UserError, match="some.json") as caught:
        parse_json(text.encode(), "some.json", Shape)
    assert word in str(caught.value)
    assert len(str(caught.value)) <= LONGEST and "\n" not in str(caught.value)


def test_json_of_the_right_shape_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"count": 1, "rate": 2, "files": ["a"]}')
    assert read_json(tmp_path / "a.json", "a folder", Shape) == Shape(1, 2.0, ("a",))


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="ordinary file|cannot be opened"):
            read_regular(path, "a folder")
    with pytest.raises(UserError, match="does not exist"):
        read_regular(tmp_path / "none", "a folder")
    with pytest.raises(UserError, match="cannot be opened"):
        read_regular(tmp_path / "a\0b", "a folder")
    (tmp_path / "long").write_bytes(b"12345")
    with pytest.raises(UserError, match="5 bytes; allowed: at most 4"):
        read_regular(tmp_path / "long", "a folder", most=4)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 1\na: 2\n", "twice"),
        ("a: {b: 1, b: 2}\n", "twice"),
        ("[" * 5000, "recursion"),
        ("a: &x [*x]\n", "inside itself"),
        ("? [a]\n: b\n", "no text"),
        ("a: !!python/object/apply:os.system [touch x]\n", ""),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n"
         for p, n in zip("abcdefgh", "bcdefghi", strict=True)), "aliases"),
    ],
)  # fmt: skip
def test_yaml_that_is_damaged_or_explodes_is_one_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    if not word:  # a tag changes nothing: all is text
        assert read_yaml(tmp_path / "a.yaml", "a configuration") == {"a": ["touch x"]}
        return
    with pytest.raises(UserError, match=word) as caught:
        read_yaml(tmp_path / "a.yaml", "a configuration")
    assert len(str(caught.value)) <= LONGEST


def test_yaml_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftarget: 2:4\nlist: [1, x]\n")
    assert read_yaml(tmp_path / "a.yaml", "a configuration") == {"target": "2:4", "list": ["1", "x"]}


class PanicException(BaseException):
    """As Rust's, which is no Exception."""


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), MemoryError(), PanicException("index")])
def test_whatever_a_loader_raises_is_the_users(error: BaseException) -> None:
    with (
        pytest.raises(UserError, match="^tokenizer t does not load .*; copy it again$"),
        fenced("tokenizer t does not load", "copy it again"),
    ):
        raise error


def test_a_fence_lets_through_what_is_no_mistake_of_a_file() -> None:
    with pytest.raises(KeyboardInterrupt), fenced("a", "b"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="^own$"), fenced("a", "b"):
        raise UserError("own")


def test_a_traceback_inside_a_message_stays_there() -> None:
    told = "boom\nTraceback (most recent call last):\n  File x, line 1\nValueError: the cause"
    with pytest.raises(UserError, match="the cause") as caught, fenced("a", "b"):
        raise RuntimeError(told)
    assert "Traceback" not in str(caught.value)


def test_libraries_are_quiet(capfd: Any, caplog: Any) -> None:
    with quiet():
        logging.getLogger("transformers").error("noise")
        warnings.warn("noise", stacklevel=1)
    logging.getLogger("transformers").error("told")
    assert [record.message for record in caplog.records] == ["told"]
    with pytest.raises(UserError), fenced("a", "b", native=True):
        os.write(2, b"panicked")
        raise ValueError
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_messages_are_short_and_printable() -> None:
    assert len(str(UserError("x" * 10_000_000 + " do this"))) <= LONGEST
    assert str(UserError("x" * 10_000 + " do this")).endswith("do this")
    assert "\x1b" not in str(UserError("\x1b[31mred\ud800"))
    assert len(brief("a" * 10_000)) < 90 and len(brief(10**5000)) < 90 and brief([1] * 9) == "a list of 9"
    assert one_line("a\nb") == "a b"
