"""Training windows from preprocessed text, several prefixes mixed by weight: megatron-core's GPTDataset and blends.

`BlendWindows.sample(index)` is the same on every process: the order follows from the data, the weights, the seed and
the number of windows that the run needs. A run that is resumed goes on at the next index, in any layout. That order is
computed once and cached in a folder that all processes must see; it is keyed by size and time of the files, which
megatron-core's own names for its cache leave out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_prune.backend  # noqa: F401  # isort: skip  (before megatron.core)
import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from megatron_prune.data.indexed import check_ids, check_tokens, open_indexed
from megatron_prune.data.text import SUFFIXES
from megatron_prune.errors import UserError
from megatron_prune.files import cached_folder
from megatron_prune.foreign import reason
from megatron_prune.options import flag
from megatron_prune.ranks import by_leader, from_leader

TRAIN, HELD_OUT = 0, 1
"""Positions in a split and in what megatron-core builds from it."""


@dataclass(frozen=True)
class Blend:
    """Prefixes of preprocessed text, how much of each, and how each is cut."""

    prefixes: tuple[Path, ...]
    weights: tuple[float, ...] | None
    """Shares of the windows, of any sum; None: as much of each as it has tokens."""
    split: tuple[float, float, float] = (1, 0, 0)
    """Parts of each prefix's documents, in order: for training, held out, left out; of any sum."""


def parse_blend(key: str, values: Sequence[Path | str]) -> Blend | None:
    """`[weight] prefix ...` as given to an option; None when it is files of text."""
    words = [str(value) for value in values]
    if any(word.endswith(SUFFIXES) for word in words):
        other = [word for word in words if not word.endswith(SUFFIXES)]
        if other:
            raise UserError(f"{flag(key)}: text and {other[0]!r} given; allowed: files of text, or prefixes alone")
        return None
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return Blend(tuple(map(Path, words)), None)
    weights, prefixes = numbers[::2], numbers[1::2]
    alternate = len(weights) == len(prefixes) and all(number is None for number in prefixes)
    positive = [weight for weight in weights if weight is not None and 0 < weight < math.inf]
    if not alternate or len(positive) != len(weights):
        raise UserError(
            f"{flag(key)}: {' '.join(words)} given; allowed: WEIGHT PREFIX WEIGHT PREFIX ..., weights above 0"
        )
    return Blend(tuple(map(Path, words[1::2])), tuple(positive))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class BlendWindows:
    """Windows of seq_length + 1 tokens; collective: every process makes it with the same arguments."""

    def __init__(self, blend: Blend, part: int, count: int, seq_length: int, seed: int, vocab_size: int, cache: Path):
        """`count` windows of a part of the split, TRAIN or HELD_OUT; of the latter at most what one pass gives."""
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.blend = blend
        self.tokens = [_tokens(prefix, blend.split, part, vocab_size) for prefix in blend.prefixes]
        by_leader(lambda: _check_all(blend.prefixes, vocab_size))
        self.weights = _normalized(blend.weights or self.tokens)
        self.num_windows = count if part == TRAIN else min(count, self._one_pass())
        self.key = from_leader(self._cache_key(part))
        self.windows = self._build(part, cache / f"blend2-{self.key[:32]}")

    def _one_pass(self) -> int:
        """Windows until the first prefix has to begin anew."""
        each = [
            (tokens - 1) // self.seq_length / weight for tokens, weight in zip(self.tokens, self.weights, strict=True)
        ]
        if min(each) < 1:
            shortest = self.blend.prefixes[each.index(min(each))]
            raise UserError(
                f"{shortest}: its held-out part does not fill one window of {self.seq_length} + 1 tokens; hold out more"
                " of it, or give a smaller --seq-length"
            )
        return int(min(each))

    def _cache_key(self, part: int) -> str:
        """SHA-256 of everything that the order of the windows depends on."""
        states = [
            prefix.with_name(prefix.name + suffix).stat()
            for prefix in self.blend.prefixes
            for suffix in (".bin", ".idx")
        ]
        files = [[state.st_size, state.st_mtime_ns] for state in states]
        names = [str(prefix.resolve()) for prefix in self.blend.prefixes]
        parts = [names, files, self.weights, self.blend.split, part, self.num_windows, self.seq_length, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _build(self, part: int, folder: Path) -> Any:
        """megatron-core's data set, its index arrays cached in `folder`, which appears whole."""
        return self._load(part, cached_folder(folder, lambda partial: self._load(part, partial), holds_plain_arrays))

    def _load(self, part: int, folder: Path) -> Any:
        sizes = [self.num_windows if position == part else 0 for position in range(3)]
        single = len(self.blend.prefixes) == 1
        config = GPTDatasetConfig(
            random_seed=self.seed % 2**32,  # numpy's generator takes no more
            sequence_length=self.seq_length,
            blend=([str(prefix) for prefix in self.blend.prefixes], None if single else list(self.weights)),
            split="1,1,1",  # replaced below: megatron-core parses no exponents
            path_to_cache=str(folder),
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        bounds = _bounds(self.blend.split)
        config.split_matrix = [bounds[position] if position == part else None for position in range(3)]
        try:
            return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[part]
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} was written by process 0 and is not visible here; give a --data-cache that all nodes"
                " share"
            ) from error

    def sample(self, index: int) -> Tensor:
        """Window number `index`: int64 [seq_length + 1], inputs and labels in one."""
        try:
            item = self.windows[index]
            window = torch.cat([item["tokens"], item["labels"][-1:]])
        except (IndexError, ValueError, TypeError, AssertionError) as error:
            raise UserError(
                f"window {index} of {', '.join(map(str, self.blend.prefixes))} cannot be read ({reason(error)}): its "
                "files or its cache have been changed; copy the files again or give another --data-cache"
            ) from error
        check_ids(window.numpy(), self.vocab_size, ", ".join(map(str, self.blend.prefixes)))
        return window

    def info(self) -> dict[str, Any]:
        """Provenance, for the log."""
        return {
            "source": [prefix.name for prefix in self.blend.prefixes],
            "weights": list(self.weights),
            "split": list(self.blend.split),
            "tokens": sum(self.tokens),
            "windows": self.num_windows,
            "seq_length": self.seq_length,
            "seed": self.seed,
            "sha256": self.key,
        }


