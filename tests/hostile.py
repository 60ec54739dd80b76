"""An honest JSON file made hostile in every way that a table can list, and what a reader may do about it: work, or
raise a UserError of one short line. Anything else is a fault.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import UserError

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "text", "..", "../x", "/etc/passwd", "x" * 5000, -1, 0, 1, 10**9, 2**63, 10**39),
    *(-0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf"), [], [[]], [None], ["x"], [-1, 2**40], {}, {"x": 1}),
)
"""What stands where something else is meant."""
MOST_LIST = 2
"""Items of a list that are changed, from its first."""
LONGEST = 500


def mutations(content: Any) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each hostile form of a JSON file."""
    yield from _raw(content)
    for value in VALUES:
        yield f"root={_short(value)}", _bytes(value)
    for path in _paths(content):
        for value in VALUES:
            yield f"{'.'.join(map(str, path))}={_short(value)}", _bytes(_with(content, path, value))
        yield f"{'.'.join(map(str, path))} missing", _bytes(_without(content, path))
    for path in [(), *(path for path in _paths(content) if isinstance(_at(content, path), dict))]:
        if isinstance(_at(content, path), dict):
            yield f"{'.'.join(map(str, path))}.unknown", _bytes(_with(content, (*path, "unknown"), 1))


def _raw(content: Any) -> Iterator[tuple[str, bytes]]:
    """Forms that no JSON writer makes."""
    honest = _bytes(content)
    text = honest.decode()
    key = next(iter(content)) if isinstance(content, dict) and content else "a"
    yield "empty", b""
    yield "cut", honest[: len(honest) // 2]
    yield "not utf-8", honest + b"\xff"
    yield "utf-16", text.encode("utf-16")
    yield "NUL", b"\0" * 64
    yield "deep list", b"[" * 100_000
    yield "deep object", b'{"a":' * 100_000
    yield "deep value", f"{{{json.dumps(key)}: {'[' * 100_000}".encode()
    yield "digits", f"{{{json.dumps(key)}: {'9' * 5000}}}".encode()
    yield "exponent", f"{{{json.dumps(key)}: 1e999999999}}".encode()
    yield "twice", f"{{{json.dumps(key)}: 1, {json.dumps(key)}: 2}}".encode()
    yield "escaped NUL", f'{{{json.dumps(key)}: "a\\u0000b"}}'.encode()
    yield "surrogate", f'{{{json.dumps(key)}: "\\ud800"}}'.encode()
    yield "surrogate in a list", f'{{{json.dumps(key)}: ["\\udfff"]}}'.encode()
    yield "surrogate key", b'{"\\ud800": 1}'


def _bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _short(value: Any) -> str:
    return repr(value)[:20]


def _paths(content: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values below `content`, of long lists and large tables of the first items only."""
    if isinstance(content, dict):
        parts: list[tuple[Any, Any]] = list(content.items())
    elif isinstance(content, list):
        parts = list(enumerate(content))[:MOST_LIST]
    else:
        return
    for key, value in parts:
        yield (*start, key)
        yield from _paths(value, (*start, key))


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _with(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(content)
    _at(changed, path[:-1])[path[-1]] = value
    return changed


def _without(content: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(content)
    del _at(changed, path[:-1])[path[-1]]
    return changed


def complaint(read: Callable[[], object]) -> str | None:
    """What a reader says of its file, None where it works; AssertionError for anything but one short line."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert text == " ".join(text.splitlines()) and len(text) < LONGEST and text.isprintable(), text
        return text
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    return None


def assert_harmless(file: Path, read: Callable[[], object], also: Callable[[], object] = lambda: None) -> int:
    """Every hostile form of the honest JSON `file` is read or refused in one line; how many were refused.

    `also` is called after each change, to make other files fit the changed one.
    """
    honest = file.read_bytes()
    assert complaint(read) is None, "the honest file is refused"
    wrong, refused = [], 0
    for name, data in mutations(json.loads(honest)):
        file.write_bytes(data)
        also()
        try:
            refused += complaint(read) is not None
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    file.write_bytes(honest)
    also()
    if wrong:
        pytest.fail(
            f"{len(wrong)} forms of {file.name} are neither read nor refused in one line:\n" + "\n".join(wrong[:30])
        )
    return refused
