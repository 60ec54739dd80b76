"""A pickle read as data: a machine of our own for the few opcodes and names that checkpoints need. Nothing is called.

A pickle is a program. Python's unpickler runs it on real classes, and even a short list of allowed ones is a way to
code (state may be set on classes, members may be any attribute). This machine knows no class at all: a name is a
`Name`, whatever would be called or made is a `Made`, and only the reader of a format turns those into values, by table.
No opcode needs more memory than the bytes it stands in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from typing import Any, NamedTuple

ORDERED = ("collections", "OrderedDict")
MOST_DEPTH = 100
"""Of values inside values."""


class Refused(ValueError):
    """The pickle is damaged, or does more than checkpoints need."""


class Name(NamedTuple):
    """A global that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Made:
    """What a pickle would make by calling `name` with `args` and setting `state`; it stays a description."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: Name, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


class Stored(NamedTuple):
    """A persistent id: the place of something outside the pickle."""

    place: tuple[Any, ...]


def read_pickle(data: bytes, names: Container[tuple[str, str]], places: bool = False) -> Any:
    """What a pickle of protocols 2 to 5 describes; `Refused` when it has other names than `names`.

    `places`: persistent ids are allowed. Values are None, bool, int, float, str, bytes, list, tuple, dict, `Name`,
    `Made` and `Stored`; lists and dicts may be shared, or contain themselves.
    """
    return _Machine(data, names, places).run()


def check_plain(value: Any, most: int) -> Any:
    """`value`, when it is a tree of plain values with at most `most` of them; otherwise `Refused`."""
    left = most
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > MOST_DEPTH:
            raise Refused(f"more than {most} values, or deeper than {MOST_DEPTH}")
        if isinstance(found, dict):
            if any(isinstance(key, Made) for key in found):
                raise Refused("an object as a key")
            waiting += [(entry, depth + 1) for entry in found.values()]
        elif isinstance(found, list) or type(found) is tuple:
            waiting += [(entry, depth + 1) for entry in found]
        elif isinstance(found, Name | Made | Stored):
            raise Refused(f"{type(found).__name__} in the wrong place")
    return value


class _Machine:
    """A stack, a memo, and a method for each opcode."""

    def __init__(self, data: bytes, names: Container[tuple[str, str]], places: bool) -> None:
        self.data, self.at = data, 0
        self.names, self.places = names, places
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, table = self.data, _OPCODES
        try:
            while True:
                opcode = data[self.at]
                self.at += 1
                if opcode == _STOP:
                    break
                table[opcode](self)
            return self.stack.pop()
        except KeyError:
            raise Refused(f"opcode {opcode:#x} at byte {self.at - 1}, or a value that is not there") from None
        except (IndexError, struct.error):
            raise Refused(f"it ends too early, at byte {self.at}") from None
        except (TypeError, AttributeError, UnicodeDecodeError) as error:
            raise Refused(f"byte {self.at}: {error}") from None

    # --- what the bytes hold ---

    def _take(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) != size:
            raise IndexError
        self.at += size
        return found

    def _number(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise IndexError
        found = self.data[self.at : end].decode()
        self.at = end + 1
        return found

    # --- opcodes ---

    def protocol(self) -> None:
        if not 2 <= self._take(1)[0] <= 5:
            raise Refused("a pickle of another protocol than 2 to 5")

    def frame(self) -> None:
        if self._number(_U8) > len(self.data) - self.at:
            raise IndexError

    def long1(self) -> None:
        size = self._take(1)[0]
        if size > 8:
            raise Refused(f"a number of {size} bytes")
        self.stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self.marks.pop()
        return found

    def tuple_(self) -> None:
        found = tuple(self._since_mark())
        self.stack.append(found)

    def tuple_of(self, size: int) -> None:
        stack = self.stack
        if len(stack) < size:
            raise IndexError
        stack[-size:] = [tuple(stack[-size:])]

    def appends(self) -> None:
        found = self._since_mark()
        self._list().extend(found)

    def append(self) -> None:
        found = self.stack.pop()
        self._list().append(found)

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise Refused("something is appended to what is no list")
        return self.stack[-1]

    def setitems(self) -> None:
        found = self._since_mark()
        if len(found) % 2:
            raise Refused("a key without a value")
        self._set(found)

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise Refused("a key is set in what is no dict")
        for place in range(0, len(pairs), 2):
            key = pairs[place]
            if type(key) not in (str, int, Made):
                raise Refused(f"a key of type {type(key).__name__}")
            target[key] = pairs[place + 1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, kind: struct.Struct) -> None:
        self.memo[self._number(kind)] = self.stack[-1]

    def get(self, kind: struct.Struct) -> None:
        self.stack.append(self.memo[self._number(kind)])

    def global_(self) -> None:
        module = self._line()
        self._named(module, self._line())

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._named(module, name)

    def _named(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)) or (module, name) not in self.names:
            raise Refused(f"it would run code: {module}.{name} has no place in a checkpoint")
        self.stack.append(Name(module, name))

    def make(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple:
            raise Refused("it would run code: what is called is no name of a checkpoint")
        if name == ORDERED:
            if args:
                raise Refused("an OrderedDict with content of its own")
            self.stack.append({})
        else:
            self.stack.append(Made(name, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Made or target.state is not None or state is None:
            raise Refused("it would run code: state is set on what is no new object of a checkpoint")
        target.state = state

    def stored(self) -> None:
        place = self.stack.pop()
        if not self.places or type(place) is not tuple:
            raise Refused("a place outside of the file")
        self.stack.append(Stored(place))

    def number(self, kind: struct.Struct) -> None:
        self.stack.append(self._number(kind))

    def text(self, kind: struct.Struct) -> None:
        self.stack.append(self._take(self._number(kind)).decode())

    def bytes_(self, kind: struct.Struct) -> None:
        self.stack.append(self._take(self._number(kind)))


_U1, _U2, _U4, _I4, _U8, _F8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<i", "<Q", ">d"))
_STOP = ord(".")


def _with(method: Callable[[_Machine, Any], None], argument: Any) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, argument)


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("J"): _with(_Machine.number, _I4),
    ord("K"): _with(_Machine.number, _U1),
    ord("M"): _with(_Machine.number, _U2),
    0x8A: _Machine.long1,
    ord("G"): _with(_Machine.number, _F8),
    0x8C: _with(_Machine.text, _U1),
    ord("X"): _with(_Machine.text, _U4),
    ord("C"): _with(_Machine.bytes_, _U1),
    ord("B"): _with(_Machine.bytes_, _U4),
    ord(")"): _push(()),
    ord("]"): lambda machine: machine.stack.append([]),
    ord("}"): lambda machine: machine.stack.append({}),
    ord("t"): _Machine.tuple_,
    0x85: _with(_Machine.tuple_of, 1),
    0x86: _with(_Machine.tuple_of, 2),
    0x87: _with(_Machine.tuple_of, 3),
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("s"): _Machine.setitem,
    ord("u"): _Machine.setitems,
    0x94: _Machine.memoize,
    ord("q"): _with(_Machine.put, _U1),
    ord("r"): _with(_Machine.put, _U4),
    ord("h"): _with(_Machine.get, _U1),
    ord("j"): _with(_Machine.get, _U4),
    ord("c"): _Machine.global_,
    0x93: _Machine.stack_global,
    ord("R"): _Machine.make,
    0x81: _Machine.make,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.stored,
}
