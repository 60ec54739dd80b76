"""Hostile bytes: JSON, pickles, safetensors, zips and indices that are damaged, of a wrong shape, or would run code.

Every function draws from a `random.Random`, so a seed repeats it. What a pickle would run only makes a marker file.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Hostile(NamedTuple):
    """Bytes, what was done to them, and whether nobody may accept them."""

    data: bytes
    note: str
    refuse: bool = False


DEEP = 100_000
VALUES = {
    "null": "null",
    "true": "true",
    "empty list": "[]",
    "empty object": "{}",
    "empty text": '""',
    "text": '"x"',
    "minus one": "-1",
    "zero": "0",
    "a half": "0.5",
    "1.0": "1.0",
    "2^31": "2147483648",
    "2^63": "9223372036854775808",
    "10^9": "1000000000",
    "10^400": "1" + "0" * 400,
    "5000 digits": "9" * 5000,
    "1e308": "1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "list": "[1, 2, 3]",
    "list of null": "[null]",
    "object": '{"a": 1}',
    "nested list": "[[[[]]]]",
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "lone surrogate": '"\\ud800"',
    "NUL": '"a\\u0000b"',
    "long text": '"' + "x" * 20_000 + '"',
    "long list": "[" + "0," * 100_000 + "0]",
    "path upwards": '"../../../../etc/passwd"',
    "line break": '"a\\nb\\u001b[31m"',
}
"""JSON values by name; most fit nowhere."""
_HOLE = "@@hole@@"


def places(value: Any, most: int = 4000) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value, outermost first."""
    found: list[tuple[Any, ...]] = []
    todo: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while todo and len(found) < most:
        path, item = todo.pop(0)
        found.append(path)
        inner = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        todo += [((*path, key), part) for key, part in inner]
    return found


