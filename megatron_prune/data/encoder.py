"""Text -> token ids for `preprocess`, straight from the tokenizer libraries in batches.

A directory holds a Hugging Face tokenizer and adds the special tokens that it always adds; a `tokenizer.model` file is
a bare SentencePiece model and adds none, as in Megatron-LM.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from megatron_prune.data.chat import KEYS, Conversations
from megatron_prune.data.text import TEXT, Form, Plain
from megatron_prune.data.tokenizer import encoding, load_tokenizer, open_sentencepiece, tokenize
from megatron_prune.errors import UserError
from megatron_prune.foreign import read_regular


class Encoder(Protocol):
    """A tokenizer as `preprocess` sees it."""

    vocab_size: int
    """Largest id that it can produce, plus one."""
    end: int | None
    """Id of the end-of-text token."""
    sha256: str
    """Of all that decides which ids a text becomes."""

    form: Form
    """How rows become the texts that it encodes."""
    chat_template: str | None
    """SHA-256 of the template that has rendered them."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, of any length."""

    def use_threads(self, count: int) -> None:
        """Threads of one `encode` in this process."""


def load_encoder(path: Path, key: str = TEXT.key, chat: bool = False) -> Encoder:
    """The tokenizer at `path`: a directory in Hugging Face's form or a SentencePiece `.model` file.

    `key`: where documents stand in rows; with `chat` they are conversations, which its chat template makes text.
    """
    if path.suffix == ".model" and path.is_file():
        if chat:
            raise UserError(f"--apply-chat-template: {path} has no chat template; give the model's directory")
        return SentencePieceEncoder(path, Plain(key))
    tokenizer = load_tokenizer(path)
    if not chat:
        return HuggingFaceEncoder(tokenizer, Plain(key))
    keys = KEYS if key == TEXT.key else (key,)
    return HuggingFaceEncoder(tokenizer, Conversations(tokenizer, path, keys, at_once=True))


class HuggingFaceEncoder:
    """A tokenizer of transformers; a fast one is asked directly and computes no character offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: Form = TEXT) -> None:
        self.tokenizer = tokenizer
        self.form = form
        self.chat_template = form.sha256 if isinstance(form, Conversations) else None
        self.fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        vocab = tokenizer.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        self.end = None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self.name = tokenizer.name_or_path
        with encoding(self.name):
            if self.fast is not None:
                self.fast.no_truncation()
                self.fast.no_padding()
            state = self.fast.to_str() if self.fast is not None else str(sorted(vocab.items()))
        if isinstance(form, Conversations):
            state += str(form.state)
        self.sha256 = hashlib.sha256(f"{self.end} {state}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        special = self.chat_template is None
        if self.fast is None:
            return tokenize(self.tokenizer, texts, add_special_tokens=special)
        with encoding(self.name):
            found = self.fast.encode_batch_fast(list(texts), add_special_tokens=special)
            return [encoded.ids for encoded in found]

    def use_threads(self, count: int) -> None:
        """The library reads its settings from the environment, before its first batch."""
        os.environ["RAYON_NUM_THREADS"] = str(count)
        if count == 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"


class SentencePieceEncoder:
    """A SentencePiece model without Hugging Face's files around it."""

    chat_template: str | None = None

    def __init__(self, path: Path, form: Form = TEXT) -> None:
        self.form = form
        content = read_regular(path, "a SentencePiece model")
        self.model = open_sentencepiece(content, path)
        self.name = str(path)
        self.threads = 1
        self.vocab_size = self.model.get_piece_size()
        self.end = self.model.eos_id() if self.model.eos_id() >= 0 else None
        self.sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        with encoding(self.name):
            return self.model.encode(list(texts), num_threads=self.threads)

    def use_threads(self, count: int) -> None:
        """Threads of one `encode`."""
        self.threads = count
