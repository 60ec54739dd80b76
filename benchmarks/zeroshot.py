"""Zero-shot scores of SmolLM2-135M, dense and after every method, through `evaluate --tasks`.

    python benchmarks/zeroshot.py --shared ../shared --runs runs --calibration TRAIN.jsonl

The models are those of quality.py and structured.py, in RUNS/quality and RUNS/structured; what neither makes is pruned
here, from the same text as there. Models that are not there are left out and named in the result.

Scores are percentages with 95% errors, zero-shot: acc_norm where the public task has it, else acc, of the first
`--limit` items of each task (RTE has 277, the others more). The change of a mean is over the same items, and so is its
error: items that both models answer alike do not count. BoolQ and RTE have the same two answers to every question, and
small models tend to one of them: which one changes with pruning, and the score with it. So the change without these two
stands beside.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import SHARED, arguments, installed, option, work, write_result
from bench.study import TASKS, Study

SHORT = ["HellaSwag", "PIQA", "WinoGr.", "BoolQ", "ARC-e", "ARC-c", "OBQA", "RTE"]
ONE_WORD = ("boolq", "rte")
"""Tasks with the same two answers to every question."""
Z95 = 1.96


class Model(NamedTuple):
    """One line of the table."""

    method: str
    target: str
    path: str
    """Below the folder of runs; a run that is made here is pruned with `options` and trimmed."""
    options: tuple[str, ...] = ()


SHORTENED = ("--method=shortened_llama", "--target=num_layers=27", "--calibration-samples=8")
DENSE = Model("dense", "", "quality/dense")
MODELS = [
    Model("magnitude", "2:4", "quality/magnitude_2-4_sparse"),
    Model("wanda", "2:4", "quality/wanda_2-4_sparse"),
    Model("wanda", "4:8", "quality/wanda_4-8_sparse"),
    Model("wanda", "0.5", "quality/wanda_0.5_sparse"),
    Model("sparsegpt, mask only", "2:4", "quality/sparsegpt_2-4_no-update-weights_sparse"),
    Model("sparsegpt", "2:4", "quality/sparsegpt_2-4_sparse"),
    Model("sparsegpt", "0.5", "quality/sparsegpt_0.5_sparse"),
    Model("maskllm, 60 steps", "2:4", "quality/maskllm_60_steps_sparse"),
    Model("maskllm, long run", "2:4", "quality/maskllm_long_sparse"),
    Model("shortgpt", "27 of 30 layers", "structured/shortgpt_num_layers-27_trimmed"),
    Model("shortened_llama", "27 of 30 layers", "shortened_llama_num_layers-27", SHORTENED),
    Model("minitron", "27 of 30 layers", "structured/minitron_num_layers-27_trimmed"),
    Model("minitron", "MLP 1152 of 1536", "structured/minitron_ffn_hidden_size-1152_trimmed"),
    Model("minitron", "6 of 9 heads", "structured/minitron_num_attention_heads-6_trimmed"),
    Model("minitron", "2 of 3 groups", "structured/minitron_num_query_groups-2_trimmed"),
    Model("minitron", "100M parameters", "structured/minitron_parameters-100M_trimmed"),
    Model(
        "llm_pruner",
        "MLP 1013, 2 of 3 groups",
        "structured/llm_pruner_ffn_hidden_size-1013-num_query_groups-2_trimmed",
    ),
    Model("flap", "107M parameters", "structured/flap_parameters-107M_trimmed"),
    Model("flap, no refit", "107M parameters", "structured/flap_parameters-107M_refit-none_trimmed"),
    Model("darwinlm", "108M parameters", "structured/darwinlm_evolution_trimmed"),
    Model("sheared_llama", "108M parameters", "structured/sheared_llama_trimmed"),
]


class ZeroShot(Study):
    """Makes and evaluates the models."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given.work, given.shared)
        self.runs, self.limit, self.calibration = given.runs, given.limit, given.calibration
        self.dense = self.runs / DENSE.path

    def scores(self, model: Model) -> list[dict[str, Any]] | None:
        """The dense model's scores and the model's; None when the model is not there and cannot be made."""
        path = self.made(model) if model.options else self.runs / model.path
        result = self.work / f"{path.name}_{self.limit}.json"
        if not (path.is_dir() or result.exists()):
            return None
        dense = None if model is DENSE else self.work / f"dense_{self.limit}.json"
        items = {"tasks": TASKS, "tasks_folder": self.texts.tasks, "limit": self.limit}
        self.verb("evaluate", input=path, output=result, dense=dense, **items)
        return json.loads(result.read_text())["results"]

    def made(self, model: Model) -> Path:
        """Prune and trim what no other benchmark makes."""
        run = self.work / model.path
        if self.calibration is None:
            return run.with_name(run.name + "_trimmed")
        text = {"calibration": self.calibration, "calibration_seq_length": 512}
        self.verb("prune", *model.options, input=self.dense, output=run, **text)
        return self.trimmed(run)


def metric(task: dict[str, Any]) -> str:
    """What is shown of a task."""
    return "acc_norm" if "acc_norm" in task["metrics"] else "acc"


def line(model: Model, results: list[dict[str, Any]]) -> list[Any]:
    """Method, target, each task, their mean and its change from the dense model."""
    from megatron_prune.evaluation.zeroshot import change

    dense, own = results[0]["tasks"], results[-1]["tasks"]
    cells = [(task["metrics"][m], task["standard_errors"][m]) for task in own.values() for m in [metric(task)]]
    shown = [*(percent(*cell) for cell in cells), mean(cells)]
    if model is DENSE:
        return [model.method, model.target, *shown, "", ""]
    changes = {name: change(own[name], dense[name], metric(own[name])) for name in own}
    others = [value for name, value in changes.items() if name not in ONE_WORD]
    return [model.method, model.target, *shown, mean([*changes.values()], "+"), mean(others, "+")]


def mean(cells: list[tuple[float, Any]], sign: str = "") -> str:
    """Of several tasks, with its 95% error."""
    error = math.hypot(*(error for _, error in cells)) / len(cells)
    return percent(statistics.fmean(score for score, _ in cells), error, sign)


def percent(value: float, error: float, sign: str = "") -> str:
    """`43.2 ± 4.1`"""
    return f"{100 * value:{sign}.1f} ± {100 * Z95 * error:.1f}"


def main() -> None:
    """Run everything and write the result file."""
    runs = option("--runs", type=Path, default=Path("runs"))
    calibration = option("--calibration", type=Path, help="text of what is pruned here; left out: nothing is")
    limit = option("--limit", type=int, default=400, help="items of each task")
    given = arguments(__doc__, SHARED, runs, calibration, work("runs/zeroshot"), limit)
    bench = ZeroShot(given)
    found = [(model, bench.scores(model)) for model in (DENSE, *MODELS)]
    missing = ", ".join(f"{model.method} {model.target}" for model, results in found if results is None)
    protocol = (
        f"SmolLM2-135M, zero-shot, bf16, no recovery training: the first {given.limit} items of each task, "
        "percent with 95% errors; acc_norm of HellaSwag, PIQA, ARC and OBQA, acc of the others. Chance is 25 for four "
        "choices and 50 for two. Change: of the mean, over the same items; of six: without BoolQ and RTE, where models "
        "tend to say one word and pruning changes which." + (f" Not measured: {missing}." if missing else "")
    )
    columns = ["method", "target", *SHORT, "mean", "change", "change of six"]
    rows = [line(model, results) for model, results in found if results is not None]
    write_result("zeroshot", given, columns, rows, protocol, versions=installed("lm-eval"))


if __name__ == "__main__":
    main()
