"""A tiny model that was made for conversations, and conversations for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_llama

TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no ' + message['role']) }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL)


def chat_model(path: Path, template: str | None = TEMPLATE, **sizes: Any) -> Path:
    """A tiny LLaMA whose tokenizer puts `<s>` before every text and brings a chat template along."""
    tiny_llama(path, vocab_size=VOCABULARY, **sizes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    saved.chat_template = template
    saved.save_pretrained(path)
    return path


def conversations(count: int = 12) -> list[list[dict[str, str]]]:
    """Short ones of different lengths, every third with a system message."""
    made = []
    for number in range(count):
        first = [{"role": "system", "content": "Be brief. "}] if number % 3 == 0 else []
        turns = [
            {"role": role, "content": f"{word} é{number}" + f" {word}" * (number % 5)}
            for _ in range(1 + number % 2)
            for role, word in (("user", "why"), ("assistant", "because"))
        ]
        made.append(first + turns)
    return made


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, count: int = 12) -> Path:
    """`conversations` as rows with messages."""
    return write_rows(path, [{"messages": messages} for messages in conversations(count)])
