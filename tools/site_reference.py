"""Pages of the documentation's site that are made of the code: every option of every command, and the Python API."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from megatron_prune import api, errors, helping
from megatron_prune.options import Entry, entries, flag
from megatron_prune.verbs import VERBS, Verb
from tools.api_stub import parameter

PROGRAM = "megatron-prune"
IN_MEMORY = Path(__file__).resolve().parents[1] / "megatron_prune" / "in_memory.py"
COMMANDS = f"""# Options of the commands

Every command with every option and its default, made from the code of this version: what must be given and what is
given most comes first. `{PROGRAM} VERB --help` and `--help-all` print the same. An option is also a key of
`--config FILE.yaml`, with underscores, and a parameter of the [Python API](python.md); one that is true or false is
switched by its flag and by `--no-FLAG`. Which command does what: [Commands](../commands.md).

<style>.md-typeset td:first-child code {{ white-space: nowrap }}</style>
"""
PYTHON = """# Python API

Made from the code of this version. `import megatron_prune` loads nothing heavy; what a function needs is loaded when it
is called.
"""
METHODS = "## Options of the methods"


def commands() -> str:
    """The page of all commands and their options, the methods' own among them."""
    return "\n".join([COMMANDS, *(_command(verb) for verb in VERBS.values()), METHODS, "", *_methods()])


def _command(verb: Verb) -> str:
    config, prog = verb.config, f"{PROGRAM} {verb.name}"
    found = {entry.key: entry for entry in entries(config) if entry.key != helping.METHOD_OPTIONS}
    first = [key for key in found if found[key].required] + [key for key in config.basic if not found[key].required]
    first = first if config.basic else list(found)
    rest = [entry for key, entry in found.items() if key not in first]
    lines = [
        f"## {verb.name}",
        "",
        f"{_plain(helping.title(config))}.",
        "",
        *_code("text", [helping.usage(config, prog)]),
    ]
    lines += _table(found[key] for key in first)
    for group in dict.fromkeys(entry.group for entry in rest):
        title = "More options" if group is config else helping.title(group)
        lines += [f"**{_plain(title)}**", "", *_table(entry for entry in rest if entry.group is group)]
    if config.examples:
        lines += _code("bash", [f"{prog} {words}".rstrip() for words in config.examples])
    return "\n".join(lines)


def _code(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _table(found: Iterable[Entry]) -> list[str]:
    rows = [_row(entry) for entry in found]
    return ["| option | value | default | what it is |", "| --- | --- | --- | --- |", *rows, ""] if rows else []


def _row(entry: Entry) -> str:
    words = _plain(entry.field.metadata["help"])
    if entry.key == "method":
        words += f": {', '.join(f'[{name}](#{name})' for name in helping.method_names())}"
    default = "required" if entry.required else f"`{helping.shown(entry.default)}`"
    return f"| `{flag(entry.key)}` | {_value(entry.kind)} | {default} | {words} |"


def _value(kind: Any) -> str:
    many = get_origin(kind) is tuple
    kind = get_args(kind)[0] if many else kind
    words = ", ".join(f"`{word}`" for word in helping.choices(kind)) or f"`{helping.metavar(kind).strip('{}')}`"
    return words.replace("true,false", "true`, `false") + (" ..." if many else "")


def _methods() -> list[str]:
    from megatron_prune.methods.base import methods

    lines = [f"Given to `{PROGRAM} prune` beside its own, with `--method NAME`.", ""]
    for info in methods():
        lines += [f"### {info.name}", "", f"{_plain(info.paper)}. Targets: {_plain('; '.join(info.targets))}.", ""]
        if info.hyperparameters:
            lines += ["| option | default | what it is |", "| --- | --- | --- |"]
        for knob in info.hyperparameters:
            default = helping.shown(knob.default) or "none"
            lines.append(f"| `{flag(knob.name)}` | `{default}` | {_plain(knob.help)} |")
        if info.defaults:
            own = ", ".join(f"`{flag(key)} {value}`" for key, value in info.defaults.items())
            lines += ["", f"Defaults of its own for options of `prune`: {own}."]
        lines.append("")
    return lines


def python() -> str:
    """The page of the Python API."""
    parts = [PYTHON, _words(api.__doc__), _in_memory(), "## UserError", "", _words(errors.UserError.__doc__)]
    return "\n".join([*parts, *(_function(name) for name in api.NAMES)])


def _in_memory() -> str:
    tree = ast.parse(IN_MEMORY.read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "prune_model"]
    given = [_argument(arg) for arg in found.args.args]
    named = [_argument(arg) for arg in found.args.kwonlyargs]
    defaults: list[ast.expr | None] = [None] * (len(given) - len(found.args.defaults))
    pairs = zip([*given, *named], [*defaults, *found.args.defaults, *found.args.kw_defaults], strict=True)
    words = [name if default is None else f"{name} = {ast.unparse(default)}" for name, default in pairs]
    words.insert(len(given), "*")
    if found.args.kwarg is not None:
        words.append(f"**{_argument(found.args.kwarg)}")
    returns = "Any" if found.returns is None else ast.unparse(found.returns)
    return "\n".join(["## prune_model", "", *_signature(found.name, words, returns), _words(ast.get_docstring(found))])


def _argument(arg: ast.arg) -> str:
    return arg.arg if arg.annotation is None else f"{arg.arg}: {ast.unparse(arg.annotation)}"


def _function(name: str) -> str:
    verb = VERBS[api.NAMES[name]]
    basic = verb.config.basic
    found = inspect.signature(api.function(name)).parameters.values()
    needed = [parameter(p) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [parameter(p) for p in found if p.kind is p.KEYWORD_ONLY and (p.name in basic or not basic)]
    words = [*needed, *(["*"] if named else []), *named]
    more = f"[options of `{verb.name}`](commands.md#{verb.name})"
    tail = f"More may be given by name, as `**options`: all {more}." if basic else f"What they are: {more}."
    if any(p.kind is p.VAR_KEYWORD for p in found):
        tail = (
            f"More may be given by name, as `**options`: all {more}, and those [of the method](commands.md#{ANCHOR})."
        )
    returns = inspect.signature(verb.module.run).return_annotation
    lines = [f"## {name}", "", f"{_plain(helping.title(verb.config))}.", ""]
    return "\n".join([*lines, *_signature(name, [*words, *(["**options"] if basic else [])], returns), tail, ""])


ANCHOR = METHODS.strip("# ").lower().replace(" ", "-")


def _signature(name: str, words: Sequence[str], returns: str) -> list[str]:
    return _code("python", [f"megatron_prune.{name}(", *(f"    {word}," for word in words), f") -> {returns}"])


def _words(text: str | None) -> str:
    """A docstring as a page has it: what is indented, as a whole, becomes a block of code."""
    parts: list[str] = []
    for part in inspect.cleandoc(text or "").replace("``", "`").split("\n\n"):
        code = part.startswith("    ")
        if code and parts and parts[-1].startswith("    "):
            parts[-1] += f"\n\n{part}"
        else:
            parts.append(part)
    blocks = [f"```python\n{textwrap.dedent(part)}\n```" if part.startswith("    ") else part for part in parts]
    return "\n\n".join([*blocks, ""])


def _plain(text: str) -> str:
    """A sentence in which only backticks mean anything."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]|])", r"\\\1", part) for part in parts).replace(
        "<", "&lt;"
    )
