"""Flags and YAML -> a verb's configuration. Later beats earlier: defaults, those of the method that is named,
`--config FILE.yaml`, flags.

A YAML value is read as the text that stands there and then parsed exactly like a flag's, so `target: 2:4` is
no number in base sixty and `lr: 1e-4` is no string. Types, nested keys and the help text are jsonargparse's
work; this module adds what it lacks: both spellings of a flag, bare and negated switches, the nearest key for
a misspelt one, and one-line errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from megatron_prune.errors import UserError, bare, brief, one_line
from megatron_prune.foreign import fenced, read_yaml
from megatron_prune.helping import ALL, HELP, METHOD_OPTIONS, Method, choices, positional, text
from megatron_prune.option_groups import Calibration, Training
from megatron_prune.options import Entry, Options, Share, check_idle, entries, flag

if TYPE_CHECKING:
    from megatron_prune.methods.base import PruningMethod

C = TypeVar("C", bound=Options)
MOST_CHARACTERS = 100
"""Of a number."""


def parse(config: type[C], argv: Sequence[str], prog: str) -> C:
    """The configuration that `argv` (no verb) describes; mistakes are `UserError`s, `--help` exits with 0."""
    known = {entry.key: entry for entry in entries(config)}
    argv, files = _take_config_files(_name_leading(config, list(argv)))
    from_yaml = [pair for file in files for pair in _read_yaml(file)]
    switches = {entry.key for entry in known.values() if entry.kind is bool}
    given = from_yaml + _read_flags(argv, switches)
    wanted = {*HELP, ALL} & set(argv)
    method = _method(given, None if wanted else known["method"].default) if METHOD_OPTIONS in known else None
    hyper = _method_fields(method) if method else {}
    defaults = {**method.defaults, **_recipe(method, given, known)} if method else {}
    switches |= {name for name, field in hyper.items() if field.type is bool}
    given = from_yaml + _read_flags(argv, switches)
    if wanted:
        print(text(config, prog, _about(method, hyper, defaults) if method else None, ALL in wanted), end="")
        raise SystemExit(0)
    parser = _parser(known, hyper, prog)
    kinds = {entry.key: entry.kind for entry in known.values()}
    kinds |= {f"{METHOD_OPTIONS}.{name}": field.type for name, field in hyper.items()}
    tokens = []
    _refuse_repeated_lists(_read_flags(argv, switches), known)
    for key, values in given:
        name = _resolve(key, known, hyper)
        tokens += _tokens(name, values, kinds[name])
    found = _parse_tokens(parser, kinds, tokens)
    made = _build(config, known, {**_implied(defaults, found, known), **found})
    check_idle(made)
    return made


# --- reading ---

Pair = tuple[str, list[str]]
"""A key as the user wrote it, with underscores, and its values as text."""


def _name_leading(config: type[Options], argv: list[str]) -> list[str]:
    """The same words with the names of the options that those before the first flag are values of."""
    words = list(itertools.takewhile(lambda token: not token.startswith("-"), argv))
    places = positional(config)
    if not words or not places:
        return argv
    named, rest = [], list(words)
    for entry in places:
        taken, rest = (rest, []) if get_origin(entry.kind) is tuple else (rest[:1], rest[1:])
        named += [flag(entry.key), *taken] if taken else []
    if rest:
        allowed = " ".join(entry.key.upper() for entry in places)
        raise UserError(f"{brief(rest[0])} given; allowed here: {allowed}, and then flags such as --output VALUE")
    given = {token.partition("=")[0] for token in argv[len(words) :]}
    twice = [token for token in named if token.startswith("--") and token in given]
    if twice:
        raise UserError(f"{twice[0]}: given twice, with its name and without; give it once")
    return [*named, *argv[len(words) :]]


def _take_config_files(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Splits off every `--config FILE`."""
    rest, files = [], []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name != "--config":
            rest.append(token)
            continue
        value = value if equals else next(tokens, "")
        if not value:
            raise UserError("--config: no file given; allowed: --config FILE.yaml")
        files.append(Path(value))
    return rest, files


def _read_yaml(file: Path) -> list[Pair]:
    """Keys and values of one YAML file; values stay text, nested mappings become dotted keys."""
    if not file.is_file():
        raise UserError(f"--config: {file} is not a file")
    content = read_yaml(file, "a configuration")
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config: {file} holds a {type(content).__name__}; allowed: a mapping of keys to values")
    return [pair for key, value in content.items() for pair in _yaml_pairs(file, key, value)]


