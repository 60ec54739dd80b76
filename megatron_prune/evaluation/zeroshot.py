"""`evaluate --tasks`: scores of lm-eval's tasks, of a Megatron checkpoint in any layout or a Hugging Face directory.

Where a dense model is given, it stands in the first line of every result, and the change from it is of the same items:
its standard error is that of the paired differences.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch

from megatron_prune.config import EvaluateConfig
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.pruned import open_source
from megatron_prune.decision.run_folder import is_run
from megatron_prune.errors import UserError
from megatron_prune.evaluation import hugging_face
from megatron_prune.evaluation.likelihood import MegatronScorer, TransformersScorer
from megatron_prune.evaluation.maxtext import MaxTextScorer, refuse_options
from megatron_prune.files import new_file
from megatron_prune.log import environment
from megatron_prune.maxtext.folder import is_folder
from megatron_prune.model.description import is_checkpoint
from megatron_prune.model.layout import layout_of
from megatron_prune.results import read_result

MAXTEXT_TOKENS = 1024
"""In a batch: MaxText's scan over layers copies every weight in each forward pass, which small batches pay often."""


Samples = list[dict[str, Any]]
"""Answers of models to every item."""
Evaluated = tuple[dict[str, Any], Samples]
"""Scores of a model, and its answers to every item."""


