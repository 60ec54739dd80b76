"""N seeded windows of calibration text, with everything needed to draw them again.

The draw is the one that published one-shot results share (SparseGPT, arXiv:2301.00774; Wanda,
arXiv:2306.11695): pick a random document until it is longer than a window, then cut the window at a random
place in it. The order of the calls to the generator is part of that definition: with the same text, tokenizer
and seed the windows are equal to theirs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_prune.data.text import SUFFIXES, read_documents
from megatron_prune.data.tokenizer import (
    about_chat,
    chat_of,
    document_ids,
    form_of,
    model_rows,
    refuse_prepared,
    template_of,
)
from megatron_prune.errors import UserError


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens and their provenance."""

    tokens: torch.Tensor
    """int64 [count, length]"""
    source: tuple[str, ...]
    """Names of the files or prefixes, without folders."""
    documents: int
    """Documents that were drawn from."""
    seed: int
    count: int
    """Windows."""
    length: int
    """Tokens in a window."""
    sha256: str
    """Of the tokens, as little-endian int64."""
    chat_template: str | None = None
    """SHA-256 of the template that has made conversations text."""

    def info(self) -> dict[str, Any]:
        """Everything but the tokens, for `decision.json` and the log."""
        plain = {name: value for name, value in vars(self).items() if name not in ("tokens", "chat_template")}
        return plain | {"source": list(self.source)} | about_chat(self.chat_template)


def windows(
    paths: Sequence[Path | str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_length: int,
    seed: int,
    documents: slice = slice(None),
) -> CalibrationSet:
    """`samples` windows of `seq_length` tokens from `documents` of the files; the same on every process.

    The files are text, or prefixes of preprocessed text, whose documents end as they were made to end.
    """
    names = tuple(Path(path).name for path in paths)
    count, read = _documents(paths, tokenizer, documents)
    draw = _draw_of(tokenizer)(count, read, seq_length, random.Random(seed))
    return _drawn(draw, names, samples, seed, template_of(tokenizer))


def windows_of(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, samples: int, seq_length: int, seed: int
) -> CalibrationSet:
    """As `windows`, from documents in memory, such as `form_of` the tokenizer makes of rows."""

    def read(index: int) -> list[int]:
        return document_ids(tokenizer, [texts[index]])[0]

    draw = _draw_of(tokenizer)(len(texts), read, seq_length, random.Random(seed))
    return _drawn(draw, (), samples, seed, template_of(tokenizer))


def _draw_of(tokenizer: PreTrainedTokenizerBase) -> type[_Draw] | type[_Filled]:
    """How windows are drawn: from documents, or from conversations, which are short."""
    return _Draw if chat_of(tokenizer) is None else _Filled


def _drawn(
    draw: _Draw | _Filled, names: tuple[str, ...], samples: int, seed: int, template: str | None = None
) -> CalibrationSet:
    tokens = torch.tensor([draw.window() for _ in range(samples)], dtype=torch.int64)
    return CalibrationSet(tokens, names, draw.count, seed, samples, draw.seq_length, hash_tokens(tokens), template)


Read = Callable[[int], list[int]]
"""Number of a document -> its token ids."""


def _documents(paths: Sequence[Path | str], tokenizer: PreTrainedTokenizerBase, chosen: slice) -> tuple[int, Read]:
    """How many documents there are to draw from, and how to get one's token ids."""
    if not paths or any(str(path).endswith(SUFFIXES) for path in paths):
        texts = read_documents(paths, chosen, form_of(tokenizer))
        return len(texts), lambda index: document_ids(tokenizer, [texts[index]])[0]
    refuse_prepared(tokenizer, "calibration")
    from megatron_prune.data.indexed import check_ids, open_indexed

    vocab_size = model_rows(tokenizer)
    sets = [open_indexed(Path(path), vocab_size) for path in paths]
    places = [(number, index) for number, dataset in enumerate(sets) for index in range(len(dataset))][chosen]
    if not places:
        raise UserError(f"{', '.join(map(str, paths))}: no document found; give a range that holds some")

    def read(index: int) -> list[int]:
        number, document = places[index]
        ids = sets[number][document].tolist()
        check_ids(ids, vocab_size, str(paths[number]))
        return ids

    return len(places), read


class _Draw:
    """The state of one draw: the generator and the documents tokenised so far."""

    def __init__(self, count: int, read: Read, seq_length: int, generator: random.Random) -> None:
        self.count = count
        self.read = read
        self.seq_length = seq_length
        self.generator = generator
        self.long: dict[int, list[int]] = {}
        self.short: set[int] = set()

    def window(self) -> list[int]:
        ids = self._document()
        start = self.generator.randint(0, len(ids) - self.seq_length - 1)
        return ids[start : start + self.seq_length]

    def _document(self) -> list[int]:
        """Token ids of a random document that is longer than a window."""
        misses = 0
        while True:
            index = self.generator.randint(0, self.count - 1)
            if self._is_long(index):
                return self.long[index]
            misses += 1
            if misses == self.count and not any(map(self._is_long, range(self.count))):
                raise UserError(
                    f"calibration: none of its {self.count} documents is longer than {self.seq_length}"
                    " tokens; give longer documents or a smaller --calibration-seq-length"
                )

    def _is_long(self, index: int) -> bool:
        """Reads a document once; of the short ones only the number is kept."""
        if index not in self.long and index not in self.short:
            ids = self.read(index)
            if len(ids) > self.seq_length:
                self.long[index] = ids
            else:
                self.short.add(index)
        return index in self.long


class _Filled:
    """The state of a draw of conversations, most of which are shorter than a window.

    Each window begins with the beginning of a conversation; others follow it until it is full. They are taken in an
    order that is drawn anew when all have been taken.
    """

    def __init__(self, count: int, read: Read, seq_length: int, generator: random.Random) -> None:
        self.count = count
        self.read = read
        self.seq_length = seq_length
        self.generator = generator
        self.waiting: list[int] = []

    def window(self) -> list[int]:
        ids: list[int] = []
        for _ in range(2 * self.count):  # among these are all of them
            ids += self._next()
            if len(ids) >= self.seq_length:
                return ids[: self.seq_length]
        raise UserError(
            f"calibration: a window has {self.seq_length} tokens and its {self.count} conversations have fewer; give "
            "more conversations or a smaller --calibration-seq-length"
        )

    def _next(self) -> list[int]:
        if not self.waiting:
            self.waiting = list(range(self.count))
            self.generator.shuffle(self.waiting)
        return self.read(self.waiting.pop())


def hash_tokens(tokens: torch.Tensor) -> str:
    """SHA-256 of token ids as little-endian int64."""
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