def _yaml_pairs(file: Path, key: str, value: Any) -> list[Pair]:
    key = key.replace("-", "_")
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in _yaml_pairs(file, f"{key}.{name}", item)]
    values = value if isinstance(value, list) else [value]
    if all(isinstance(item, list) and len(item) == 2 for item in values):  # data: [[0.7, a], [0.3, b]]
        values = [word for item in values for word in item]
    if value == "" or any(not isinstance(item, str) for item in values):
        raise UserError(
            f"--config: {file}: {bare(key)}: {brief(value)} given; allowed: a value or a flat list of values"
        )
    return [(key, values)]


def _read_flags(argv: list[str], switches: set[str]) -> list[Pair]:
    """`--key value...`, `--key=value`, and for switches `--key` and `--no-key`; hyphens or underscores."""
    pairs: list[Pair] = []
    for token in argv:
        if token in (*HELP, ALL):
            continue
        if not token.startswith("--"):
            if not pairs:
                raise UserError(f"{brief(token)} given; allowed here: flags such as --input VALUE")
            pairs[-1][1].append(token)
            continue
        name, equals, value = token[2:].partition("=")
        key = name.replace("-", "_")
        if key.startswith("no_") and key[3:] in switches and not equals:
            key, equals, value = key[3:], "=", "false"
        pairs.append((key, [value] if equals else []))
    return [(key, values or (["true"] if key in switches else [])) for key, values in pairs]


def _refuse_repeated_lists(flags: list[Pair], known: Mapping[str, Entry]) -> None:
    """A flag given twice means its last value; for a list that would drop files without a word."""
    seen: set[str] = set()
    for key, _values in flags:
        if key in seen and key in known and get_origin(known[key].kind) is tuple:
            raise UserError(f"{flag(key)}: given more than once; give all its values after one {flag(key)}")
        seen.add(key)


# --- keys ---


def _method(given: list[Pair], usual: Any) -> type[PruningMethod] | None:
    """The method that the user names, or the one that is usual, where that is a name."""
    names = [usual] if isinstance(usual, str) else []
    names += [values[0] for key, values in given if key == "method" and values]
    if not names:
        return None
    from megatron_prune.methods.base import get_method

    return type(get_method(names[-1]))


def _recipe(kind: type[PruningMethod], given: list[Pair], known: Mapping[str, Entry]) -> dict[str, Any]:
    """What the recipe that the user names says of options that are not the method's own."""
    names = [values[0] for key, values in given if key in ("recipe", f"{METHOD_OPTIONS}.recipe") and values]
    found = kind.recipes.get(names[-1], {}) if names else {}
    return {key: value for key, value in found.items() if key in known}


def _method_fields(kind: type[PruningMethod]) -> dict[str, dataclasses.Field[Any]]:
    """Hyper-parameters of a method, with resolved types."""
    hints = get_type_hints(kind)
    hyper = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name, field in hyper.items():
        field.type = hints[name]
    return hyper


def _resolve(key: str, known: Mapping[str, Entry], hyper: Mapping[str, dataclasses.Field[Any]]) -> str:
    """The full key: a verb's own, or `method_options.NAME` for the method's; unknown keys are an error."""
    if key in known and key != METHOD_OPTIONS:
        return key
    head, dot, name = key.partition(".")
    name = name.replace("-", "_") if dot and head == METHOD_OPTIONS else key
    if name in hyper:
        return f"{METHOD_OPTIONS}.{name}"
    allowed = [name for name in known if name != METHOD_OPTIONS] + list(hyper)
    near = difflib.get_close_matches(name[:100], allowed, n=1, cutoff=0.5)
    hint = f"did you mean {flag(near[0])}?" if near else "--help lists the allowed ones"
    shown = bare(key)
    raise UserError(f"unknown option {flag(shown)} ({shown} in YAML); {hint}")


def _tokens(key: str, values: list[str], kind: Any) -> list[str]:
    """The option as jsonargparse reads it; a single value is tied to its flag: it may begin with a hyphen."""
    many = get_origin(kind) is tuple
    if len(values) != 1 and not many:
        given = bare(" ".join(values[:20])) if values else "nothing"
        raise UserError(f"{flag(key)}: {given} given; allowed: {_allowed(kind)}")
    for value in values if {int, float} & {kind, *get_args(kind)} else ():
        if not value.isascii() or len(value) > MOST_CHARACTERS or value != value.strip() or not value:
            raise UserError(f"{flag(key)}: {brief(value)} given; allowed: {_allowed(kind)}")
    return [flag(key), *values] if many else [f"{flag(key)}={values[0]}"]