class _NoTokenizer:
    """What GPTDataset asks of a tokenizer when nothing is masked; without a pad token it replaces no id by zero."""

    eod = None
    vocab_size = None
    unique_identifiers: dict[str, str] = {}


def _check_all(prefixes: Sequence[Path], vocab_size: int) -> None:
    for prefix in prefixes:
        check_tokens(prefix, vocab_size)


def holds_plain_arrays(folder: Path) -> bool:
    """Whether every array in a folder is of numbers: megatron-core would run what an array of objects says."""
    for file in folder.glob("*.npy"):
        try:
            if np.load(file, mmap_mode="r", allow_pickle=False).dtype.kind not in "iu":
                return False
        except (ValueError, OSError, EOFError):
            return False
    return True


def _tokens(prefix: Path, split: Sequence[float], part: int, vocab_size: int) -> int:
    """Tokens in a part of a prefix; at least one: megatron-core would repeat an empty part for ever."""
    dataset = open_indexed(prefix, vocab_size)
    documents = len(dataset)
    bounds = _bounds(split)[part]
    begin, end = (int(round(bound * float(documents))) for bound in bounds or (0.0, 0.0))
    tokens = int(dataset.sequence_lengths[begin:end].sum())
    if not tokens:
        raise UserError(
            f"{prefix}: {documents} documents split into {split[0]:g}, {split[1]:g}, {split[2]:g} leave one part empty;"
            " give another --data-split or more documents"
        )
    return tokens


def _bounds(split: Sequence[float]) -> list[tuple[float, float] | None]:
    """Where each part of the documents begins and ends, as fractions; None for a part of nothing."""
    return convert_split_vector_to_split_matrix(list(_normalized(split)))


def _normalized(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)
