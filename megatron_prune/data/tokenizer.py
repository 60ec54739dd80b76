"""The tokenizer that a model brings along: loaded from its published files, whatever is wrong with them one line.

transformers never sees the model's directory: it is given a folder for a moment, with links to the tokenizer's files
and what of its JSON concerns a tokenizer. So nothing of config.json decides but the kind of model, no file that is no
ordinary one is waited for, and no code of the model's is ever run.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Required

from annotated_types import Gt, Lt
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from megatron_prune.data.chat import Conversations
from megatron_prune.data.text import TEXT, Form
from megatron_prune.data.tokenizer_files import tokenizer_files
from megatron_prune.errors import UserError, brief
from megatron_prune.foreign import check_shape, fenced, parse_text_json, read_json, read_regular
from megatron_prune.imports import without_triton

MARK = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8, which text from Windows begins with."""
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")
"""A line of a tiktoken file: a piece in base 64, and its id."""
AGAIN = "copy it again from the model's source"
NOTHING = "{}: no tokenizer found; expected tokenizer.json or tokenizer.model there"
LARGEST_ID = 2**31 - 2
"""What fits the int32 of indexed data."""
EXTRA_TOKENS = 64
"""Added tokens that may lie beyond the model's vocabulary, as long as no text contains one: published copies have a
padding token there, or a few."""
MOST_SPECIAL = 1000
"""Tokens that a tokenizer may add to each text."""
MOST_GROWTH = 1000
"""How many times longer a text may become by what the normalizer replaces."""
FAST = "PreTrainedTokenizerFast"
"""transformers' name of whatever a tokenizer.json holds."""
NOT_TAKEN = frozenset(
    "auto_map chat_template fast_tokenizer_files gguf_file init_inputs is_local local_files_only "
    "merges_file name_or_path processor_class sp_model_kwargs special_tokens_map_file spm_file tokenizer_file "
    "tokenizer_object trust_remote_code vocab_file added_tokens_file from_slow _from_auto _commit_hash".split()
)
"""Of tokenizer_config.json: names of other files, of code, what is drawn at random, and what has nothing to do with
token ids."""
PROBE = "The cat, 1\u00e9 \u65e5\n"
"""Encoded once at loading, so that a tokenizer that can encode nothing is found before any work."""
KEPT_OF_CONFIG = ("model_type", "tokenizer_class", "transformers_version")


