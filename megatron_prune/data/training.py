"""What a learning run trains on and is tested on: files of text, or prefixes of preprocessed text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_prune.config import Training
from megatron_prune.data.blend import HELD_OUT, TRAIN, Blend, BlendWindows, parse_blend
from megatron_prune.data.dataset import TokenWindows, cache_folder
from megatron_prune.errors import UserError


class Windows(Protocol):
    """Numbered windows of tokens, the same on every process."""

    num_windows: int

    def sample(self, index: int) -> Tensor:
        """Window number `index`: int64 [seq_length + 1]"""

    def info(self) -> dict[str, Any]:
        """Provenance, for the log."""


def training_windows(t: Training, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Windows:
    """What the optimizer's steps see. Collective."""
    blend = _blend(t)
    if blend is None:
        return TokenWindows(t.data, tokenizer, t.seq_length, t.seed, documents=t.data_range)
    count = t.train_iters * t.global_batch_size
    return BlendWindows(blend, TRAIN, count, t.seq_length, t.seed, vocab_size, _cache(t))


def held_out_windows(t: Training, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Windows | None:
    """What the held-out loss is computed on: `eval_data`, or else the part of `data` that is split off. Collective."""
    blend = _blend(t)
    given = parse_blend("eval_data", t.eval_data) if t.eval_data else None
    if given is not None:
        if t.eval_documents is not None:
            raise UserError("--eval-documents: given with preprocessed --eval-data; allowed: with files of text")
        held_out = replace(given, split=(0, 1, 0))
    elif t.eval_data:
        return TokenWindows(t.eval_data, tokenizer, t.seq_length, 0, documents=t.eval_range)
    elif blend is not None and blend.split[HELD_OUT]:
        held_out = blend
    else:
        return None
    return BlendWindows(held_out, HELD_OUT, t.eval_windows, t.seq_length, 0, vocab_size, _cache(t))


def first_windows(windows: Windows | None, count: int) -> Tensor | None:
    """The first `count` windows without their last token, `[n, seq_length]`, fewer when the text has fewer."""
    if windows is None:
        return None
    return torch.stack([windows.sample(i)[:-1] for i in range(min(count, windows.num_windows))])


def _blend(t: Training) -> Blend | None:
    """The blend that `data` names, None when it is text; options that only fit the other kind are refused."""
    blend = parse_blend("data", t.data)
    if blend is None:
        if t.data_split is not None:
            raise UserError("--data-split: given with files of text; allowed: with prefixes from `preprocess`")
        return None
    if t.data_documents is not None:
        raise UserError("--data-documents: given with preprocessed --data; --data-split says which part is used")
    return replace(blend, split=t.split)


def _cache(t: Training) -> Path:
    return t.data_cache or cache_folder()
