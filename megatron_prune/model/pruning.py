"""What a Hugging Face directory says of its pruning: `pruning.json` beside the weights, which `verify` checks unasked.

It is a file of its own and no key of config.json: software that trains the model and saves it writes config.json again,
and would claim a pattern that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from typing_extensions import TypedDict

from megatron_prune.files import write_json
from megatron_prune.foreign import read_format, strict
from megatron_prune.schema import Above0, TargetText, Word

FILE = "pruning.json"
WHAT = "a pruned model"
FORMAT = 1
KEYS = ("method", "target", "parameters")
"""What of a checkpoint's history goes along."""


@with_config(strict())
class _File(TypedDict):
    """What is in the file."""

    format: Literal[1]
    method: Word | None
    target: TargetText | None
    parameters: Above0 | None
    """Of a model that was made smaller."""


def write_pruning(folder: Path, history: Mapping[str, Any]) -> None:
    """Write down what a model's history says of its pruning; nothing where it was not pruned."""
    found = {key: history.get(key) for key in KEYS}
    if any(found.values()):
        write_json(folder / FILE, {"format": FORMAT, **found})


def read_pruning(folder: Path) -> dict[str, Any]:
    """The same of a directory, by the keys of a history; nothing where it says none. UserError for a damaged file."""
    if not (folder / FILE).is_file():
        return {}
    about = read_format(folder / FILE, WHAT, FORMAT, _File)
    return {key: about[key] for key in KEYS if about[key] is not None}
