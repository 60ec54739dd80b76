"""One self-contained HTML page of runs, models and results; it asks nothing of the network."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from megatron_prune.decision.masks import MaskRow
from megatron_prune.decision.target import title
from megatron_prune.log import left_start
from megatron_prune.reporting import pictures
from megatron_prune.reporting.collect import Collected, Result
from megatron_prune.results import fullest
from megatron_prune.version import VERSION

TEMPLATE = "page.html.j2"
_ABSOLUTE = re.compile(r"(?<![\w./:~-])/[^\s'\",\]]+")
"""An absolute path in a configuration."""


def render(found: Collected, title: str) -> str:
    """The page as HTML; text from files is escaped."""
    page: str = _template().render(
        title=title,
        found=found,
        curves=pictures.curves(found.runs),
        colours=pictures.COLOURS,
        density={run.name: density_table(run.masks) for run in found.runs if run.masks},
        totals={run.name: (sum(r.kept for r in run.masks), sum(r.size for r in run.masks)) for run in found.runs},
        units={run.name: pictures.units(run.removed) for run in found.runs if run.removed},
        perplexity=perplexity_rows(found.of("evaluate")),
        loads=load_rows(found.of("evaluate")),
        tasks=task_table(found.of("tasks")),
        bench=bench_rows(found.of("bench")),
        task_means=task_means(found.of("tasks")),
        moved={run.name: left_start(run.metrics) for run in found.runs},
        version=VERSION,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
    return page


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figures": figures, "mib": lambda size: f"{size / 2**20:.1f}", "title_of": title}
    environment.filters |= {"place": place, "places": lambda text: _ABSOLUTE.sub(lambda path: place(path[0]), text)}
    return environment.from_string((files(__package__) / TEMPLATE).read_text(encoding="utf-8"))


def place(path: str) -> str:
    """The last part of an absolute path, for folders of a machine are nobody else's business; other text as it is."""
    return PurePosixPath(path).name if path.startswith("/") else path


def task_means(results: list[Result]) -> list[tuple[str, int, float]]:
    """Model, number of tasks, and the mean over them of each one's first score."""
    found = [(model["model"], model["tasks"]) for result in results for model in result.content["results"]]
    firsts = [(name, [list(task["metrics"].values())[:1] for task in tasks.values()]) for name, tasks in found]
    scores = [(name, [score for first in each for score in first]) for name, each in firsts]
    return [(name, len(values), sum(values) / len(values)) for name, values in scores if values]


def figures(value: Any) -> str:
    """A number to four figures, whole numbers in full; nothing for None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def density_table(masks: list[MaskRow]) -> dict[str, Any]:
    """Projections as columns, layers as rows, densities as cells (None: that layer has no such mask)."""
    columns = list(dict.fromkeys(row.projection for row in masks))
    cells: dict[int, dict[str, float]] = {}
    for row in masks:
        cells.setdefault(row.layer, {})[row.projection] = row.density
    rows = [(layer, [cells[layer].get(column) for column in columns]) for layer in sorted(cells)]
    return {"columns": columns, "rows": rows}


def perplexity_rows(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each text and model; `times` is against the first result of the same text and protocol."""
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str], float] = {}
    for result in results:
        about = result.content
        text = about["text"]
        key = (text["sha256"], about["protocol"])
        reference = first.setdefault(key, about["perplexity"])
        row = {"file": result.name, "model": about["input"], "text": text["source"], "protocol": about["protocol"]}
        rows.append(row | {"perplexity": about["perplexity"], "times": about["perplexity"] / reference})
    return rows


def load_rows(results: list[Result]) -> list[dict[str, Any]]:
    """How evenly each model's experts are used, where that was counted; the picture has a row for each layer."""
    rows = []
    for result in results:
        layers = [layer for layer in result.content.get("expert_tokens", []) if layer and any(layer)]
        if layers:
            most = max(map(fullest, layers))
            idle = sum(layer.count(0) for layer in layers)
            row = {"file": result.name, "model": result.content["input"], "fullest": most, "idle": idle}
            rows.append(row | {"experts": sum(map(len, layers)), "picture": pictures.load(layers)})
    return rows


def task_table(results: list[Result]) -> dict[str, Any]:
    """Tasks and their metrics as columns, models as rows: (score, standard error), None where not measured."""
    columns: list[tuple[str, str]] = []
    rows = []
    models = [(result.name, model) for result in results for model in result.content["results"]]
    for name, model in models:
        scores = {
            (task, metric): (value, about["standard_errors"].get(metric))
            for task, about in model["tasks"].items()
            for metric, value in about["metrics"].items()
        }
        columns += [column for column in scores if column not in columns]
        rows.append((name, model["model"], scores))
    return {"columns": columns, "rows": [(*row, [scores.get(column) for column in columns]) for *row, scores in rows]}


def bench_rows(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each model, form (dense, sparse) and batch size."""
    return [
        {"file": result.name, "model": result.content["input"], "form": form, **line}
        for result in results
        for form in ("dense", "sparse")
        for line in result.content.get(form, [])
    ]
