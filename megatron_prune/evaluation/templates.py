"""Templates of task definitions: jinja as far as questions and answers need it, with an end to time and memory.

A template is somebody's text. jinja's sandbox keeps it from Python's objects; here it also has no macros and no other
files, only filters and methods of the tables below, and limits: a loop ends, and no text or list grows beyond any row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import regex
from jinja2 import BaseLoader, StrictUndefined, nodes, pass_environment
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_TEMPLATE = 100_000
"""Characters of a template."""
MOST_ROUNDS = 100_000
"""Of all loops of a template together, for one row."""
MOST_TEXT = 10_000_000
"""Characters of any text, and members of any list, that a template makes."""
MOST_COMPILED = 100
"""Templates that are kept."""
MOST_DIGITS = 40
"""Of a text that is to be a number."""
WORK = 50
"""Characters or members that a filter or method works on in the time of a round."""
MOST_SECONDS = 1.0
"""For one regular expression."""
REFUSED = (
    *(nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block),
    *(nodes.ScopedEvalContextModifier, nodes.EvalContextModifier, nodes.FilterBlock, nodes.AssignBlock, nodes.With),
)
FILTER_NAMES = (
    "abs capitalize count d default dictsort e escape first float int items last length list lower map max min reject "
    "rejectattr reverse safe select selectattr sort string sum title tojson trim unique upper"
)
"""jinja's filters that make nothing larger than they are given."""
METHODS = frozenset(
    "capitalize casefold count endswith find get index isalnum isalpha isdecimal isdigit islower "
    "isnumeric isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values".split()
)
"""Methods of text, lists and dicts that a template may call; `join` and `replace` have a limit of their own."""


def environment() -> Sandbox:
    """What lm-eval renders templates with."""
    return Sandbox(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with tables of what there is, and limits."""

    intercepted_binops = frozenset(("+", "-", "*", "**", "/", "//", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        own = {"join": _join_filter, "replace": _replace, "regex_replace": _regex_replace, "int": _int, "sum": _sum}
        named = {name: FILTERS[name] for name in FILTER_NAMES.split()} | own
        self.filters = {
            **{name: self._charged(function) for name, function in named.items()},
            **{_ROUNDS: _rounds, _JOINED: _joined, _BOUNDED: _bounded},
        }
        self.globals = {"range": _range, "dict": dict}
        self.concat = _concat  # type: ignore[method-assign,assignment]
        self.left = 0
        self.compiled: dict[str, Any] = {}

    def _charge(self, value: Any) -> None:
        """Work on a whole text or list counts as rounds of a loop do."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.left -= len(value) // WORK
            if self.left < 0:
                raise SecurityError(f"more work than {MOST_ROUNDS} rounds of loops is not allowed in a template")

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(function, "jinja_pass_arg"))  # before the value stands the environment or the like

        @functools.wraps(function)
        def call(*args: Any, **more: Any) -> Any:
            self._charge(args[first] if len(args) > first else None)
            return function(*args, **more)

        return call

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        if len(source) > MOST_TEMPLATE:
            raise TemplateSyntaxError(f"{len(source)} characters; allowed: at most {MOST_TEMPLATE}", 1)
        try:
            return _limited(super()._parse(source, name, filename))
        except RecursionError:
            raise TemplateSyntaxError("too deep", 1) from None

    def from_string(self, source: Any, *args: Any, **more: Any) -> Any:
        """As the base class, compiled once; rounds are counted from here on."""
        self.left = MOST_ROUNDS
        if args or more or not isinstance(source, str):
            return super().from_string(source, *args, **more)
        if source not in self.compiled:
            if len(self.compiled) >= MOST_COMPILED:
                self.compiled.clear()
            self.compiled[source] = super().from_string(source)
        return self.compiled[source]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As the base class; no result is much larger than what a row holds."""
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("% of a text is not allowed in a template")
        sizes = [len(value) if isinstance(value, str | bytes | list | tuple) else None for value in (left, right)]
        if operator in ("-", "/", "//"):
            _check_digits(left, right)
        if operator == "+" and None not in sizes:
            _check_size(sum(size or 0 for size in sizes))
        if operator == "*":
            _check_size(max(abs(_whole(left, sizes[0]) * _whole(right, sizes[1])), 0) if any(sizes) else 0)
            _check_digits(left, right)
        if operator == "**":
            if not all(isinstance(value, int | float) and abs(value) < 10_000 for value in (left, right)):
                raise SecurityError("a power beyond 10000 is not allowed in a template")
            _check_digits(float(abs(left)) if abs(right) < 64 else 10**300)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **more: Any) -> Any:  # type: ignore[override]
        """As the base class, of a method in the table or a global."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        self._charge(owner)
        if function in (_range, dict) or (type(owner) in _LIMITED and (type(owner), name) not in _OWN):
            if owner is not None and name not in METHODS:
                raise SecurityError(f"{name}() is not allowed in a template")
            return super().call(context, function, *args, **more)
        own = _OWN.get((type(owner), name))
        if own is None:
            raise SecurityError(f"a call of {name or type(function).__name__} is not allowed in a template")
        loops = ("_loop_vars", "_block_vars")  # jinja's own, for functions that ask for its context
        return own(owner, *args, **{key: value for key, value in more.items() if key not in loops})


