"""Training windows and evaluation windows.

`TokenWindows.sample(index)` is a pure function of (text, tokenizer, seed, index): no worker, process or
resume changes what step 17 trains on, in any layout. The text is tokenised once, as one flat array that is
cached on disk under the hash of all that went into it and memory-mapped, so that the processes of a node
share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megatron_prune.data.text import hash_files, read_documents
from megatron_prune.data.tokenizer import (
    about_chat,
    chat_of,
    check_rows,
    document_ids,
    form_of,
    model_rows,
    template_of,
    tokenize,
    vocabulary,
)
from megatron_prune.errors import UserError
from megatron_prune.files import cached_folder

BATCH = 512
"""Documents handed at once to the tokenizer, which spreads them over threads."""
CACHE_VERSION = 2
TOKENS = "tokens.npy"
"""In a folder of the cache."""


class TokenWindows:
    """Windows of seq_length + 1 tokens over a text, in a seeded order that is drawn anew for each epoch."""

    def __init__(
        self,
        paths: Sequence[Path | str],
        tokenizer: PreTrainedTokenizerBase,
        seq_length: int,
        seed: int,
        append_eod: bool = True,
        documents: slice = slice(None),
        cache: Path | None = None,
    ) -> None:
        """`documents` is the range used; `cache` is the folder of token arrays (default: `cache_folder()`).

        With `append_eod` each document ends with the end-of-text token. The text must hold one window.
        """
        self.source = tuple(Path(path).name for path in paths)
        self.seq_length = seq_length
        self.seed = seed
        self.chat_template = template_of(tokenizer)
        self.key = _cache_key(paths, tokenizer, append_eod, documents)
        self.tokens = _cached_tokens(paths, tokenizer, append_eod, documents, cache or cache_folder(), self.key)
        self.num_windows = (len(self.tokens) - 1) // seq_length
        if self.num_windows < 1:
            raise UserError(
                f"{', '.join(map(str, paths))}: {len(self.tokens)} tokens do not fill one window of"
                f" {seq_length} + 1; give more text or a smaller --seq-length"
            )
        self._order = lru_cache(maxsize=2)(self._permutation)

    def sample(self, index: int) -> torch.Tensor:
        """Window number `index` over all epochs: int64 [seq_length + 1], inputs and labels in one."""
        epoch, position = divmod(index, self.num_windows)
        start = int(self._order(epoch)[position]) * self.seq_length
        return torch.from_numpy(self.tokens[start : start + self.seq_length + 1].astype(np.int64))

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """int64 [len(indices), seq_length + 1]"""
        return torch.stack([self.sample(index) for index in indices])

    def _permutation(self, epoch: int) -> np.ndarray:
        """Order of the windows in one epoch. RandomState is numpy's one stream that never changes."""
        return np.random.RandomState([self.seed % 2**32, self.seed >> 32, epoch]).permutation(self.num_windows)

    def info(self) -> dict[str, Any]:
        """Provenance, for the log."""
        return {
            "source": list(self.source),
            "tokens": len(self.tokens),
            "windows": self.num_windows,
            "seq_length": self.seq_length,
            "seed": self.seed,
            "sha256": self.key,
            **about_chat(self.chat_template),
        }


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/megatron_prune`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_prune"


def _cache_key(
    paths: Sequence[Path | str], tokenizer: PreTrainedTokenizerBase, append_eod: bool, documents: slice
) -> str:
    """SHA-256 of everything that the token array depends on."""
    chosen = [documents.start, documents.stop, documents.step]
    parts: list[Any] = [CACHE_VERSION, hash_files(paths), _tokenizer_state(tokenizer), append_eod, chosen]
    if (chat := chat_of(tokenizer)) is not None:
        parts += chat.state
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else backend.to_str()
    return [type(tokenizer).__name__, state, tokenizer.eos_token_id]


def _cached_tokens(
    paths: Sequence[Path | str],
    tokenizer: PreTrainedTokenizerBase,
    append_eod: bool,
    documents: slice,
    cache: Path,
    key: str,
) -> np.ndarray:
    """The flat token array [tokens], memory-mapped; the first process of a node makes it, the others wait."""

    def make(folder: Path) -> None:
        texts = read_documents(paths, documents, form_of(tokenizer))
        np.save(folder / TOKENS, flat_tokens(texts, tokenizer, append_eod))

    tokens = _open_tokens(cached_folder(cache / f"tokens-{key[:32]}", make, _holds_tokens, alone=True))
    if model_rows(tokenizer) < vocabulary(tokenizer):  # another model, with more rows, may have made the file
        check_rows(tokenizer, int(tokens.max(initial=0)), model_rows(tokenizer))
    return tokens


def _open_tokens(folder: Path) -> np.ndarray:
    return np.load(folder / TOKENS, mmap_mode="r", allow_pickle=False)


def _holds_tokens(folder: Path) -> bool:
    """Whether a folder of the cache, unchanged since it was written, holds tokens and not something of others."""
    try:
        tokens = _open_tokens(folder)
    except (ValueError, OSError, EOFError):
        return False
    return tokens.dtype == np.int32 and tokens.ndim == 1


def flat_tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, append_eod: bool) -> np.ndarray:
    """All documents in a row: int32 [tokens]; the tokenizer adds its own special tokens to each.

    Conversations end as their chat template ends them, with `append_eod`, too.
    """
    end = _end_of_document(tokenizer) if append_eod and chat_of(tokenizer) is None else None
    pieces = []
    for first in range(0, len(documents), BATCH):
        for ids in document_ids(tokenizer, documents[first : first + BATCH]):
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
            pieces.append(np.asarray(ids, dtype=np.int32))
    return np.concatenate(pieces)


def _end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to put between documents; set its eos_token")
    return int(tokenizer.eos_token_id)


USUAL_WINDOWS = 32
"""Of a text that is evaluated, where no number is given."""


@dataclass(frozen=True)
class EvaluationText:
    """A text cut for perplexity, with what a result must say about it."""

    tokens: torch.Tensor
    """int64 [windows, window], not overlapping, from the start; the remainder of the text is dropped."""
    num_tokens: int
    """In the whole text."""
    window: int
    """Tokens in a window; also the stride."""
    sha256: str
    """Of the text, UTF-8."""
    source: str
    """Name of the file, without folders."""
    chat_template: str | None = None
    """SHA-256 of the template that has made it of conversations."""

    def info(self) -> dict[str, Any]:
        """Window, stride, token count and text hash: without them a perplexity is no result."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "text_tokens": self.num_tokens,
            "window": self.window,
            "stride": self.window,
            "windows": len(self.tokens),
            "special_tokens": False,
            **about_chat(self.chat_template),
        }


def evaluation_windows(
    path: Path | str, tokenizer: PreTrainedTokenizerBase, window: int, windows: int | None = 0
) -> EvaluationText:
    """The text of a file, tokenised whole without special tokens, as the first `windows` windows.

    0: all of them; None: `USUAL_WINDOWS`, or all where there are fewer. The documents of a
    `.jsonl` file are joined by blank lines; conversations follow each other as their chat template makes them.
    """
    chat = chat_of(tokenizer)
    if chat is None:
        text = "\n\n".join(read_documents([path]))
        (ids,) = tokenize(tokenizer, [text], add_special_tokens=False)
    else:
        rendered = list(map(chat.render, read_documents([path], form=chat)))
        text = "".join(rendered)
        ids = [id for ids in tokenize(tokenizer, rendered, add_special_tokens=False) for id in ids]
    available = len(ids) // window
    windows = max(1, min(USUAL_WINDOWS, available)) if windows is None else windows
    if available < max(windows, 1):
        raise UserError(
            f"{path}: {len(ids)} tokens hold {available} windows of {window}; {max(windows, 1)} wanted:"
            " give more text, fewer --windows or a smaller --window"
        )
    count = windows or available
    tokens = torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return EvaluationText(tokens, len(ids), window, digest, Path(path).name, template_of(tokenizer))
