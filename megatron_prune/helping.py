"""What `--help` prints: what must be given, what is given most, a method's own options, examples; all on request.

`--help-all` has every option, in the groups that the configuration is made of.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import SUPPRESS, ArgumentParser, HelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_prune.options import Entry, Options, entries, flag

METHOD_OPTIONS = "method_options"
HELP = ("-h", "--help")
ALL = "--help-all"
YAML = "options in YAML, keys as below with underscores; flags override it"
_REGISTERED = re.compile(r'^@register\("(\w+)"\)', re.MULTILINE)


def positional(config: type[Options]) -> list[Entry]:
    """The options whose values may stand before the first flag, in order; one that takes several is last."""
    known = {entry.key: entry for entry in entries(config)}
    usual = config.positional == Options.positional
    found = [known[key] for key in config.positional if key in known and (known[key].required or not usual)]
    many = next((at for at, entry in enumerate(found) if get_origin(entry.kind) is tuple), len(found))
    return found[: many + 1]


def method_names() -> list[str]:
    """Of the pruning methods, from their files alone: importing them takes seconds."""
    files = sorted((Path(__file__).parent / "methods").glob("*.py"))
    return [name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))]


def choices(kind: Any) -> list[str]:
    """Allowed words of a `Literal`, also inside an optional."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for part in get_args(kind) for word in choices(part)]


def metavar(kind: Any) -> str:
    """What stands for a value in help."""
    found = choices(kind)
    if found:
        return "{" + ",".join(found) + "}"
    words = {"int": "N", "float": "X", "bool": "{true,false}", "Path": "PATH"}
    return words.get(getattr(next(iter(get_args(kind)), kind), "__name__", ""), "VALUE")


def title(config: type[Options]) -> str:
    """The first line of its documentation."""
    return (config.__doc__ or config.__name__).strip().splitlines()[0]


def shown(value: Any) -> str:
    """A default in words."""
    if isinstance(value, tuple) and value:
        return " ".join(map(str, value))
    return "none" if value is None or value == () else str(value).lower() if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True)
class Method:
    """Of a pruning method, what its options are called and do."""

    name: str
    paper: str
    hyper: Mapping[str, dataclasses.Field[Any]]
    defaults: Mapping[str, Any]
    """Of options that are not its own."""
    idle: frozenset[type[Options]]
    """Groups of options that it has no use for."""


def text(config: type[Options], prog: str, method: Method | None = None, everything: bool = False) -> str:
    """The whole of it."""
    found = [entry for entry in entries(config) if entry.key != METHOD_OPTIONS]
    parser = ArgumentParser(
        usage=usage(config, prog),
        description=title(config),
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=28, width=110),
        add_help=False,
    )
    required = parser.add_argument_group("required")
    common = parser.add_argument_group("options")
    common.add_argument("--config", metavar="FILE.yaml", help=YAML)
    for entry in found:
        if entry.required:
            _add(required, entry, method)
    if everything or not config.basic:
        _add_all(parser, common, config, [entry for entry in found if not entry.required], method)
    else:
        known = {entry.key: entry for entry in found}
        own = () if method is None else method.defaults
        for key in dict.fromkeys([*config.basic, *own]):
            if method is None or known[key].group not in method.idle:
                _add(common, known[key], method)
    if method is not None and method.hyper:
        group = parser.add_argument_group(f"options of {method.name} ({method.paper})")
        for name, field in method.hyper.items():
            _add_one(group, name, field.type, f"{field.metadata.get('help', '')} (default: {shown(field.default)})")
    return parser.format_help() + "\n".join(["", *_end(config, prog, method, everything), ""])


def _end(config: type[Options], prog: str, method: Method | None, everything: bool) -> list[str]:
    """Examples, and where there is more."""
    lines = ["examples:", *(f"  {prog} {words}".rstrip() for words in config.examples), ""] if config.examples else []
    if config.basic and not everything:
        lines.append(f"{prog} {ALL} lists every option.")
    if method is None and any(entry.key == METHOD_OPTIONS for entry in entries(config)):
        lines.append(f"{prog} --method NAME --help adds the options of a method; `megatron-prune methods` lists them.")
    return lines


def usage(config: type[Options], prog: str) -> str:
    """What must be given, as it is typed."""
    places = positional(config)
    words = [entry.key.upper() + ("..." if get_origin(entry.kind) is tuple else "") for entry in places]
    pairs = zip(words, places, strict=True)
    words = [word if entry.required or word.endswith("...") else f"[{word}]" for word, entry in pairs]
    rest = [entry for entry in entries(config) if entry.required and entry not in places]
    return " ".join([prog, *words, *(f"{flag(entry.key)} {metavar(entry.kind)}" for entry in rest), "[options]"])


def _add_all(
    parser: ArgumentParser, common: Any, config: type[Options], found: Sequence[Entry], method: Method | None
) -> None:
    groups: dict[type, Any] = {config: common}
    for entry in found:
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(title(entry.group).lower())
        _add(groups[entry.group], entry, method)


def _add(group: Any, entry: Entry, method: Method | None) -> None:
    default = entry.field.default if method is None else method.defaults.get(entry.key, entry.field.default)
    note = "" if entry.required else f" (default: {shown(default)})"
    words = entry.field.metadata["help"]
    if entry.key == "method":
        words = f"{words}; one of {', '.join(method_names())}"
    many = get_origin(entry.kind) is tuple
    kind = get_args(entry.kind)[0] if many else entry.kind
    _add_one(group, entry.key, kind, words + note, "*" if many else None)


def _add_one(group: Any, key: str, kind: Any, words: str, count: str | None = None) -> None:
    words = words.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag(key), "--no" + flag(key)[1:], action="store_true", default=SUPPRESS, help=words)
    else:
        group.add_argument(flag(key), metavar=metavar(kind), nargs=count, help=words)
