"""Zero-shot tasks with `evaluate --tasks` and with lm-eval's own Hugging Face model, side by side in one process.

    PYTHONPATH=. python benchmarks/zeroshot_speed.py --model HF_DIRECTORY --shared ../shared

The same items of the eight local tasks, the same weights and type. lm-eval's model runs at its best batch size, found
beforehand among `--batch-sizes` on the same items; then all take turns for `--rounds` rounds. Each time is from items
to scores, with prompts and tokenisation. Writes benchmarks/results/zeroshot_speed_DATE.json; exit status 1 when a
log-likelihood differs by more than 1e-3 (float32) or an answer is another.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quality import HERE, hardware, versions

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from megatron_prune.data.text import load_tokenizer
from megatron_prune.evaluation import harness
from megatron_prune.evaluation.likelihood import MegatronScorer, TransformersScorer
from megatron_prune.model.source import open_model

TASKS = "hellaswag piqa winogrande boolq arc_easy arc_challenge openbookqa rte".split()
SCORES = ("acc,none", "acc_norm,none")
PEER = "lm-eval's HFLM"


class Timed:
    """Evaluations of one model: seconds of each, and the answers of the last."""

    def __init__(self, model: Any, tasks: dict[str, Any], limit: int) -> None:
        self.model, self.tasks, self.limit = model, tasks, limit
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.answers: list[Any] = []
        self.scores: dict[str, float] = {}

    def run(self) -> float:
        """Evaluate once; wall seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        found: Any = evaluator.evaluate(self.model, self.tasks, limit=self.limit)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        samples = [sample for name in self.tasks["tasks"] for sample in found["samples"][name]]
        self.answers = [answer for sample in samples for resps in sample["resps"] for answer in resps]
        self.scores = {f"{n} {k}": v for n, s in found["results"].items() for k, v in s.items() if k in SCORES}
        return self.wall[-1]


def best_batch_size(lm: HFLM, timed: Timed, sizes: list[int]) -> dict[int, float]:
    """CPU seconds of each batch size; `lm` is left at the best."""
    found = {}
    for size in sizes:
        lm.batch_size_per_gpu = size
        timed.run()
        found[size] = timed.cpu.pop()
        timed.wall.pop()
        print(f"{PEER}, batch size {size}: {found[size]:.1f} CPU s", flush=True)
    lm.batch_size_per_gpu = min(found, key=found.__getitem__)
    return found


def largest_difference(one: Timed, other: Timed) -> float:
    """Of log-likelihoods, in nats."""
    return max(abs(a[0] - b[0]) for a, b in zip(one.answers, other.answers, strict=True))


def main() -> int:
    """Measure, compare and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--limit", type=int, default=16, help="items of each task")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens-per-batch", type=int, default=256)
    parser.add_argument("--note", default="nothing ran beside.", help="what ran beside, for the result")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    tasks = harness.load_tasks(TASKS, [given.shared / "data" / "zeroshot"])
    tokenizer = load_tokenizer(given.model)
    peer = HFLM(str(given.model), device="cpu", dtype=given.dtype, softmax_dtype="float32")
    with backend.running(backend.Layout()):
        model = open_model(given.model).load(backend.Layout(), given.dtype)
        ours = MegatronScorer(model, given.tokens_per_batch)
        theirs = TransformersScorer(peer.model, ours.longest, given.tokens_per_batch)
        timed = {
            "evaluate --tasks, Megatron": Timed(harness.Harness(ours, tokenizer), tasks, given.limit),
            "evaluate --tasks, Hugging Face": Timed(harness.Harness(theirs, tokenizer), tasks, given.limit),
            PEER: Timed(peer, tasks, given.limit),
        }
        sizes = best_batch_size(peer, timed[PEER], given.batch_sizes)
        for _ in range(given.rounds):
            for name, one in timed.items():
                print(f"{name}: {one.run():.1f} s", flush=True)
    return report(given, timed, sizes, peer.batch_size_per_gpu)


def report(given: argparse.Namespace, timed: dict[str, Timed], sizes: dict[int, float], best: int) -> int:
    """Write the result file."""
    peer = timed[PEER]
    median: Callable[[list[float]], float] = statistics.median
    rows, differences, changed = [], {}, {}
    for name, one in timed.items():
        ratio = median([theirs / ours for theirs, ours in zip(peer.wall, one.wall, strict=True)])
        cpu = median([theirs / ours for theirs, ours in zip(peer.cpu, one.cpu, strict=True)])
        differences[name] = largest_difference(one, peer)
        changed[name] = sum(one.scores[key] != value for key, value in peer.scores.items())
        title = f"{name}, batch size {best}" if name == PEER else name
        rows.append([title, median(one.wall), median(one.cpu), ratio, cpu, differences[name], changed[name]])
    today = datetime.date.today().isoformat()
    result = {
        "columns": ["", "wall s", "CPU s", "times faster", "in CPU time", "largest difference", "scores that differ"],
        "rows": rows,
        "protocol": f"SmolLM2-135M, {given.dtype}: the first {given.limit} items of each of {', '.join(TASKS)} "
        f"({len(peer.answers)} requests), "
        f"from items to scores, in turn in one process, medians of {given.rounds} rounds; "
        f"largest difference of a log-likelihood in nats and of {len(peer.scores)} scores "
        "those that are not equal. Batch "
        f"sizes tried (CPU s): {', '.join(f'{size}: {value:.0f}' for size, value in sizes.items())}. "
        f"{torch.get_num_threads()} threads; {given.note}",
        "seconds": {name: {"wall": one.wall, "cpu": one.cpu} for name, one in timed.items()},
        "scores": peer.scores,
        "hardware": hardware(),
        "date": today,
        "versions": versions(),
    }
    suffix = "" if given.dtype == "float32" else "_bf16"
    path = HERE / "results" / f"zeroshot_speed{suffix}_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1), path, sep="\n")
    return int(given.dtype == "float32" and (max(differences.values()) > 1e-3 or any(changed.values())))


if __name__ == "__main__":
    sys.exit(main())
