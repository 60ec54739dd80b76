"""lm-eval's tasks from files: definitions in the harness's YAML over rows in folders of this machine, offline.

The definitions of this package lie in `tasks/`; one of the same name in a data folder takes its place. Whoever wrote
them, they are data: functions come only from lm-eval itself, and templates are rendered in a sandbox.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.utils
import yaml
from jinja2 import BaseLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.task import ConfigurableTask

from megatron_prune.data.text import iterate_lines, parse_object, read_whole
from megatron_prune.errors import UserError

DEFINITIONS = Path(__file__).with_name("tasks")
KEYS = frozenset(
    "task dataset_path dataset_kwargs output_type training_split validation_split test_split fewshot_split num_fewshot "
    "doc_to_text doc_to_choice doc_to_target target_delimiter fewshot_delimiter description process_results "
    "metric_list metadata".split()
)
"""What a definition may say; the rest of the harness's keys fetch or run something."""
TITLE = re.compile(r"^ = (?!= ).*(?<! =) = $", re.MULTILINE)
"""The title of an article in WikiText's raw files; those of its sections have two or more equals signs."""


def load(names: Sequence[str], folders: Sequence[Path]) -> list[ConfigurableTask]:
    """The tasks of these names with their rows; UserError when a definition or a row is missing or damaged."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--tasks-folder {folder}: no such folder; give folders that hold the tasks' files")
    known = {path.stem: path for place in (DEFINITIONS, *reversed(folders)) for path in sorted(place.glob("*.yaml"))}
    _render_in_sandbox()
    return [_task(name, known, folders) for name in names]


def _task(name: str, known: dict[str, Path], folders: Sequence[Path]) -> ConfigurableTask:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(sorted(known))}"
        raise UserError(f"--tasks: no definition of {name!r} here; {hint} (lm-eval's own: leave --tasks-folder out)")
    definition = _definition(known[name])
    files = definition.pop("dataset_kwargs")["data_files"]
    paths = {split: _find(name, file, folders) for split, file in files.items()}
    definition["custom_dataset"] = partial(_read, paths, whole=definition.pop("dataset_path") == "text")
    try:
        return ConfigurableTask(config=definition)
    except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise UserError(f"{known[name]}: {error}; the task's definition does not fit its rows") from error


class _Definition(yaml.SafeLoader):
    """YAML in which `!function` names a function of lm-eval."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, function = str(node.value).rpartition(".")
    if not re.fullmatch(r"lm_eval(\.\w+)+", module):
        raise yaml.constructor.ConstructorError(
            None, None, f"!function {node.value} was given; allowed: functions of lm_eval", node.start_mark
        )
    return getattr(__import__(module, fromlist=[function]), function)


_Definition.add_constructor("!function", _function)


def _definition(path: Path) -> dict[str, Any]:
    try:
        definition = yaml.load(path.read_text(encoding="utf-8"), Loader=_Definition)
    except (yaml.YAMLError, UnicodeDecodeError, ImportError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("dataset_kwargs"), dict):
        raise UserError(f"{path}: no task; expected task, dataset_kwargs with data_files, doc_to_text and so on")
    unknown = sorted(set(definition) - KEYS)
    if unknown or set(definition["dataset_kwargs"]) != {"data_files"}:
        raise UserError(
            f"{path}: {', '.join(unknown) or 'dataset_kwargs other than data_files'} given; allowed in definitions "
            f"over local files: {', '.join(sorted(KEYS))}"
        )
    return definition


def _find(name: str, file: str, folders: Sequence[Path]) -> Path:
    found = [folder / file for folder in folders if (folder / file).is_file()]
    if not found:
        places = ", ".join(map(str, folders))
        raise UserError(f"--tasks {name}: {file} is not in {places}; give the folder that holds it to --tasks-folder")
    return found[0]


def _read(paths: dict[str, Path], whole: bool, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """Split -> rows: the objects of a JSONL file, or the articles of a raw text."""
    read = _articles if whole else _objects
    return {split: datasets.Dataset.from_list(read(path)) for split, path in paths.items()}


def _objects(path: Path) -> list[dict[str, Any]]:
    rows = list(iterate_lines(path, parse_object))
    if not rows:
        raise UserError(f"{path}: no rows; expected one JSON object a line")
    return rows


def _articles(path: Path) -> list[dict[str, Any]]:
    """`{"page": text}` of each article: from the line of its title, which has an empty line before it."""
    text = read_whole(path)
    starts = [match.start() for match in TITLE.finditer(text)]
    ends = [*starts[1:], len(text) + 1]  # without the line break before the next title
    pages = [text[start : end - 1] for start, end in zip(starts, ends, strict=True)]
    if not pages:
        raise UserError(f"{path}: no article; expected WikiText's raw text, with titles such as ' = Title = '")
    return [{"page": page} for page in pages]


def _render_in_sandbox() -> None:
    """Templates of definitions get no further than the row that they are given."""
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(lm_eval.utils.env.filters)
    lm_eval.utils.env = sandbox
