"""N seeded windows of calibration text, with everything needed to draw them again.

The draw is the one that published one-shot results share (SparseGPT, arXiv:2301.00774; Wanda,
arXiv:2306.11695): pick a random document until it is longer than a window, then cut the window at a random
place in it. The order of the calls to the generator is part of that definition: with the same text, tokenizer
and seed the windows are equal to theirs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_prune.data.text import read_documents, tokenize
from megatron_prune.errors import UserError


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration tokens and their provenance."""

    tokens: torch.Tensor
    """int64 [count, length]"""
    source: tuple[str, ...]
    """Names of the files, without folders."""
    documents: int
    """Documents that were drawn from."""
    seed: int
    count: int
    """Windows."""
    length: int
    """Tokens in a window."""
    sha256: str
    """Of the tokens, as little-endian int64."""

    def info(self) -> dict[str, Any]:
        """Everything but the tokens, for `decision.json` and the log."""
        plain = {name: value for name, value in vars(self).items() if name != "tokens"}
        return plain | {"source": list(self.source)}


def windows(
    paths: Sequence[Path | str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_length: int,
    seed: int,
    documents: slice = slice(None),
) -> CalibrationSet:
    """`samples` windows of `seq_length` tokens from `documents` of the files; the same on every process."""
    texts = read_documents(paths, documents)
    draw = _Draw(texts, tokenizer, seq_length, random.Random(seed))
    tokens = torch.tensor([draw.window() for _ in range(samples)], dtype=torch.int64)
    names = tuple(Path(path).name for path in paths)
    return CalibrationSet(tokens, names, len(texts), seed, samples, seq_length, hash_tokens(tokens))


class _Draw:
    """The state of one draw: the generator and the documents tokenised so far."""

    def __init__(
        self, texts: list[str], tokenizer: PreTrainedTokenizerBase, seq_length: int, generator: random.Random
    ) -> None:
        self.texts = texts
        self.tokenizer = tokenizer
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
            index = self.generator.randint(0, len(self.texts) - 1)
            if self._is_long(index):
                return self.long[index]
            misses += 1
            if misses == len(self.texts) and not any(map(self._is_long, range(len(self.texts)))):
                raise UserError(
                    f"calibration: none of its {len(self.texts)} documents is longer than {self.seq_length}"
                    " tokens; give longer documents or a smaller --calibration-seq-length"
                )

    def _is_long(self, index: int) -> bool:
        """Tokenises a document once; of the short ones only the number is kept."""
        if index not in self.long and index not in self.short:
            (ids,) = tokenize(self.tokenizer, [self.texts[index]])
            if len(ids) > self.seq_length:
                self.long[index] = ids
            else:
                self.short.add(index)
        return index in self.long


def hash_tokens(tokens: torch.Tensor) -> str:
    """SHA-256 of token ids as little-endian int64."""
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