def _about(
    kind: type[PruningMethod], hyper: Mapping[str, dataclasses.Field[Any]], defaults: Mapping[str, Any]
) -> Method:
    """What help says of a method."""
    from megatron_prune.methods.base import CALIBRATION, DATA

    used = {*kind.needs, *kind.takes}
    idle = {group for group, need in ((Calibration, CALIBRATION), (Training, DATA)) if need not in used}
    return Method(kind.name, kind.paper, hyper, defaults, frozenset(idle))


# --- types ---


def _parser(known: Mapping[str, Entry], hyper: Mapping[str, dataclasses.Field[Any]], prog: str) -> ArgumentParser:
    """A jsonargparse parser with one option per key; what help says of them is in `helping`."""
    parser = ArgumentParser(prog=prog, add_help=False, exit_on_error=False, allow_abbrev=False)
    for entry in known.values():
        if entry.key != METHOD_OPTIONS:
            _add(parser, entry.key, entry.kind)
    for name, field in hyper.items():
        _add(parser, f"{METHOD_OPTIONS}.{name}", field.type)
    return parser


def _add(parser: ArgumentParser, key: str, kind: Any) -> None:
    """One option; the dataclass settles defaults and what is required, so that YAML and flags are alike."""
    many = get_origin(kind) is tuple
    more: dict[str, Any] = {"nargs": "*"} if many else {}
    parser.add_argument(flag(key), type=get_args(kind)[0] if many else kind, default=SUPPRESS, **more)


def _parse_tokens(parser: ArgumentParser, kinds: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    try:
        with fenced("the options cannot be read", "--help lists what is allowed"):
            return parser.parse_args(tokens).as_dict()
    except UserError as error:
        if isinstance(error.__cause__, ArgumentError):
            raise UserError(_one_line(str(error.__cause__), kinds)) from None
        raise


def _one_line(message: str, kinds: Mapping[str, Any]) -> str:
    """jsonargparse's error -> flag, what was given, what is allowed."""
    key = re.search(r'Parser key "([^"]+)"|argument --([\w.-]+)', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if not key:
        return message
    name = (key[1] or key[2]).replace("-", "_")
    given = f"{one_line(value[1], 100)} given" if value else one_line(message.split(": ", 1)[-1], 100)
    return f"{flag(name.removeprefix(METHOD_OPTIONS + '.'))}: {given}; allowed: {_allowed(kinds.get(name))}"


def _allowed(kind: Any) -> str:
    if choices(kind):
        return " or ".join(choices(kind))
    if get_origin(kind) is tuple:
        return "files"
    words = {"int": "one whole number", "float": "one number", "bool": "true or false", "Path": "one path"}
    kinds = [part for part in get_args(kind) if part is not type(None)] or [kind]
    return words.get(getattr(kinds[0], "__name__", ""), "one value")


# --- building ---


def _implied(defaults: Mapping[str, Any], given: Mapping[str, Any], known: Mapping[str, Entry]) -> dict[str, Any]:
    """A method's own defaults as values, for what was not given."""
    implied = {}
    for key, default in defaults.items():
        if isinstance(default, Share):
            whole = given.get(default.of, defaults.get(default.of, known[default.of].default))
            default = default.value(whole)
        implied[key] = default
    return implied


def _build(config: type[C], known: Mapping[str, Entry], values: Mapping[str, Any]) -> C:
    missing = [entry for entry in known.values() if entry.required and entry.key not in values]
    if missing:
        wanted = ", ".join(f"{flag(entry.key)} ({entry.field.metadata['help']})" for entry in missing)
        raise UserError(f"missing: {wanted}")
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, name = known[key].path
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = tuple(value) if isinstance(value, list) else value
    return _make(config, tree)


def _make(config: type[C], tree: Mapping[str, Any]) -> C:
    """Instantiates groups before their owner; range checks run here."""
    kinds = get_type_hints(config)
    made = {}
    for name, value in tree.items():
        nested = isinstance(kinds[name], type) and issubclass(kinds[name], Options)
        made[name] = _make(kinds[name], value) if nested else value
    return config(**made)