def evaluate_tasks(config: EvaluateConfig) -> tuple[dict[str, Any], Samples]:
    """Scores of `config.input` on `config.tasks`, the dense model's before them where one is given, and all answers.

    By all processes.
    """
    options = config.tasks
    shared = config.parallelism.context_parallel_size
    if shared > 1:
        raise UserError(
            f"--context-parallel-size {shared} was given and tasks are short texts: leave it out, processes left "
            "over are replicas"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval, which is not installed: pip install 'lm-eval==0.4.13'")
    from megatron_prune.evaluation import harness

    tasks = harness.load_tasks(options.names, options.tasks_folder, options.num_fewshot)
    if not any(is_folder(Path(model)) for model in (config.input, options.dense or config.input)):
        refuse_options(config, config.input)
    dense = _finished(Path(options.dense)) if options.dense and options.dense.endswith(".json") else None
    models = [config.input] if options.dense is None or dense else [options.dense, config.input]
    found = [_evaluate(config, model, tasks) for model in models]
    results = [*([dense] if dense else []), *(result for result, _ in found)]
    check_same_items(results)
    about = {"results": results, "limit": options.limit, "environment": environment()}
    return about, [line for _, samples in found for line in samples]


def write_samples(path: Path, samples: Samples) -> None:
    """One line of JSON for each answer, in a new file. By one process."""
    with new_file(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")


def _evaluate(config: EvaluateConfig, model: str, tasks: dict[str, Any]) -> Evaluated:
    """Scores of one model with what says how they were made."""
    began = time.perf_counter()
    path = Path(model)
    ours = is_checkpoint(path) or is_run(path)
    kind = _megatron if ours else _maxtext if is_folder(path) else _hugging_face
    scores, samples = kind(config, model, tasks)
    _check_finite(model, scores)
    about = {"model": model, **scores, "seconds": time.perf_counter() - began}
    return about, [{"model": model, **sample} for sample in samples]


def _megatron(config: EvaluateConfig, path: str, tasks: dict[str, Any]) -> Evaluated:
    from megatron_prune.evaluation.harness import Harness, evaluate

    source, layout = open_source(Path(path)), layout_of(config.parallelism)
    with backend.running(layout):
        model = source.load(layout, config.dtype)
        tokenizer = load_tokenizer(source.tokenizer, model.config.vocab_size, chat=config.apply_chat_template)
        scorer = MegatronScorer(model, _tokens_per_batch(config))
        about = {"kind": "megatron", "layout": layout.describe(), "dtype": config.dtype or model.config.dtype}
        scores, samples = evaluate(
            Harness(scorer, tokenizer, config.tasks.fewshot_as_multiturn), tasks, config.tasks.limit
        )
        return about | scores, samples


def _maxtext(config: EvaluateConfig, path: str, tasks: dict[str, Any]) -> Evaluated:
    from megatron_prune.evaluation.harness import Harness, evaluate

    tokens = config.tasks.tokens_per_batch or MAXTEXT_TOKENS
    checkpoint = config.checkpoint if path == config.input else None
    scorer = MaxTextScorer(Path(path), checkpoint, tokens, config.dtype, config.settings)
    tokenizer = load_tokenizer(scorer.tokenizer, scorer.config.vocab_size, chat=config.apply_chat_template)
    about = {"kind": "maxtext", "dtype": scorer.dtype}
    scores, samples = evaluate(Harness(scorer, tokenizer, config.tasks.fewshot_as_multiturn), tasks, config.tasks.limit)
    return about | scores, samples


def _hugging_face(config: EvaluateConfig, name: str, tasks: dict[str, Any]) -> Evaluated:
    from megatron_prune.evaluation.harness import Harness, evaluate

    reader = hugging_face.open_alone(name, config.parallelism)
    about = reader.model_config
    tokenizer = load_tokenizer(reader.directory, about.vocab_size, chat=config.apply_chat_template)
    dtype = config.dtype or about.dtype
    model = hugging_face.load(reader, dtype)
    longest, window, alike = about.max_position_embeddings, about.sliding_window, about.window_layers is None
    scorer = TransformersScorer(model, longest, _tokens_per_batch(config), window, share=alike)
    scores, samples = evaluate(Harness(scorer, tokenizer, config.tasks.fewshot_as_multiturn), tasks, config.tasks.limit)
    return hugging_face.about(reader, dtype) | scores, samples


def _tokens_per_batch(config: EvaluateConfig) -> int:
    """Enough to keep the device busy and no more: small batches have less padding and stay in a processor's caches."""
    return config.tasks.tokens_per_batch or (16384 if backend.has_cuda() else 256)


def _check_finite(model: str, scores: dict[str, Any]) -> None:
    for name, task in scores["tasks"].items():
        if not all(math.isfinite(value) for value in task["metrics"].values()):
            raise UserError(f"{name}: the scores of {model} are not finite: its weights are damaged or it overflows")


def _finished(path: Path) -> dict[str, Any]:
    """The dense model's line of an earlier result."""
    try:
        kind, content = read_result(path)
    except UserError as error:
        raise UserError(f"--dense {path} is not a result of evaluate --tasks ({error}); give one, or a model") from None
    if kind != "tasks":
        raise UserError(f"--dense {path} is not a result of evaluate --tasks but of {kind}; give one, or a model")
    first: dict[str, Any] = content["results"][0]
    return first


def check_same_items(results: Sequence[dict[str, Any]]) -> None:
    """UserError unless all results are of the same items, to the letter."""
    first = results[0]
    for result in results[1:]:
        for name, task in result["tasks"].items():
            other = first["tasks"].get(name, {})
            if other.get("items_sha256") != task["items_sha256"]:
                raise UserError(
                    f"{name}: {first['model']} was evaluated on {other.get('items', 0)} items and {result['model']} on "
                    f"{task['items']}, which are not the same; evaluate the dense model with the same options"
                )
        for kind in ("tasks", "groups"):
            for name, entry in result.get(kind, {}).items():
                if not set(entry["metrics"]) <= set(first.get(kind, {}).get(name, {}).get("metrics", {})):
                    raise UserError(f"{name}: {first['model']} lacks metrics of it; evaluate the dense model again")


def change(one: dict[str, Any], other: dict[str, Any], metric: str) -> tuple[float, float | None]:
    """By how much a task's score in `one` is above that in `other`, and the standard error over paired items."""
    difference = one["metrics"][metric] - other["metrics"][metric]
    answers = [task.get("right", {}).get(metric) for task in (one, other)]
    if None in answers or len(answers[0]) < 2:
        return difference, None
    pairs = torch.tensor([int(a) - int(b) for a, b in zip(*answers, strict=True)], dtype=torch.float64)
    return difference, float(pairs.std() / math.sqrt(len(pairs)))


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: for each task and metric the dense model first, where there is one, and then the model."""
    lines = [["task", "metric", "items", "shots", "model", "score", "+-", "change", "+-"]]
    for kind in ("tasks", "groups"):
        for name, entry in results[-1].get(kind, {}).items():
            for metric in entry["metrics"]:
                entries = [(Path(result["model"]).name, result[kind][name]) for result in results]
                lines += [
                    [name, metric, *_line(metric, model, own, entries[0][1] if number else None)]
                    for number, (model, own) in enumerate(entries)
                ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return ["  ".join(line).rstrip() for line in lines] + ["+- is one standard error; of changes, over the same items"]


def _line(metric: str, model: str, own: dict[str, Any], dense: dict[str, Any] | None) -> list[str]:
    cells = [str(own.get("items", "")), str(own.get("num_fewshot", "")), model]
    cells += [f"{own['metrics'][metric]:.4f}", _error(own["standard_errors"][metric])]
    if dense is None:
        return [*cells, "", ""]
    difference, error = change(own, dense, metric)
    return [*cells, f"{difference:+.4f}", _error(error)]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
