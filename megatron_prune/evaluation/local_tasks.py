"""lm-eval's tasks from files: definitions in the harness's YAML over rows in folders of this machine, offline.

The definitions of this package lie in `tasks/`; one of the same name in a data folder takes its place. Whoever wrote
them, they are data: they have the keys and values of a schema, metrics come from lm-eval's registries, functions from
a short list, and templates are rendered with limits.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import datasets
import lm_eval.api.metrics
import lm_eval.utils
import yaml
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.api.task import ConfigurableTask
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from megatron_prune import foreign
from megatron_prune.data.text import iterate_lines, parse_object, read_whole
from megatron_prune.errors import UserError, brief, one_line
from megatron_prune.evaluation import templates
from megatron_prune.schema import RelativeName

DEFINITIONS = Path(__file__).with_name("tasks")
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""Kinds of tasks that need likelihoods only."""
WHAT = "a folder of tasks"
FUNCTIONS = (
    "lm_eval.tasks.wikitext.preprocess_wikitext.process_results",
    "lm_eval.tasks.wikitext.preprocess_wikitext.wikitext_detokenizer",
    "lm_eval.tasks.winogrande.preprocess_winogrande.doc_to_choice",
    "lm_eval.tasks.winogrande.preprocess_winogrande.doc_to_target",
    "lm_eval.tasks.winogrande.preprocess_winogrande.doc_to_text",
)
"""What `!function` may name: functions of one row, which they only read."""
TITLE = re.compile(r"^ = (?!= ).*(?<! =) = $", re.MULTILINE)
"""The title of an article in WikiText's raw files; those of its sections have two or more equals signs."""


# --- what a definition may say; the rest of the harness's keys fetch or run something ---


def _registered(registry: Any, kind: str) -> Any:
    def check(name: str) -> str:
        if name not in registry:
            raise ValueError(f"no {kind} of lm-eval; allowed: {', '.join(sorted(registry))}")
        return name

    return Annotated[str, AfterValidator(check)]


Template = Annotated[str, Field(max_length=templates.MOST_TEMPLATE)]
"""Of jinja, or the name of a row's field."""
Function = Callable[..., Any]
"""Written `!function`."""
Split = Annotated[str, Field(min_length=1, max_length=100)]


class Metric(TypedDict):
    """One of `metric_list`."""

    __pydantic_config__ = foreign.strict()  # type: ignore[misc]
    metric: _registered(metric_registry, "metric")  # type: ignore[valid-type]
    aggregation: NotRequired[_registered(aggregation_registry, "aggregation")]  # type: ignore[valid-type]
    higher_is_better: NotRequired[bool]


class Files(TypedDict):
    """`dataset_kwargs`."""

    __pydantic_config__ = foreign.strict()  # type: ignore[misc]
    data_files: Annotated[dict[Split, RelativeName], Field(min_length=1, max_length=20)]


class Definition(TypedDict):
    """A task."""

    __pydantic_config__ = foreign.strict()  # type: ignore[misc]
    task: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:+-]+$")]
    dataset_path: Literal["json", "text"]
    dataset_kwargs: Files
    output_type: Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling"]
    training_split: NotRequired[Split]
    validation_split: NotRequired[Split]
    test_split: NotRequired[Split]
    fewshot_split: NotRequired[Split]
    num_fewshot: NotRequired[Annotated[int, Field(ge=0, le=1000)]]
    doc_to_text: Template | int | Function
    doc_to_choice: NotRequired[Template | list[str] | dict[str, str] | Function]
    doc_to_target: Template | int | Function
    target_delimiter: NotRequired[Template]
    fewshot_delimiter: NotRequired[Template]
    description: NotRequired[Template]
    process_results: NotRequired[Function]
    metric_list: Annotated[list[Metric], Field(min_length=1, max_length=50)]
    metadata: NotRequired[dict[str, str | int | float | bool | None]]


def kind_refusal(name: str, kind: Any) -> UserError:
    """What to tell the user of a task that likelihoods do not answer."""
    return UserError(
        f"--tasks: {name} is a task of kind {one_line(str(kind), 60)}, which is not done here; allowed: tasks "
        f"scored by likelihood ({', '.join(SCORED)})"
    )


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
    definition: dict[str, Any] = read_definition(known[name])
    files = definition.pop("dataset_kwargs")["data_files"]
    paths = {split: _find(name, file, folders) for split, file in files.items()}
    definition["custom_dataset"] = partial(_read, paths, definition.pop("dataset_path") == "text")
    with foreign.fenced(str(known[name]), "the task's definition does not fit its rows"):
        task = ConfigurableTask(config=definition)
        for rows in task.dataset.values():
            for number, row in enumerate(rows, start=1):
                _check_row(task, row, number)
    return task


def _check_row(task: ConfigurableTask, row: dict[str, Any], number: int) -> None:
    """Ask what the harness will ask, before a model is loaded; ValueError names the row."""
    try:
        task.doc_to_text(row)
        task.doc_to_target(row)
        choices = task.doc_to_choice(row) if task.OUTPUT_TYPE == "multiple_choice" else ["-"]
    except Exception as error:
        raise ValueError(f"row {number}: {foreign.reason(error)}") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise ValueError(f"row {number}: choices {brief(choices)}; expected a list of texts, none of them empty")


class _Definition(yaml.SafeLoader):
    """YAML in which `!function` names a function of the list; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        foreign.check_keys(node)
        return super().construct_mapping(node, deep)


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.value not in FUNCTIONS:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"!function {brief(node.value)} was given; allowed: {', '.join(FUNCTIONS)}",
            node.start_mark,
        )
    module, _, name = node.value.rpartition(".")
    return getattr(importlib.import_module(module), name)


_Definition.add_constructor("!function", _function)


def read_definition(path: Path) -> Any:
    """The `Definition` in a file; UserError when it is none."""
    content = foreign.read_yaml(path, WHAT, _Definition)
    if (
        isinstance(content, dict)
        and isinstance(content.get("output_type"), str)
        and content["output_type"] not in SCORED
    ):
        raise kind_refusal(path.stem, content["output_type"])
    if content is None:
        raise UserError(f"{path}: no task; expected task, dataset_kwargs with data_files, doc_to_text and so on")
    advice = f"allowed keys: {', '.join(Definition.__annotations__)}"
    return foreign.check_shape(content, str(path), Definition, advice)


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
    lm_eval.utils.env = templates.environment()