def _limited(template: nodes.Template) -> nodes.Template:
    """Loops count their rounds, and `~` its characters; an error names what has no place in a template."""
    for node in list(template.find_all(nodes.Node)):
        if isinstance(node, REFUSED) or (isinstance(node, nodes.For) and node.recursive):
            raise TemplateSyntaxError(f"{type(node).__name__} is not allowed in a template", node.lineno)
        for field, value in list(node.iter_fields()):
            if isinstance(value, list):
                value[:] = [_wrapped(entry) for entry in value]
            elif isinstance(value, nodes.Node):
                setattr(node, field, _wrapped(value))
        if isinstance(node, nodes.For):
            node.iter = _as_filter(node.iter, _ROUNDS)
    return template


def _wrapped(value: Any) -> Any:
    """What makes lists and texts of others, with its limit around it."""
    if isinstance(value, nodes.Concat):
        return _as_filter(nodes.List(value.nodes, lineno=value.lineno), _JOINED)
    made = isinstance(value, nodes.List | nodes.Dict) or (isinstance(value, nodes.Tuple) and value.ctx == "load")
    return _as_filter(value, _BOUNDED) if made else value


_ROUNDS, _JOINED, _BOUNDED = "_rounds", "_joined", "_bounded"


def _as_filter(value: Any, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _check_size(size: float) -> None:
    if size > MOST_TEXT:
        raise SecurityError(f"a text or list of more than {MOST_TEXT} is not allowed in a template")


def _bounded(value: Any) -> Any:
    """`value`, unless it is too large when written out: a list may hold another one many times, and that likewise."""
    members, characters, waiting = MOST_ROUNDS, MOST_TEXT, [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            characters -= len(found)
        elif isinstance(found, list | tuple | dict):
            members -= len(found)
            waiting += (found.values() if isinstance(found, dict) else found) if members >= 0 else ()
        if members < 0 or characters < 0:
            raise SecurityError(f"a list of more than {MOST_ROUNDS} is not allowed in a template")
    return value


def _check_digits(*values: Any) -> None:
    if any(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > 1e18 for value in values):
        raise SecurityError("a number beyond 10^18 is not allowed in a template")


def _whole(value: Any, size: int | None) -> int:
    """What a value counts in a repetition: its length, or itself."""
    if size is not None:
        return size
    return int(value) if isinstance(value, int) else 1


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MOST_ROUNDS:
        raise SecurityError(f"a range of more than {MOST_ROUNDS} is not allowed in a template")
    return made


def _concat(parts: Iterable[str]) -> str:
    return _join("", parts)


def _join(separator: str, parts: Iterable[Any]) -> str:
    kept, size = [], 0
    for part in parts:
        text = str(part)
        size += len(text) + len(separator)
        _check_size(size)
        kept.append(text)
    return separator.join(kept)


def _joined(parts: Iterable[Any]) -> str:
    return _join("", parts)


def _join_filter(value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise SecurityError("join with an attribute is not allowed in a template")
    return _join(str(d), value)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_size(len(text) + (text.count(old) * len(new)))
    return text.replace(old, new, -1 if count is None else count)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    """jinja's filter for numbers that a row may hold: of a long text Python makes a number for minutes."""
    if base != 10 or (isinstance(value, str) and len(value) > MOST_DIGITS):
        raise SecurityError(f"int of more than {MOST_DIGITS} digits, or to a base, is not allowed in a template")
    return int(FILTERS["int"](value, default))


def _sum(values: Iterable[Any]) -> Any:
    """jinja's filter, of numbers only: a sum of lists copies the first ones again and again."""
    found = list(values)
    if not all(isinstance(value, int | float) for value in found):
        raise SecurityError("sum of anything but numbers is not allowed in a template")
    return sum(found)


def _regex_replace(text: Any, pattern: str, repl: str, count: int = 0) -> str:
    """lm-eval's filter, with an end: some expressions try more ways than there are seconds."""
    try:
        _check_size(len(str(text)) * (1 + len(repl)))
        return regex.sub(pattern, repl, str(text), count=count, timeout=MOST_SECONDS)
    except (TimeoutError, regex.error) as error:
        raise SecurityError(f"the regular expression is not usable ({error})") from None


@pass_environment
def _rounds(sandbox: Sandbox, values: Iterable[Any]) -> Iterator[Any]:
    """`values`, each of which is a round of a loop."""
    for value in values:
        sandbox.left -= 1
        if sandbox.left < 0:
            raise SecurityError(f"more than {MOST_ROUNDS} rounds of loops are not allowed in a template")
        yield _bounded(value)


_LIMITED: frozenset[type[Any]] = frozenset((str, list, tuple, dict, bytes, int, float, bool))
_OWN: dict[tuple[type[Any], str], Callable[..., Any]] = {(str, "join"): _join, (str, "replace"): _replace}
