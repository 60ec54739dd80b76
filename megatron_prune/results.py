"""What result files of `evaluate`, `verify` and `bench` hold, as far as other verbs read it; what else is in them is
passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from megatron_prune.errors import UserError
from megatron_prune.foreign import read_json
from megatron_prune.schema import Above0, Count, Measured, Number, Share

WHAT = "a result of evaluate, verify or bench"


class _Text(TypedDict):
    source: str
    sha256: str


_Load = Annotated[list[Count], Field(min_length=1, max_length=4096)]
"""Tokens of each expert of a layer."""


def fullest(tokens: Sequence[int]) -> float:
    """How many times an even share of a layer's tokens its fullest expert gets."""
    return max(tokens) * len(tokens) / sum(tokens)


class Perplexity(TypedDict):
    """Of `evaluate --text`."""

    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    protocol: str
    input: str
    text: _Text
    expert_tokens: NotRequired[Annotated[list[_Load | None], Field(min_length=1, max_length=10_000)]]
    """Of each layer, None without experts."""


class Scores(TypedDict):
    """Of a task or a group of tasks."""

    metrics: dict[str, Number]
    standard_errors: dict[str, Measured | None]


class Task(Scores):
    """A task's scores and what tells its items apart."""

    items: Count
    num_fewshot: Count
    items_sha256: str
    right: NotRequired[dict[str, Annotated[str, Field(pattern="^[01]*$")]]]


def _counted(scores: TaskScores) -> TaskScores:
    """ValueError where a task does not say for each of its items whether it was right."""
    for name, task in scores["tasks"].items():
        if any(len(found) != task["items"] for found in task.get("right", {}).values()):
            raise ValueError(f"'right' of {name} is not of its {task['items']} items")
    return scores


class TaskScores(TypedDict):
    """Of one model."""

    model: str
    tasks: dict[str, Task]
    groups: NotRequired[dict[str, Scores]]


class Tasks(TypedDict):
    """Of `evaluate --tasks`."""

    results: Annotated[list[Annotated[TaskScores, AfterValidator(_counted)]], Field(min_length=1)]


class _Density(TypedDict):
    density: Share
    weights: Count


class _Zeros(TypedDict):
    zeros: Count
    negative_zeros: Count


class _Pattern(TypedDict):
    target: str
    holds: bool


class _Logits(TypedDict):
    against: str
    max_absolute_difference: Measured
    holds: bool


class Verified(TypedDict):
    """Of `verify`."""

    holds: bool
    density: _Density
    zeros: _Zeros
    pattern: NotRequired[_Pattern]
    shape: NotRequired[_Pattern]
    logits: NotRequired[_Logits]


class _Figures(TypedDict):
    batch_size: Above0
    prefill_tokens_per_s: Number
    decode_tokens_per_s: Number
    peak_bytes: Count


class Benchmark(TypedDict):
    """Of `bench`."""

    benchmark: str
    input: str
    no_sparse_kernels: str | None
    dense: list[_Figures]
    sparse: NotRequired[list[_Figures]]


KINDS: dict[str, tuple[str, Any]] = {
    "tasks": ("results", Tasks),
    "evaluate": ("perplexity", Perplexity),
    "verify": ("holds", Verified),
    "bench": ("benchmark", Benchmark),
}
"""Kind of a result -> the key that tells it, and its shape."""


def read_result(path: Path) -> tuple[str, dict[str, Any]]:
    """The kind of a result file and all that is in it, once it has that kind's shape; UserError when it is none."""
    given = read_json(path, WHAT)
    kind = next((kind for kind, (key, _shape) in KINDS.items() if key in given), None)
    if kind is None:
        raise UserError(
            f"{path} was given and is no result of evaluate, verify or bench: give a file of their --output"
        )
    read_json(path, WHAT, KINDS[kind][1])
    return kind, given
