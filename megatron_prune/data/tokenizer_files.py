"""Which files a tokenizer has on disk, and how they go along with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.foreign import parse_text_json, read_regular

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model*",  # SentencePiece's, or tiktoken's; Mistral numbers its versions
    "spiece.model",
    "sentencepiece*.model",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "original/tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "License*",
    "license*",
    "NOTICE*",
    "Notice*",
    "*USE_POLICY*",
)
"""Names, or patterns of names, of the files that a model brings along besides its weights and config.json: tokenizer,
chat templates, how it generates by default, and under which terms it may be used."""


def tokenizer_files(directory: Path) -> list[Path]:
    """Tokenizer, chat template and generation config files in ``directory`` and its folders."""
    found = {file: None for name in TOKENIZER_FILES for file in sorted(directory.glob(name)) if file.is_file()}
    return list(found)


def check_tokenizer_files(directory: Path) -> None:
    """A UserError when one of `tokenizer_files` is no ordinary file, or is damaged JSON."""
    for file in tokenizer_files(directory):
        content = read_regular(file, "a model's directory")
        if file.suffix == ".json":
            parse_text_json(content, str(file), dict[str, Any], "copy it again from the model's source")


def copy_tokenizer(directory: Path, target: Path) -> None:
    """Copy `tokenizer_files` to the folder `target`, under the same names."""
    for file in tokenizer_files(directory):
        copy = target / file.relative_to(directory)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(read_regular(file, "a model's directory"))


DESCRIPTION = "megatron_prune.json"
