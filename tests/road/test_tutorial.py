"""docs/tutorial.md, followed to the letter: its commands one after the other, and what it says that they print.

A small model stands where the page has SmolLM2-135M, under the same name, so numbers differ and the words must not.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_prune.__main__ import main
from tests.models import byte_tokenizer, tiny_llama, words

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
OF_THE_SMALL_MODEL = {"parameters=100M": "parameters=150K"}
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


class Step(NamedTuple):
    """A command of the page and the lines printed below it."""

    command: list[str]
    printed: list[str]


def steps(text: str) -> Iterator[Step]:
    """What is behind `$ ` in blocks of a console."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, *printed = part.splitlines()
            yield Step(shlex.split(command), [line for line in printed if line.strip() not in ("", "...")])


def form(line: str) -> str:
    """A printed line without its numbers, units and times."""
    line = NUMBER.sub("#", line)
    return re.sub(r"\s+", " ", re.sub(r"\b[KMG]iB\b", "B", re.sub(r"left # (min|s|h)\b", "left", line))).strip()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page begins: the model, and text to learn from and to judge by."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048}
    byte_tokenizer(tiny_llama(tmp_path / "SmolLM2", vocab_size=257, dtype=torch.bfloat16, **sizes))
    (tmp_path / "text").mkdir()
    words(tmp_path / "text" / "train.jsonl", 200)
    (tmp_path / "text" / "eval.txt").write_text(words(tmp_path / "held_out.jsonl", 40, seed=1).read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_is_true(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    for command, printed in steps(PAGE.read_text()):
        if command[0] != "megatron-prune":
            scripts = [word for word in command if re.match(r"(tools|examples)/", word)]
            assert scripts and all(os.access(ROOT / script, os.R_OK) for script in scripts), command
            continue
        verb = [OF_THE_SMALL_MODEL.get(word, word) for word in command[1:]]
        capsys.readouterr()
        assert main(verb) == 0, (command, capsys.readouterr().err)
        found = {form(line) for line in capsys.readouterr().out.splitlines()}
        for line in printed:
            assert form(line) in found, f"{shlex.join(command)}\nprints no line such as\n{line}\nbut\n" + "\n".join(
                found
            )
        done.append(verb[0])
    assert {"inspect", "evaluate", "prune", "train", "verify", "report"} <= set(done)
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "recovered_hf" / "config.json").is_file() and (folder / "small_hf" / "config.json").is_file()


def test_a_false_page_is_seen() -> None:
    """The control: what is compared are words, in lines that were printed."""
    first, second = steps("```console\n$ megatron-prune inspect \\\n    a\na: 3 layers, 1.5 MiB\n$ ls\n```\n")
    assert first == Step(["megatron-prune", "inspect", "a"], ["a: 3 layers, 1.5 MiB"]) and second.command == ["ls"]
    assert form("a: 3 layers, 1.5 MiB") == form("a: 12 layers, 200 KiB") != form("a: 3 rows, 1.5 MiB")
