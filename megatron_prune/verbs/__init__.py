"""The verbs, one file each: what it takes (options), what does it (calls into the rooms below), what the user reads.

A file here with a `VERB` and a `run` is a command and a function of the Python API. Its head imports options only; the
rest is imported by `run`, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prune.options import Options


def _always(_result: Any) -> bool:
    return True


@dataclass(frozen=True)
class Verb:
    """One command; the function `run(settings)` beside it does the work."""

    name: str
    """As it is typed."""
    config: type[Options]
    """What it takes."""
    help: str
    """A line for the list of verbs."""
    place: int
    """In that list, which follows the order of the work."""
    alone: bool = False
    """For one process."""
    light: bool = False
    """It begins without PyTorch."""
    passed: Callable[[Any], bool] = _always
    """Whether what `run` returns is a success: exit status 0, else 1."""
    module: Any = None
    """Its file, once it is found."""

    def run(self, settings: Any) -> Any:
        """Do it; what it returns is what callers in Python get."""
        return self.module.run(settings)


def deliver(lines: Iterable[str], result: Any = None, output: Path | None = None) -> None:
    """Say the lines, and write the result where that was asked for; by the process that speaks for all."""
    from megatron_prune.files import write_result
    from megatron_prune.log import is_leader, say

    for line in lines:
        say(line)
    if output is not None and is_leader():
        write_result(output, result)


def _discovered() -> Mapping[str, Verb]:
    """Every verb whose file is here, by name, in the order of the work."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    found = sorted((replace(module.VERB, module=module) for module in modules), key=lambda verb: verb.place)
    return {verb.name: verb for verb in found}


VERBS = _discovered()
