"""What a verb writes is looked at, and locked, before the verb does anything.

One place for all verbs: whatever a configuration calls `output` (or `samples`) must be new, must have a place, and is
this launch's alone until the verb ends. A run that goes on (`--resume`, `--restartable`, processes that torchrun has
started again) may find its own output there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prune import claims
from megatron_prune.errors import UserError
from megatron_prune.options import Options, entries, flag
from megatron_prune.telling import process

WRITTEN = ("output", "samples", "export")
"""Keys of options that name what a verb writes."""
BESIDE = ("data_cache", "statistics")
"""Keys of folders that a verb fills before its output is begun."""
PARTS = ("decision", "weights", "checkpoints", "prior", "database", "tensorboard")
"""Folders with a meaning in the folder of a run."""


@contextlib.contextmanager
def held(config: Options) -> Iterator[None]:
    """The outputs of a configuration, claimed by process 0 for the duration of the block.

    UserError, in every process, for one that cannot be made.
    """
    given = {entry.key: _value(config, entry.path) for entry in entries(type(config))}
    paths = {key: path for key in WRITTEN if isinstance(path := given.get(key), Path)}
    may_exist = _may_exist(config, given)
    for key, path in paths.items():
        claims.check_place(path, flag(key))
    _check_apart(paths, given)
    with contextlib.ExitStack() as stack:
        for key, path in paths.items():
            found = restarted() if key == "export" else may_exist
            if process() == 0:
                stack.enter_context(claims.claimed(path, flag(key), found))
            elif not found:
                claims.refuse_existing(path, flag(key))
        for key, path in _filled(given).items():
            if process() == 0:
                stack.enter_context(claims.claimed(path, flag(key), may_exist=True))
        yield


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def _value(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _may_exist(config: Options, given: dict[str, Any]) -> bool:
    """Whether there may be something at the output: a run that goes on, or the verb itself looks."""
    goes_on = given.get("resume") or given.get("restartable") or restarted()
    return config.output_may_exist == "always" or (config.output_may_exist == "resumed" and bool(goes_on))


def _filled(given: dict[str, Any]) -> dict[str, Path]:
    """Folders that one run after another adds to, one at a time."""
    options = given.get("method_options")
    database = options.get("database") if isinstance(options, dict) else None
    found = {"statistics": given.get("statistics"), "database": Path(str(database)) if database else None}
    return {key: path for key, path in found.items() if isinstance(path, Path)}


def _check_apart(paths: dict[str, Path], given: dict[str, Any]) -> None:
    """UserError where an output is another one, lies in a run whose folders mean something, or would hold a cache."""
    places = {key: path.absolute() for key, path in paths.items()}
    if len(set(places.values())) < len(places):
        raise UserError(f"{' and '.join(map(flag, places))}: {paths['output']} given for both; give two places")
    output = places.get("output")
    if output is None:
        return
    for key in BESIDE:
        folder = given.get(key)
        if isinstance(folder, Path) and _inside(folder, output):
            raise UserError(f"{flag(key)} {folder} is inside --output {paths['output']}: give a folder beside it")
    source = given.get("input")
    if isinstance(source, str | Path) and (Path(source) / "run.json").is_file() and _inside(output, Path(source)):
        part = claims.real(output).relative_to(claims.real(Path(source))).parts[:1]
        if part and part[0] in PARTS:
            raise UserError(
                f"--output {paths['output']} would change the run --input {source}, where {part[0]} has a meaning; "
                "give a place outside"
            )


def _inside(path: Path, folder: Path) -> bool:
    place = claims.real(path)
    return claims.real(folder) in (place, *place.parents)
