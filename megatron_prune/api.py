"""The verbs as functions: the same names, options, defaults and checks as on the command line.

    import megatron_prune as mp

    mp.prune("SmolLM2-135M", "run", method="wanda", target="2:4", calibration=["c4.jsonl"])

What is required may be given by position, in the order of the command's help; everything else by name, with
underscores. A mistake is a `UserError` that says what was given, what is allowed and what to do. `import` is a word of
Python and `methods` a package here: those verbs are `import_` and `methods_`. What takes hours notices SIGTERM and
Ctrl-C in the main thread only, as Python has it; elsewhere its time limit ends it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

from megatron_prune.command_line import METHOD_OPTIONS, parse
from megatron_prune.decision.target import parse_any_target
from megatron_prune.errors import UserError, brief
from megatron_prune.options import entries, flag
from megatron_prune.outputs import held
from megatron_prune.telling import processes
from megatron_prune.verbs import VERBS, Verb

NAMES = {f"{name}_" if name in ("import", "methods") else name: name for name in VERBS}
"""Name of a function -> its verb."""


@cache
def function(name: str) -> Callable[..., Any]:
    """The function of a verb, with the signature and help of its options."""
    verb = VERBS[NAMES[name]]
    signature = _signature(verb)

    def call(*args: Any, **options: Any) -> Any:
        required = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(required):
            raise UserError(f"{name}: {len(args)} values without a name were given; allowed: {', '.join(required)}")
        twice = sorted(set(options) & set(required[: len(args)]))
        if twice:
            raise UserError(f"{name}: {', '.join(twice)} was given twice, by position and by name")
        if verb.alone and processes() > 1:
            raise UserError(f"{processes()} processes were started; {name} takes one")
        settings = parse(verb.config, _words({**dict(zip(required, args, strict=False)), **options}), prog=name)
        with held(settings):
            return verb.run(settings)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "megatron_prune"
    call.__doc__ = _documentation(verb)
    setattr(call, "__signature__", signature)
    return call


def _signature(verb: Verb) -> inspect.Signature:
    found = [entry for entry in entries(verb.config) if entry.key != METHOD_OPTIONS]
    kinds = inspect.Parameter
    needed = [kinds(e.key, kinds.POSITIONAL_OR_KEYWORD, annotation=e.kind) for e in found if e.required]
    rest = [kinds(e.key, kinds.KEYWORD_ONLY, default=e.default, annotation=e.kind) for e in found if not e.required]
    more = [kinds("options", kinds.VAR_KEYWORD)] if any(e.key == METHOD_OPTIONS for e in entries(verb.config)) else []
    return inspect.Signature([*needed, *rest, *more])


def _documentation(verb: Verb) -> str:
    title = (verb.config.__doc__ or verb.help).strip().splitlines()[0]
    lines = [f"    {e.key}: {e.field.metadata['help']}" for e in entries(verb.config) if e.key != METHOD_OPTIONS]
    return "\n".join([f"{title}.", "", *lines])


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line has them."""
    words = []
    for key, value in options.items():
        if value is None:
            continue
        if isinstance(value, list | tuple):
            words += [flag(key), *_items(key, value)]
        else:
            plain = parse_any_target(value) if isinstance(value, Mapping) else value
            words.append(f"{flag(key)}={str(plain).lower() if isinstance(plain, bool) else plain}")
    return words


def _items(key: str, values: Sequence[Any]) -> list[str]:
    """Of a list: `[(0.7, "a"), (0.3, "b")]` are weights before what they weigh, as in YAML."""
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    for part in flat:
        if not isinstance(part, str | int | float | PurePath) or str(part).startswith("--") or str(part) == "-h":
            raise UserError(f"{key}: {brief(part)} given in a list; allowed: text, numbers and paths")
    return [str(part) for part in flat]
