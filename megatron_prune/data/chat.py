"""Conversations as documents: rows with messages, made text by the chat template that a model brings along.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}

are the same conversation. Between reading and tokenising a document is the JSON of its messages, so that only what is
drawn is rendered. A template writes the special tokens itself: none are added to its text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_prune.data.rendering import DAY, Messages, Refused, Renderer, Template, TooMuch
from megatron_prune.data.text import BadDocument, OverLimit, check_document
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import parse_text_json, read_regular

KEYS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function": "tool"} | {
    role: role for role in ("system", "developer", "user", "assistant", "tool")
}
"""Who a message is `from` -> its role."""
EXAMPLE = "{'messages': [{'role': 'user', 'content': '...'}, ...]}"
PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
"""Rendered at the start, so that a template that is no jinja is found before any work."""
MOST_TEMPLATE = 1_000_000
"""Bytes."""


class Conversations:
    """How rows of conversations are read, and made text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        found: Path | Template,
        keys: Sequence[str] = KEYS,
        at_once: bool = False,
    ) -> None:
        """A template, or that of the directory whose tokenizer this is; UserError without one.

        `at_once`: documents are text, and what the template does not take is a bad document.
        """
        template = found if isinstance(found, Template) else Template(read_template(found), str(found))
        self.keys = tuple(keys)
        self.at_once = at_once
        self.sha256 = hashlib.sha256(template.text.encode("utf-8", "surrogatepass")).hexdigest()
        special = sorted(map(str, tokenizer.special_tokens_map.items()))
        self.state: list[Any] = [self.sha256, list(DAY), special]
        """What its texts depend on beside the rows: the template, and what that writes by name."""
        self._name = template.name
        self._renderer = Renderer(tokenizer, template)
        self._probe()

    def _probe(self) -> None:
        """UserError for a template that takes too much for the shortest conversation; any other may be refused."""
        try:
            self._renderer.render(PROBE)
        except TooMuch as error:
            raise self._renderer.broken(error) from error
        except Refused:
            pass

    def document(self, record: Mapping[str, Any]) -> str:
        """The conversation of a row; `BadDocument` says what is wrong with it."""
        messages = messages_of(record, self.keys)
        try:
            packed = json.dumps(messages, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadDocument(f"messages that are no JSON ({error})") from error
        return self._text(messages) if self.at_once else check_document(packed)

    def render(self, document: str) -> str:
        """The text of a document of `document`; UserError where the template does not take it."""
        messages = json.loads(document)
        try:
            return self._text(messages)
        except BadDocument as error:
            first = brief(str(messages[0].get("content")))
            raise UserError(f"the conversation that begins {first}: {error}; leave that row out") from error

    def prompt(self, messages: Messages, unfinished: bool = False) -> str:
        """The text of a conversation that the model is to go on with: its answer begins, or goes on where unfinished.

        `Refused` where the template does not take it.
        """
        return self._renderer.render(messages, not unfinished, unfinished)

    def _text(self, messages: Messages) -> str:
        try:
            return check_document(self._renderer.render(messages))
        except TooMuch as error:
            raise OverLimit(f"the chat template of {self._name} {error}") from error
        except Refused as error:
            raise BadDocument(f"the chat template of {self._name} does not take it ({error})") from error


# --- rows ---


def messages_of(record: Mapping[str, Any], keys: Sequence[str] = KEYS) -> list[dict[str, Any]]:
    """The messages of a row, as templates know them; `BadDocument` says what is wrong."""
    key = next((key for key in keys if record.get(key) is not None), None)
    if key is None:
        raise BadDocument(f"no conversation under the key {' or '.join(map(brief, keys))}; expected {EXAMPLE}")
    rows = record[key]
    if not isinstance(rows, list) or not rows:
        raise BadDocument(f"no list of messages but {brief(rows)} under the key {brief(key)}; expected {EXAMPLE}")
    return [_message(row) for row in rows]


def _message(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadDocument(f"no message but {brief(row)}; expected {EXAMPLE}")
    kept = {key: value for key, value in row.items() if value is not None}
    if "role" not in kept and "from" in kept:
        sender = kept.pop("from")
        if not isinstance(sender, str) or sender not in ROLES:
            raise BadDocument(f"a message from {brief(sender)}; allowed: {', '.join(ROLES)}")
        kept = {"role": ROLES[sender], "content": kept.pop("value", None), **kept}
    if not isinstance(kept.get("role"), str):
        raise BadDocument(f"a message without a role, {brief(row)}; expected {EXAMPLE}")
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = content = _joined(content)
    if not isinstance(content, str) and not (content is None and kept.get("tool_calls")):
        raise BadDocument(f"a message whose content is no text, {brief(row)}; expected {EXAMPLE}")
    return kept


def _joined(parts: Sequence[Any]) -> str:
    """The text of content in parts."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None for part in parts
    ]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise BadDocument("a message with more than text in it; give conversations of text")
    return "".join(found)


# --- templates ---


def read_template(directory: Path) -> str:
    """The chat template of a model's folder, from whichever file it stands in; UserError without one."""
    for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"):
        file = directory / name
        if not file.is_file():
            continue
        content = read_regular(file, "a tokenizer's folder")
        found: Any = content if file.suffix == ".jinja" else _default(content, file)
        if isinstance(found, bytes):
            found = found.decode("utf-8", "replace")
        if isinstance(found, str):
            if len(found) > MOST_TEMPLATE:
                raise UserError(f"{file}: its chat template has {len(found)} characters; allowed: {MOST_TEMPLATE}")
            return found
    raise UserError(
        f"{directory} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): give a"
        " model that was made for conversations, or leave --apply-chat-template out"
    )


def _default(content: bytes, file: Path) -> Any:
    """The template in a JSON file that conversations without tools have, if there is one."""
    found = parse_text_json(content, str(file), dict[str, Any], "copy it again from the model's source")
    template = found.get("chat_template")
    if isinstance(template, list):
        named = {
            entry["name"]: entry.get("template") for entry in template if isinstance(entry, dict) and "name" in entry
        }
        return named.get("default")
    return template.get("default") if isinstance(template, dict) else template
