"""What comes from outside: JSON, YAML and the loaders of other libraries, read so that any mistake in it is one line.

A file from outside is data. It is opened only when it is an ordinary file of a bearable size, its JSON or YAML must
have the shape that a schema (pydantic's) asks for, and whatever another library raises over it becomes a `UserError`
that names the file, the key, what was given, what is allowed and what to do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml

from megatron_prune.errors import UserError, brief, one_line

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

T = TypeVar("T")

MOST_BYTES = 200_000_000
"""Of a JSON or YAML file; the largest tokenizers published have 40 MB."""
MOST_DIGITS = 40
"""Of a number in JSON; larger ones are no size, count or seed of anything."""
MOST_ITEMS = 1_000_000
"""Of a YAML file, counted with its aliases written out."""
RESTORE = "restore or rewrite it"
_POINTER = b"version https://git-lfs.github.com/spec/"
"""Start of what Git leaves in the place of a large file."""


def strict() -> ConfigDict:
    """`__pydantic_config__` of a dataclass or `model_config` of a model: no unknown keys, no conversion, no NaN."""
    return {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def open_regular(path: Path, what: str, most: int | None = MOST_BYTES) -> Any:
    """`path` opened for reading bytes; UserError unless it is an ordinary file of at most `most` bytes.

    A pipe, a device or a socket would be waited for, or read, for ever.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is not {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name; UnicodeEncodeError is one, too
        raise UserError(f"{str(path)!r} cannot be opened ({reason(error)}); give a file that can be read") from None
    about = os.fstat(handle)
    complaint = None
    if not stat.S_ISREG(about.st_mode):
        complaint = f"{path} is no ordinary file; give a file on a disk"
    elif os.pread(handle, len(_POINTER), 0) == _POINTER:
        complaint = f"{path} is a pointer of Git LFS, the file itself was not fetched; run `git lfs pull` in its folder"
    elif most is not None and about.st_size > most:
        complaint = f"{path} has {about.st_size} bytes; allowed: at most {most}; it is not {what}"
    if complaint is not None:
        os.close(handle)
        raise UserError(complaint)
    return os.fdopen(handle, "rb")


def read_regular(path: Path, what: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of an ordinary file of at most `most` bytes; UserError otherwise."""
    with open_regular(path, what, most) as file:
        return file.read()


# --- JSON ---


def read_json(path: Path, what: str, shape: Any = dict[str, Any]) -> Any:
    """The content of a JSON file as `shape`, a type that pydantic knows; UserError names the file and the key.

    `what` says what `path.parent` is when it holds such a file: "a pruning run".
    """
    return parse_json(read_regular(path, what), str(path), shape, f"{RESTORE}: it is not {what} as it is")


def read_format(path: Path, what: str, version: int, shape: Any, plain: bool = False) -> Any:
    """As `read_json`, of a file whose `format` tells versions apart: another one is named before its keys are.

    `plain`: its values, once checked, as they stand there, in objects and lists.
    """
    data, advice = read_regular(path, what), f"{RESTORE}: it is not {what} as it is"
    content = json_object(data, str(path), advice)
    found = content.get("format")
    if found != version or isinstance(found, bool):
        raise UserError(f"{path} has format {brief(found)}; this version reads format {version}: give {what}")
    checked = parse_json(data, str(path), shape, advice)
    return content if plain else checked


def parse_json(data: bytes, where: str, shape: Any = dict[str, Any], advice: str = RESTORE) -> Any:
    """As `read_json`, for bytes that stand at `where`."""
    try:
        text = data.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        if _ESCAPED.search(text):
            _check_texts(found)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({reason(error)}); {advice}") from None
    return _validated(lambda adapter: adapter.validate_json(text, strict=True), where, shape, advice)


def parse_text_json(data: bytes, where: str, shape: Any = dict[str, Any], advice: str = RESTORE) -> Any:
    """As `parse_json`, for JSON whose keys and values are anybody's text, such as the pieces of a vocabulary.

    A NUL or half a surrogate pair is as good a text as any there, and of a key given twice the last one counts.
    """
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({reason(error)}); {advice}") from None
    return check_shape(content, where, shape, advice)


def check_shape(value: Any, where: str, shape: Any, advice: str = RESTORE) -> Any:
    """`value`, parsed already, as `shape`; UserError names the key."""
    return _validated(lambda adapter: adapter.validate_python(value), where, shape, advice)


def json_object(data: bytes, where: str, advice: str = RESTORE) -> dict[str, Any]:
    """The JSON object in `data`, whatever its keys; UserError when it is none."""
    return parse_json(data, where, dict[str, Any], advice)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {brief(twice)} is given twice")
    return found


_ESCAPED = re.compile(r"\\u(0000|[dD][89a-fA-F])")
"""How JSON writes a NUL or half a surrogate pair; without an escape it cannot."""


def _check_texts(value: Any) -> None:
    """ValueError for a string anywhere in a value that is no text: a NUL in it, or half a surrogate pair."""
    if isinstance(value, str):
        check_name(value)
    elif isinstance(value, dict | list):
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            _check_texts(part)


def check_name(text: str) -> str:
    """`text`, when it can be part of a file's name and be printed; otherwise ValueError."""
    if "\0" in text:
        raise ValueError(f"a NUL in {brief(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{brief(text)} is not Unicode text") from None
    return text


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; allowed: at most {MOST_DIGITS}")
    return int(digits)


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _validated(validate: Callable[[TypeAdapter[Any]], Any], where: str, shape: Any, advice: str) -> Any:
    from pydantic import ValidationError

    try:
        return validate(_adapter(shape))
    except ValidationError as error:
        first, more = error.errors(include_url=False)[0], error.error_count() - 1
        others = f" (and {more} more)" if more else ""
        raise UserError(f"{where}{_mistake(first)}{others}; {advice}") from None
    except RecursionError as error:
        raise UserError(f"{where} is damaged ({reason(error)}); {advice}") from None


def _mistake(error: Mapping[str, Any]) -> str:
    """`: key a.b: Field required` and the like, from one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"])
    place = f": key {brief(key, 80)}" if key else ""
    given = "" if error["type"] in ("missing", "json_invalid") else f": {brief(error['input'])} given"
    return f"{place}{given}: {one_line(error['msg'], 120)}"


# --- YAML ---


class _PlainLoader(yaml.BaseLoader):
    """Text, lists and mappings only; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        check_keys(node)
        return super().construct_mapping(node, deep)


def check_keys(node: yaml.MappingNode) -> None:
    """YAML's own error for a mapping whose key is given twice, or is no text."""
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {brief(key.value)} is given twice", key.start_mark
            )
        seen.add(key.value)


def read_yaml(path: Path, what: str, loader: Any = _PlainLoader) -> Any:
    """The content of a YAML file; every value is text unless `loader` says otherwise. UserError when it is damaged."""
    data = read_regular(path, what)
    try:
        node = yaml.compose(data.decode("utf-8-sig"), Loader=loader)
        _count(node, {})
        if node is None:
            return None
        made = loader("")
        try:
            return made.construct_document(node)
        finally:
            made.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML, or damaged ({reason(error)}); correct it") from None


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Nodes below `node` with aliases written out; ValueError for more than `MOST_ITEMS` and for one inside itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias of a value inside itself")
        return known[id(node)]
    known[id(node)] = 0
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    total = 1 + sum(_count(part, known) for part in parts)
    if total > MOST_ITEMS:
        raise ValueError(f"more than {MOST_ITEMS} values, aliases written out")
    known[id(node)] = total
    return total


# --- other libraries ---


def reason(error: BaseException, limit: int = 160) -> str:
    """What an exception of another library says, on one short line: without a traceback that it carries along."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    traced = any(line.startswith("Traceback") for line in lines)
    first = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    text = (lines[-1] if traced else first) if lines else type(error).__name__
    return one_line(text, limit)


@contextlib.contextmanager
def fenced(what: str, advice: str, native: bool = False) -> Iterator[None]:
    """While active, whatever a foreign loader raises is a UserError: "`what` (why); `advice`". Logs are quiet.

    For loaders of files of others: what may be wrong with a file is no list that somebody could write down. `native`:
    also what the library's compiled code prints, such as a panic's account of itself.
    """
    with quiet(), _mute() if native else contextlib.nullcontext():
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{what} ({type(error).__name__}: {reason(error)}); {advice}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
                raise
            raise UserError(f"{what} ({reason(error)}); {advice}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While active, no library logs, warns or shows a bar."""
    before = logging.root.manager.disable
    bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if bars is None:
            del os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]
        else:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = bars


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """What compiled code writes to standard output and standard error goes nowhere."""
    if sys.stdout is not None:
        sys.stdout.flush()
    kept: dict[int, int] = {}
    for number in (1, 2):
        with contextlib.suppress(OSError):  # closed by whoever started the program
            kept[number] = os.dup(number)
    try:
        with open(os.devnull, "wb") as nowhere:
            for number in kept:
                os.dup2(nowhere.fileno(), number)
            yield
    finally:
        for number, place in kept.items():
            os.dup2(place, number)
            os.close(place)


# --- parts of schemas ---


def bounded(low: int, high: int) -> Any:
    """Schema of a whole number from `low` to `high`."""
    from pydantic import Field

    return Annotated[int, Field(strict=True, ge=low, le=high)]


def names(values: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(brief(value, 80) for value in list(values)[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")
