"""What runs, models and result files say, as plain values that the page shows. Nothing here loads a model.

An input is known by what is in it: a run folder (run.json), a Megatron checkpoint, a Hugging Face directory, or a JSON
file that `evaluate`, `verify` or `bench` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.decision import run_folder
from megatron_prune.decision.masks import MaskRow, Masks
from megatron_prune.decision.trimming import Trim, is_trim, read_record
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.foreign import read_regular, reason
from megatron_prune.log import read_metrics
from megatron_prune.model.convert import HFReader
from megatron_prune.model.cost import parameters
from megatron_prune.model.description import is_checkpoint, read_description
from megatron_prune.model.given import wrong
from megatron_prune.results import read_result

MOST_TEXT = 10_000_000
"""Bytes of a configuration; the page shows it whole."""


@dataclass(frozen=True)
class Model:
    """A checkpoint or a Hugging Face directory."""

    name: str
    form: str
    parameters: int
    bytes: int
    """Of its weights on the disk."""
    shape: dict[str, Any]


@dataclass(frozen=True)
class Removed:
    """What a structured decision removed."""

    units: Units
    """What stays."""
    before: dict[str, int]
    """Sizes of the whole model, by Megatron's names."""
    after: dict[str, int]
    parameters: int
    """Of what stays."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    name: str
    about: run_folder.RunDescription
    metrics: list[dict[str, Any]]
    config: str
    environment: str
    size: int
    """Bytes of the whole folder."""
    masks: list[MaskRow] = field(default_factory=list)
    """Density of each layer and projection; empty unless masks were decided."""
    removed: Removed | None = None


@dataclass(frozen=True)
class Result:
    """A result file of a verb."""

    name: str
    kind: str
    """One of `results.KINDS`."""
    content: dict[str, Any]


@dataclass(frozen=True)
class Collected:
    """Everything that was given, in the order given."""

    runs: list[Run]
    models: list[Model]
    results: list[Result]

    def of(self, kind: str) -> list[Result]:
        """The results of one kind."""
        return [result for result in self.results if result.kind == kind]


def collect(inputs: Sequence[Path]) -> Collected:
    """Read every input; UserError, naming it, for one that is none of those known."""
    found = Collected([], [], [])
    for path, name in zip(inputs, names(inputs), strict=True):
        if run_folder.is_run(path):
            found.runs.append(read_run(path, name))
        elif is_checkpoint(path) or (path / "config.json").is_file():
            found.models.append(read_model(path, name))
        elif path.suffix == ".json" and path.is_file():
            found.results.append(Result(name, *read_result(path)))
        else:
            raise wrong(path, "reported")
    return found


def names(inputs: Sequence[Path]) -> list[str]:
    """The last part of each path, longer where two would be the same."""
    short = [path.name for path in inputs]
    return [str(path) if short.count(name) > 1 else name for path, name in zip(inputs, short, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """A run folder, finished or not."""
    masks: list[MaskRow] = []
    removed = None
    about = run_folder.read_run(path)
    decision = run_folder.decision_of(path) if about.state == "decided" else path / "decision"
    if is_trim(decision):
        removed = _removed(decision)
    elif decision.is_dir():
        masks = Masks.load(decision).summary()
    return Run(
        name,
        about,
        read_metrics(path),
        _text(path / "config.yaml"),
        _text(path / "environment.json"),
        _size(path),
        masks,
        removed,
    )


def _removed(decision: Path) -> Removed:
    about = read_record(decision)
    return Removed(Trim.load(decision).units, about.before.given(), about.after.given(), about.parameters)


def read_model(path: Path, name: str) -> Model:
    """A Megatron checkpoint or a Hugging Face directory."""
    if is_checkpoint(path):
        form, config, weights = "Megatron checkpoint", read_description(path).config, path / "weights"
    else:
        form, config, weights = "Hugging Face", HFReader(path).model_config, path
    sizes = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups vocab_size dtype".split()
    files = [file for file in weights.rglob("*") if file.suffix in (".safetensors", ".bin", ".distcp")]
    sizes += ["num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk"] if config.num_moe_experts else []
    shape = {key: getattr(config, key) for key in sizes}
    return Model(name, form, parameters(config), sum(file.stat().st_size for file in files), shape)


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return read_regular(path, "a run", MOST_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({reason(error)}); restore it") from None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