def _owner(value: Any, path: Sequence[Any]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def with_value(content: Any, path: Sequence[Any], text: str) -> bytes:
    """`content` as JSON with the raw text of a value at `path`."""
    copy = json.loads(json.dumps(content))
    if not path:
        return text.encode("utf-8", "surrogatepass")
    _owner(copy, path)[path[-1]] = _HOLE
    return json.dumps(copy, indent=1).replace(json.dumps(_HOLE), text).encode()


def _value(draw: random.Random, content: Any) -> Hostile:
    path = draw.choice(places(content)[1:] or [()])
    name = draw.choice(list(VALUES))
    return Hostile(with_value(content, path, VALUES[name]), f"{'.'.join(map(str, path))}: {name}"[:200])


def _missing(draw: random.Random, content: Any) -> Hostile:
    copy = json.loads(json.dumps(content))
    path = draw.choice(places(content)[1:] or [()])
    if path:
        del _owner(copy, path)[path[-1]]
    return Hostile(json.dumps(copy).encode(), f"without {'.'.join(map(str, path))}"[:200])


def _unknown(draw: random.Random, content: Any) -> Hostile:
    copy = json.loads(json.dumps(content))
    path = draw.choice([p for p in places(copy) if isinstance(_at(copy, p), dict)] or [()])
    if isinstance(owner := _at(copy, path), dict):
        owner[draw.choice(["", "__class__", "x" * 3000, "a\x1b[0m", "é"])] = draw.choice([1, None, {}, "x"])
    return Hostile(json.dumps(copy).encode(), f"unknown key in {'.'.join(map(str, path))}"[:200])


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _whole(draw: random.Random, content: Any) -> Hostile:
    name = draw.choice([name for name in VALUES if name not in ("empty object", "object")])
    wrong = name not in ("list", "empty list", "long list", "list of null") or not isinstance(content, list)
    return Hostile(VALUES[name].encode("utf-8", "surrogatepass"), f"all of it: {name}", wrong)


def _twice(draw: random.Random, content: Any) -> Hostile:
    text = json.dumps(content)
    if not isinstance(content, dict) or not content:
        return _whole(draw, content)
    key = draw.choice(list(content))
    return Hostile((text[:-1] + f", {json.dumps(key)}: 1}}").encode(), f"{key} twice", True)


def _bytes(draw: random.Random, content: Any) -> Hostile:
    text = json.dumps(content).encode()
    name = draw.choice(["cut", "flipped", "NUL", "empty", "UTF-16", "no UTF-8", "spaces", "twice", "random"])
    cut = draw.randrange(1, max(2, len(text)))
    made = {
        "cut": text[:cut],
        "flipped": flipped(draw, text, 1),
        "NUL": text[:cut] + b"\0" + text[cut:],
        "empty": b"",
        "UTF-16": text.decode().encode("utf-16"),
        "no UTF-8": b'{"\xff\xfe": "\xc3("}',
        "spaces": b" \n" * 20,
        "twice": text + text,
        "random": draw.randbytes(200),
    }[name]
    return Hostile(made, name, name not in ("flipped", "NUL"))


JSON_KINDS: tuple[Callable[[random.Random, Any], Hostile], ...] = (
    _value,
    _value,
    _value,
    _missing,
    _missing,
    _unknown,
    _whole,
    _whole,
    _twice,
    _bytes,
)


def hostile_json(draw: random.Random, content: Any, number: int) -> Hostile:
    """A mutation of a JSON document; `number` goes through the kinds."""
    return JSON_KINDS[number % len(JSON_KINDS)](draw, content)


def flipped(draw: random.Random, data: bytes, times: int) -> bytes:
    """`data` with a few bytes changed."""
    copy = bytearray(data)
    for _ in range(times if copy else 0):
        copy[draw.randrange(len(copy))] ^= draw.randrange(1, 256)
    return bytes(copy)


def damaged(draw: random.Random, data: bytes) -> Hostile:
    """Any file, cut, emptied, filled with others or with a few bytes changed."""
    kinds = [
        Hostile(data[: draw.randrange(max(1, len(data)))], "cut", True),
        Hostile(b"", "empty", True),
        Hostile(draw.randbytes(draw.choice([1, 8, 100, 5000])), "random bytes", True),
        Hostile(flipped(draw, data, draw.choice([1, 3, 30])), "flipped bytes"),
        Hostile(bytes(len(data)), "zeros", True),
        Hostile(data + draw.randbytes(64), "longer"),
    ]
    return draw.choice(kinds)


# --- pickles ---


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def _dotted(module: str, name: str) -> bytes:
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


PLANNER, METADATA = "torch.distributed.checkpoint.planner", "torch.distributed.checkpoint.metadata"
TABLE_CLASSES = (
    (PLANNER, "WriteItemType"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    (METADATA, "Metadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "MetadataIndex"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
)


def _rewired(code: str, module: str, name: str) -> bytes:
    """BUILD on an allowed class gives it members of the attacker's choice, through which a getattr reaches `exec`."""
    owner, members = b"h\x00", ("__new__", "__globals__", "get")
    table = b"}(" + b"".join(_text(each) + owner for each in members) + b"u"
    values = b"}(" + b"".join(_text(each) + owner for each in ("__builtins__", "exec", code)) + b"u"
    state = b"N}(" + _text("_member_map_") + table + _text("_value2member_map_") + values + b"u\x86b0"

    def attribute(of: bytes, each: str) -> bytes:
        return _name("builtins", "getattr") + of + _text(each) + b"\x86R"

    scope = attribute(attribute(attribute(owner, "__new__"), "__globals__"), "get")
    run = _call(attribute(_call(scope, _text("__builtins__")), "get"), _text("exec"))
    return b"\x80\x02" + _name(module, name) + b"q\x00" + state + _call(run, _text(code)) + b"."


def running_pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that make `marker` when something loads them without care."""
    code, touch = f"open({str(marker)!r}, 'w')", f"touch '{marker}'"
    opened = (_text(str(marker)), _text("w"))
    made = {
        "os.system": _call(_name("os", "system"), _text(touch)),
        "posix.system": _call(_name("posix", "system"), _text(touch)),
        "builtins.exec": _call(_name("builtins", "exec"), _text(code)),
        "builtins.eval": _call(_name("builtins", "eval"), _text(code)),
        "builtins.open": _call(_name("builtins", "open"), *opened),
        "io.open": _call(_name("io", "open"), *opened),
        "runpy": _call(
            _name("runpy", "_run_code"),
            _call(_name("builtins", "compile"), _text(code), _text(""), _text("exec")),
            b"}",
        ),
        "pickle.loads": _call(_name("pickle", "loads"), _raw(_call(_name("os", "system"), _text(touch)) + b".")),
        "partial": _name("functools", "partial") + b"(" + _name("os", "system") + _text(touch) + b"t\x81)R",
        "subprocess": _call(_name("subprocess", "call"), b"](" + _text("touch") + _text(str(marker)) + b"e"),
        "numpy": _call(_name("numpy", "save"), _text(str(marker)), b"K\x01"),
        "torch.save": _call(_name("torch", "save"), b"K\x01", _text(str(marker))),
        "pathlib": _call(_name("pathlib", "Path.touch"), _call(_name("pathlib", "PosixPath"), _text(str(marker)))),
    }
    whole = {name: b"\x80\x02" + body + b"." for name, body in made.items()}
    whole["INST"] = b"(" + _text(touch) + b"ios\nsystem\n."
    whole["OBJ"] = b"(" + _name("os", "system") + _text(touch) + b"o."
    whole["stack global"] = b"\x80\x04" + _call(_dotted("os", "system"), _text(touch)) + b"."
    whole["dotted"] = b"\x80\x04" + _call(_dotted(METADATA, "os.system"), _text(touch)) + b"."
    whole["dotted class"] = b"\x80\x04" + _dotted(PLANNER, "WriteItemType.__new__.__globals__") + b"."
    whole["getattr"] = b"\x80\x02" + _call(
        _call(_name("builtins", "getattr"), _name("os", "path"), _text("os")), _text(touch)
    )
    whole["getattr"] += b"."
    for module, name in TABLE_CLASSES:
        whole[f"BUILD on {name}"] = _rewired(code, module, name)
    return whole


def broken_pickles() -> dict[str, bytes]:
    """Pickles that run nothing and hold nothing of use."""
    many = 100_000
    return {
        "None": b"N.",
        "number": b"K\x01.",
        "empty dict": b"}.",
        "list": b"].",
        "text": _text("x") + b".",
        "empty": b"",
        "only an end": b".",
        "memo": b"h\xff.",
        "long number": b"\x8b\xff\xff\xff\x7f.",
        "negative length": b"\x8b\xff\xff\xff\xff.",
        "huge bytes": b"\x8e" + struct.pack("<Q", 2**62) + b".",
        "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
        "deep tuples": b")" + b"\x85" * many + b".",
        "deep lists": b"]" * many + b"a" * (many - 1) + b".",
        "marks": b"(" * many + b".",
        "items of a number": b"K\x01(K\x01K\x02u.",
        "list as a key": b"}]K\x01s.",
        "itself": b"]q\x00h\x00a.",
        "extension": b"\x82\x01.",
        "persistent": b"Pname\n.",
        "no UTF-8": b"X\x02\x00\x00\x00\xff\xfe.",
        "protocol 99": b"\x80\x63N.",
        "unknown name": _name("nowhere", "nothing") + b".",
        "empty Metadata": b"\x80\x02" + _name(METADATA, "Metadata") + b")\x81}b.",
        "state of text": b"\x80\x02" + _name(METADATA, "Metadata") + b")\x81" + _text("x") + b"b.",
        "members": b"\x80\x02" + _name(METADATA, "Metadata") + b")\x81}(" + _text("state_dict_metadata") + b"NubN.",
        "Size of text": b"\x80\x02" + _call(_name("torch", "Size"), b"](" + _text("x") + b"e") + b".",
        "huge Size": b"\x80\x02"
        + _call(_name("torch", "Size"), b"](\x8a\x08" + struct.pack("<q", 2**60) + b"e")
        + b".",
        "unknown dtype": b"\x80\x02" + _name("torch", "float33") + b".",
        "unknown layout": b"\x80\x02" + _call(_name("torch.serialization", "_get_layout"), _text("os.system")) + b".",
    }


def torch_zip(pickled: bytes, root: str = "archive", more: dict[str, bytes] | None = None) -> bytes:
    """A file of torch.save's with this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        parts = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", "data/0": bytes(64)} | (more or {})
        for name, data in parts.items():
            archive.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


# --- safetensors ---


def safetensors(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A file with this header (an object, or bytes) and, unless it is right, this length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def hostile_safetensors(draw: random.Random, data: bytes, number: int) -> Hostile:
    """A mutation of a safetensors file; `number` goes through the kinds."""
    header, body = split_safetensors(data)
    kinds = [_length, _entry, _entry, _entry, _names, _header, _body, _numbers]
    return kinds[number % len(kinds)](draw, header, body)


def _length(draw: random.Random, header: dict[str, Any], body: bytes) -> Hostile:
    length = draw.choice([0, 1, 2, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(json.dumps(header)) - 1])
    return Hostile(safetensors(header, body, length), f"header length {length}", True)


def _entry(draw: random.Random, header: dict[str, Any], body: bytes) -> Hostile:
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    changes: list[dict[str, Any]] = [
        {"dtype": value} for value in ("F99", "", None, 5, ["F32"], "I8", "f32", "C64", "F4")
    ]
    changes += [
        {"shape": value} for value in ([-1], [2**62, 4], [0], "x", None, [1.5], [[1]], [10**30], [2**32, 2**32])
    ]
    changes += [{"shape": [*entry["shape"], 1]}, {"shape": entry["shape"][::-1] + [2]}]
    changes += [
        {"data_offsets": value}
        for value in ([end, start], [start, end + 4], [-4, end], [start], None, "x", [start, 2**63], [start + 1, end])
    ]
    changes += [{"data_offsets": [0, end - start]} if start else {"data_offsets": [4, end]}, {"extra": 1}]
    change = draw.choice(changes)
    copy = {key: dict(value) if key != "__metadata__" else value for key, value in header.items()}
    copy[name] |= change
    return Hostile(safetensors(copy, body), f"{name}: {change}"[:200], "extra" not in change)


def _names(draw: random.Random, header: dict[str, Any], body: bytes) -> Hostile:
    name = draw.choice([key for key in header if key != "__metadata__"])
    new = draw.choice(["", "x" * 5000, "a\0b", "../x", "\ud800", "model.layers.99999999999.x.weight", "a\nb", None])
    copy = {(new if key == name else key): value for key, value in header.items() if new is not None or key != name}
    return Hostile(safetensors(copy, body), f"{name} is now {new!r}"[:120], True)


def _header(draw: random.Random, header: dict[str, Any], body: bytes) -> Hostile:
    made = _whole(draw, header) if draw.random() < 0.5 else _bytes(draw, header)
    return Hostile(safetensors(made.data, body), f"header: {made.note}", made.refuse)


def _body(draw: random.Random, header: dict[str, Any], body: bytes) -> Hostile:
    whole = safetensors(header, body)
    cut = draw.choice([0, 1, 7, 8, 9, len(whole) - 1, len(whole) - 400])
    if draw.random() < 0.7:
        return Hostile(whole[:cut], f"cut to {cut} bytes", True)
    return Hostile(whole + bytes(100), "longer by 100 bytes", True)


def _numbers(draw: random.Random, header: dict[str, Any], body: bytes) -> Hostile:
    return Hostile(safetensors(header, flipped(draw, body, 20)), "flipped bytes of weights")


# --- zips ---


def rezipped(data: bytes, change: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = 0) -> bytes:
    """A zip with its members changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method or zipfile.ZIP_STORED) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(value: Any) -> bytes:
    """An array as numpy's file."""
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def npy_header(header: bytes, body: bytes = bytes(64)) -> bytes:
    """numpy's file with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


NPY_HEADERS = (
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (",
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624,), }",
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    b"{'descr': '<f99', 'fortran_order': False, 'shape': (8,), }",
    b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (8,), }",
    b"{'descr': '|u1', 'fortran_order': 5, 'shape': (8,), }",
    b"{'descr': '|u1'}",
    b"(" * 3000,
    b"__import__('os').system('x')",
    b"",
    b"\xff\xfe",
    b"'''",
)


class _Maker:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch '{self.marker}'",)


def hostile_npz(draw: random.Random, data: bytes, number: int, marker: Path) -> Hostile:
    """A mutation of a mask file; `number` goes through the kinds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    masks = [name for name in names if not name.startswith("__") and "shape" not in name]
    name = draw.choice(masks)
    arrays: dict[str, bytes] = {
        "objects": npy(np.array([_Maker(marker)], dtype=object)),
        "float": npy(np.ones(8)),
        "empty": npy(np.zeros(0, np.uint8)),
        "scalar": npy(np.uint8(1)),
        "text": npy(np.array("2:4")),
        "bytes": b"xyz",
        "nothing": b"",
        "large": npy(np.zeros(3_000_000, np.uint8)),
        "complex": npy(np.ones(8, np.complex64)),
        "negative": npy(np.array([-1, -2])),
        "pickle": b"\x80\x04N.",
        **{f"header {i}": npy_header(header) for i, header in enumerate(NPY_HEADERS)},
    }
    kind = number % 6
    if kind in (0, 1, 2):
        where = [name, name.replace(".npy", ".shape.npy"), "__pattern__.npy"][kind]
        which = draw.choice(list(arrays))
        return Hostile(rezipped(data, lambda found: found | {where: arrays[which]}), f"{where}: {which}", True)
    if kind == 3:
        return _renamed(draw, data, name)
    if kind == 4:
        return _bits_of_zip(draw, data)
    made = damaged(draw, data)
    return Hostile(made.data, made.note, made.refuse and made.note != "longer")


def _renamed(draw: random.Random, data: bytes, name: str) -> Hostile:
    new = draw.choice(["../../x.npy", "/tmp/x.npy", "model.layers.9999.x.npy", "a\nb.npy", "x" * 3000 + ".npy", None])

    def change(found: dict[str, bytes]) -> dict[str, bytes]:
        rest = {key: value for key, value in found.items() if key != name}
        return rest if new is None else rest | {new: found[name]}

    return Hostile(rezipped(data, change), f"{name} is now {new!r}"[:120], new is not None)


def _bits_of_zip(draw: random.Random, data: bytes) -> Hostile:
    """Flags and compression of a member, in both of the zip's headers."""
    copy, number = bytearray(data), draw.choice([1, 0x41, 8, 12, 14, 20, 93, 97, 99])
    flags = number in (1, 0x41)
    local, central = data.find(b"PK\x03\x04"), data.find(b"PK\x01\x02")
    for at, offset in ((local, 6 if flags else 8), (central, 8 if flags else 10)):
        struct.pack_into("<H", copy, at + offset, number)
    return Hostile(bytes(copy), f"zip {'flags' if flags else 'compression'} {number}", True)


# --- indices of token files ---


def hostile_index(draw: random.Random, data: bytes, number: int) -> Hostile:
    """A mutation of a .idx file; `number` goes through the kinds."""
    count, documents = struct.unpack_from("<QQ", data, 18)
    parts = {
        "lengths": np.frombuffer(data, "<i4", count, 34),
        "pointers": np.frombuffer(data, "<i8", count, 34 + 4 * count),
        "documents": np.frombuffer(data, "<i8", documents, 34 + 12 * count),
    }
    if number % 3 == 0:
        at, form, value = draw.choice(
            [(0, "<B", 0), (9, "<Q", 2), (9, "<Q", 2**63), (17, "<B", 0), (17, "<B", 99), (17, "<B", 4)]
            + [(place, "<Q", value) for place in (18, 26) for value in (0, 1, 2**31, 2**62, 2**64 - 1)]
        )
        copy = bytearray(data)
        struct.pack_into(form, copy, at, value)
        return Hostile(bytes(copy), f"{value} at byte {at}", True)
    if number % 3 == 1:
        made = damaged(draw, data)
        return Hostile(made.data, made.note, made.refuse)
    which = draw.choice(list(parts))
    copied = {key: value.copy() for key, value in parts.items()}
    array = copied[which]
    limits = np.iinfo(array.dtype)
    values = [-1, limits.min, limits.max, 0, 1, 2**30]
    value = draw.choice(values)
    if draw.random() < 0.3:
        array[:] = value
    else:
        array[draw.choice([0, len(array) // 2, len(array) - 1])] = value
    wrong = not all(np.array_equal(copied[key], parts[key]) for key in parts)
    return Hostile(data[:34] + b"".join(copied[key].tobytes() for key in parts), f"{which}: {value}", wrong)


def crc(data: bytes) -> str:
    """CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"