def load_tokenizer(directory: Path | str, vocab_size: int | None = None, chat: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `directory`. Never reaches the network, never runs code from the directory.

    With `vocab_size` it is checked against the model: `check_tokenizer`. With `chat` documents are conversations: those
    who read text for it ask `form_of`, and `document_ids` applies the chat template of `directory`.
    """
    directory = Path(directory)
    _check_present(directory)
    with _room(directory), tempfile.TemporaryDirectory(prefix="tokenizer-") as clean:
        _fill(directory, Path(clean))
        tokenizer = _load(directory, Path(clean))
    tokenizer.name_or_path = str(directory)
    undraw(tokenizer)
    _check_ids(tokenizer, str(directory))
    if vocab_size is not None:
        check_tokenizer(tokenizer, vocab_size, str(directory))
    if chat:
        tokenizer.conversations = Conversations(tokenizer, directory)  # type: ignore[attr-defined]
    return tokenizer


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Conversations | None:
    """What makes conversations text for a tokenizer; None where documents are text already."""
    found: Conversations | None = getattr(tokenizer, "conversations", None)
    return found


def form_of(tokenizer: PreTrainedTokenizerBase) -> Form:
    """How rows of files become documents for a tokenizer."""
    return chat_of(tokenizer) or TEXT


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template that is applied; None without one."""
    chat = chat_of(tokenizer)
    return None if chat is None else chat.sha256


def refuse_prepared(tokenizer: PreTrainedTokenizerBase | None, key: str) -> None:
    """UserError where text that is token ids already, given to an option, is to go through a chat template."""
    if tokenizer is not None and chat_of(tokenizer) is not None:
        raise UserError(
            f"--apply-chat-template: --{key.replace('_', '-')} is preprocessed; allowed: rows with messages, or the "
            "option given to `preprocess` and left out here"
        )


def about_chat(template: str | None) -> dict[str, str]:
    """What a record of text says where a chat template, of that SHA-256, has made it."""
    return {} if template is None else {"chat_template_sha256": template}


def _room(directory: Path) -> contextlib.AbstractContextManager[None]:
    """While active, an error over the folder for transformers is a `UserError`."""
    return fenced(f"{directory}: the tokenizer cannot be laid out", "make room where TMPDIR says")


def _check_present(directory: Path) -> None:
    if not directory.is_dir():
        kind = "is no folder" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {kind}; give a folder that holds a tokenizer, such as the model's")
    if not tokenizer_files(directory):
        raise UserError(NOTHING.format(directory))


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds pieces and their ids."""
    return bool(_vocabularies(directory))


def _vocabularies(directory: Path) -> list[Path]:
    """Files that hold pieces and their ids, in `directory` itself."""
    about = ("config", "template", "special_tokens_map", "added_tokens")
    files = [file for file in tokenizer_files(directory) if file.parent == directory]
    return [file for file in files if not any(word in file.name for word in about)]


# --- models of other libraries ---


def open_sentencepiece(content: bytes, file: Path) -> Any:
    """SentencePiece's processor of the content of a file; UserError when it is none of its models."""
    from sentencepiece import SentencePieceProcessor

    _check_no_tiktoken(content, file)
    with fenced(f"{file}: not a SentencePiece model", AGAIN, native=True):
        if not content:  # which the library takes for no model yet
            raise ValueError("an empty file")
        return SentencePieceProcessor(model_proto=content)


def _check_no_tiktoken(content: bytes, file: Path) -> None:
    """UserError for a file in tiktoken's form, of which no library here knows how to cut a text before it is used."""
    first, _, _ = content[:1000].partition(b"\n")
    if TIKTOKEN.fullmatch(first.strip()):
        raise UserError(
            f"{file} is a tiktoken file, which holds pieces without the rules to cut a text; give a folder with the"
            " tokenizer.json that is published with the model, or made from it by transformers (needs tiktoken)"
        )


# --- what transformers is given ---


def _fill(directory: Path, clean: Path) -> None:
    """Put links to the tokenizer's files, and what of its JSON concerns a tokenizer, into the folder `clean`."""
    about = _model(directory)
    config = _read(directory / "tokenizer_config.json", _TokenizerConfig)
    taken = {key: value for key, value in config.items() if key not in NOT_TAKEN}
    _write(clean / "tokenizer_config.json", taken | {"tokenizer_class": _class(directory, config, about)})
    if about:
        _write(clean / "config.json", about)
    for name, shape in (("special_tokens_map.json", dict[str, Any]), ("added_tokens.json", Ids)):
        if (directory / name).is_file():
            _write(clean / name, _read(directory / name, shape))
    vocabularies = _vocabularies(directory)
    if not vocabularies:
        raise UserError(NOTHING.format(directory))
    for file in vocabularies:
        _give(file, clean / file.name)


def _give(file: Path, place: Path) -> None:
    """Make a file of pieces, checked where it is JSON, available as `place`."""
    content = read_regular(file, "a tokenizer's folder")
    if not (file.parent / "tokenizer.json").is_file():
        _check_model(content, file)
    if file.name == "tokenizer.json":
        _check_fast(parse_text_json(content, str(file), advice=AGAIN), file)
    elif file.suffix == ".json":
        parse_text_json(content, str(file), Ids if file.name == "vocab.json" else dict[str, Any], AGAIN)
    if content.startswith(MARK):
        place.write_bytes(content.removeprefix(MARK))
    else:
        place.symlink_to(file.resolve())


def _check_model(content: bytes, file: Path) -> None:
    if ".model" in file.name:
        open_sentencepiece(content, file)
    else:
        _check_no_tiktoken(content, file)


def _model(directory: Path) -> dict[str, str]:
    """What a tokenizer needs to know of its model: of config.json, or of the checkpoint whose tokenizer this is."""
    if directory.name == "tokenizer" and not (directory / "config.json").is_file():
        for about in directory.parent.glob("megatron_prune*.json"):  # of a Megatron checkpoint, or of one for MaxText
            model = read_json(about, "a checkpoint").get("model")
            if isinstance(model, dict) and isinstance(model.get("family"), str):
                return {"model_type": model["family"]}
    config = _read(directory / "config.json", dict[str, Any])
    return {key: config[key] for key in KEPT_OF_CONFIG if isinstance(config.get(key), str)}


def _class(directory: Path, config: dict[str, Any], about: dict[str, str]) -> str:
    """Name of the transformers class to load; UserError when only code that comes along could read the files."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    given = config.get("tokenizer_class") or about.get("tokenizer_class")
    if given is None and not _code(config):
        usual = TOKENIZER_MAPPING_NAMES.get(about.get("model_type", ""))
        return usual if usual and usual != "MistralCommonBackend" else FAST
    if given is not None and _is_known(given):
        return given
    if (directory / "tokenizer.json").is_file():
        return FAST
    raise UserError(
        f"{directory}: its tokenizer is {brief(_code(config) or given)}, which transformers {version('transformers')}"
        " does not have, and code of a model is never run; give a folder with tokenizer.json, or upgrade transformers"
        " (where you trust that code: AutoTokenizer.from_pretrained(..., trust_remote_code=True).save_pretrained(NEW))"
    )


def _code(config: dict[str, Any]) -> str | None:
    """The class of the model's own code that its configuration names for the tokenizer."""
    found = config.get("auto_map")
    found = found.get("AutoTokenizer") if isinstance(found, dict) else found
    listed = found if isinstance(found, list) else [found]
    return next((name for name in reversed(listed) if isinstance(name, str)), None)


def _is_known(name: str) -> bool:
    """Whether transformers has a tokenizer of that name; it would load anything else of its own just as well."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = [tokenizer_class_from_name(word) for word in (name, f"{name}Fast")] if name.isidentifier() else []
    return any(isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase) for kind in found)


class _AddedToken(TypedDict, total=False):
    content: Required[str]


class _Template(TypedDict):
    name: str
    template: str


Token = str | _AddedToken | None
Id = Annotated[int, Gt(-1), Lt(LARGEST_ID + 1)]
Ids = dict[str, Id]


class _TokenizerConfig(TypedDict, total=False):
    """What is used here of tokenizer_config.json, whatever else it holds."""

    tokenizer_class: str | None
    bos_token: Token
    eos_token: Token
    unk_token: Token
    pad_token: Token
    chat_template: str | list[_Template] | dict[str, str] | None
    added_tokens_decoder: dict[Id, _AddedToken]


def _read(file: Path, shape: Any) -> dict[str, Any]:
    """A JSON object of a form that `shape` describes in part, as it is; empty without the file."""
    if not file.is_file():
        return {}
    content: dict[str, Any] = parse_text_json(read_regular(file, "a tokenizer's folder"), str(file), advice=AGAIN)
    check_shape(content, str(file), shape, AGAIN)
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


# --- tokenizer.json ---


def _check_fast(content: dict[str, Any], file: Path) -> None:
    """UserError for a tokenizer.json of a later tokenizers library, or one that makes texts grow without measure."""
    later = list(_later(content))
    if later:
        raise UserError(
            f"{file} was written by a newer tokenizers library: {', '.join(later[:3])} is unknown to the one"
            f" installed ({version('tokenizers')}); upgrade it: pip install -U tokenizers transformers"
        )
    growth = math.prod(_replacements(content.get("normalizer")))
    if growth > MOST_GROWTH:
        raise UserError(
            f"{file}: its normalizer makes texts up to {growth:.3g} times longer; allowed: {MOST_GROWTH}; {AGAIN}"
        )


def _later(content: dict[str, Any]) -> Iterator[str]:
    """Kinds of parts in a tokenizer.json that the installed library does not have."""
    import tokenizers

    if content.get("version", "1.0") != "1.0":
        yield f"version {brief(content['version'])}"
    for key, module in (
        ("model", tokenizers.models),
        ("normalizer", tokenizers.normalizers),
        ("pre_tokenizer", tokenizers.pre_tokenizers),
        ("post_processor", tokenizers.processors),
        ("decoder", tokenizers.decoders),
    ):
        kinds = [part.get("type") for part in _parts(content.get(key))]
        yield from (f"{key} {brief(kind)}" for kind in kinds if isinstance(kind, str) and not hasattr(module, kind))


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer.json, and those that it is a sequence of."""
    if isinstance(node, dict):
        yield node
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            children = node.get(key)
            for child in children if isinstance(children, list) else []:
                yield from _parts(child)


def _replacements(normalizer: Any) -> Iterator[int]:
    """How many characters each step of a normalizer can put in the place of one."""
    for part in _parts(normalizer):
        content = part.get("content")
        if part.get("type") == "Replace" and isinstance(content, str):
            yield max(len(content), 1)


# --- loading ---


def _load(directory: Path, clean: Path) -> PreTrainedTokenizerBase:
    about = {"_name_or_path": str(directory)} | _read(clean / "config.json", dict[str, Any])
    installed = ", ".join(f"{library} {version(library)}" for library in ("tokenizers", "transformers"))
    advice = f"{AGAIN}, or upgrade if it was written by newer libraries (installed: {installed})"
    with fenced(f"{directory}: the tokenizer does not load", advice, native=True), without_triton():
        return AutoTokenizer.from_pretrained(
            str(clean), config=PreTrainedConfig.from_dict(about), local_files_only=True, trust_remote_code=False
        )


def _check_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """UserError for a tokenizer without pieces, with ids that no data set holds, or one that buries texts in tokens."""
    with fenced(f"{name}: the tokenizer is damaged", AGAIN, native=True):
        ids = tokenizer.get_vocab().values() if tokenizer.vocab_size else ()
        added = tokenizer.num_special_tokens_to_add(pair=False)
        if added <= MOST_SPECIAL:
            tokenizer(PROBE)
    if not ids:
        raise UserError(f"{name}: the tokenizer has no pieces; {AGAIN}")
    if not 0 <= min(ids) <= max(ids) <= LARGEST_ID:
        raise UserError(f"{name}: the tokenizer's ids reach {max(ids)}; allowed: 0 to {LARGEST_ID}; {AGAIN}")
    if added > MOST_SPECIAL:
        raise UserError(f"{name}: the tokenizer adds {added} tokens to each text; allowed: {MOST_SPECIAL}; {AGAIN}")


def undraw(tokenizer: PreTrainedTokenizerBase) -> None:
    """No merge is left out at random: every process and every run must see the same ids."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if model is not None and getattr(model, "dropout", None):
        model.dropout = None


# --- use ---


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str = "tokenizer") -> None:
    """A `UserError` when the tokenizer is not the model's: it has pieces that the model has no embedding for.

    Up to `EXTRA_TOKENS` added tokens may lie beyond, such as the padding token of many copies of LLaMA-2: from now on
    `tokenize` refuses a text that holds one.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if len(beyond) > EXTRA_TOKENS or not beyond.keys() <= tokenizer.get_added_vocab().keys():
        raise UserError(
            f"{name}: the tokenizer does not fit the model: its ids reach {max(beyond.values())}, the model's"
            f" vocabulary has {vocab_size} rows; give the tokenizer that belongs to the model"
        )
    tokenizer.model_rows = vocab_size  # type: ignore[attr-defined]


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of a tokenizer, plus one."""
    return int(max(tokenizer.get_vocab().values())) + 1


def model_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids below this one have an embedding in the model that the tokenizer was checked against, if it was."""
    rows = getattr(tokenizer, "model_rows", None)
    return vocabulary(tokenizer) if rows is None else int(rows)


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], **more: Any) -> list[list[int]]:
    """Token ids of each document, of any length, with the special tokens that the tokenizer adds."""
    with encoding(tokenizer.name_or_path):
        encoded = tokenizer(list(documents), return_attention_mask=False, verbose=False, truncation=False, **more)
    rows = getattr(tokenizer, "model_rows", None)
    found: list[list[int]] = encoded["input_ids"]
    if rows is not None:
        check_rows(tokenizer, max((max(ids, default=0) for ids in found), default=0), rows)
    return found


def document_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[list[int]]:
    """Token ids of each document of `form_of`; a chat template writes special tokens itself, and none are added."""
    chat = chat_of(tokenizer)
    if chat is None:
        return tokenize(tokenizer, documents)
    return tokenize(tokenizer, list(map(chat.render, documents)), add_special_tokens=False)


def check_rows(tokenizer: PreTrainedTokenizerBase, largest: int, rows: int) -> None:
    """A `UserError` when an id that a text gave has no embedding in the model."""
    if largest >= rows:
        token = brief(tokenizer.convert_ids_to_tokens(largest))
        raise UserError(
            f"{tokenizer.name_or_path}: the text holds the token {token}, id {largest}, and the model's vocabulary has"
            f" {rows} rows; take {token} out of the text, or give the tokenizer that belongs to the model"
        )


def encoding(name: str) -> contextlib.AbstractContextManager[None]:
    """While active, whatever a tokenizer raises over a text is a `UserError`."""
    return fenced(f"{name}: the tokenizer fails on a text", AGAIN, native=True)
