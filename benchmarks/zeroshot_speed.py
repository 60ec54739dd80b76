"""Zero-shot tasks with `evaluate --tasks` and with lm-eval's own Hugging Face model, side by side in one process.

    PYTHONPATH=. python benchmarks/zeroshot_speed.py --model HF_DIRECTORY --shared ../shared

The same items of the eight local tasks, the same weights and type. lm-eval's model runs at its best batch size, found
beforehand among `--batch-sizes` on the same items; then all take turns for `--rounds` rounds. Each time is from items
to scores, with prompts and tokenisation. Writes benchmarks/results/zeroshot_speed_DATE.json; exit status 1 when a
log-likelihood differs by more than 1e-3 (float32) or an answer is another. With `--maxtext FOLDER` the same model in
MaxText takes its turns too, in a process of its environment that waits meanwhile: without loading and compiling,
which are given apart. Its CPU seconds are those of both processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import statistics
import subprocess
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

from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.decision.source import open_model
from megatron_prune.evaluation import harness
from megatron_prune.evaluation.likelihood import MegatronScorer, TransformersScorer
from megatron_prune.evaluation.maxtext import MaxTextScorer
from megatron_prune.evaluation.zeroshot import MAXTEXT_TOKENS

TASKS = "hellaswag piqa winogrande boolq arc_easy arc_challenge openbookqa rte".split()
SCORES = ("acc,none", "acc_norm,none")
PEER = "lm-eval's HFLM"
MAXTEXT = "evaluate --tasks, MaxText"


class MaxTextProcess(MaxTextScorer):
    """A scorer whose process in MaxText's environment stays."""

    def __init__(self, folder: Path, dtype: str) -> None:
        super().__init__(folder, None, MAXTEXT_TOKENS, dtype)
        threads = "--xla_cpu_multi_thread_eigen=false" if torch.get_num_threads() == 1 else ""
        more = {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": threads}
        words = [self.python, HERE / "zeroshot_maxtext.py", folder, MAXTEXT_TOKENS, dtype]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(list(map(str, words)), env=os.environ | more, text=True, **pipes)
        self.cpu: list[float] = []
        """CPU seconds: of loading, then of each call."""
        self._wait()

    def ask(self, asked: Path, answered: Path) -> None:
        """As the base class."""
        self.process.stdin.write(f"{asked}\t{answered}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        self._wait()

    def _wait(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith("seconds "):
                self.cpu.append(float(line.split()[1]))
                return
        raise SystemExit("the process of MaxText's environment has ended")


class Timed:
    """Evaluations of one model: seconds of each, and the answers of the last."""

    def __init__(self, model: Any, tasks: dict[str, Any], limit: int, elsewhere: MaxTextProcess | None = None) -> None:
        """`elsewhere`: the process that computes, where it is not this one."""
        self.model, self.tasks, self.limit, self.elsewhere = model, tasks, limit, elsewhere
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.answers: list[Any] = []
        self.scores: dict[str, float] = {}

    def run(self) -> float:
        """Evaluate once; wall seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        found: Any = evaluator.evaluate(self.model, self.tasks, limit=self.limit)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu + (self.elsewhere.cpu[-1] if self.elsewhere else 0.0))
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
    parser.add_argument("--maxtext", type=Path, help="the same model as export --format maxtext writes it")
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
        compiling = {}
        if given.maxtext is not None:
            process = MaxTextProcess(given.maxtext, given.dtype)
            timed |= {MAXTEXT: Timed(harness.Harness(process, tokenizer), tasks, given.limit, process)}
            timed[MAXTEXT].run()
            compiling = {"loading": process.cpu[0], "first call": process.cpu[1]}
            print(compiling, flush=True)
            timed[MAXTEXT].cpu.clear()
            timed[MAXTEXT].wall.clear()
        sizes = best_batch_size(peer, timed[PEER], given.batch_sizes)
        for _ in range(given.rounds):
            for name, one in timed.items():
                print(f"{name}: {one.run():.1f} s", flush=True)
    return report(given, timed, sizes, peer.batch_size_per_gpu, compiling)


def report(
    given: argparse.Namespace, timed: dict[str, Timed], sizes: dict[int, float], best: int, compiling: dict[str, float]
) -> int:
    """Write the result file; `compiling`: CPU seconds of MaxText's process that are in none of its turns."""
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
    today, threads = datetime.date.today().isoformat(), torch.get_num_threads()
    result = {
        "columns": ["", "wall s", "CPU s", "times faster", "in CPU time", "largest difference", "scores that differ"],
        "rows": rows,
        "protocol": f"SmolLM2-135M, {given.dtype}: the first {given.limit} items of each of {', '.join(TASKS)} "
        f"({len(peer.answers)} requests), "
        f"from items to scores, in turn in one process, medians of {given.rounds} rounds; "
        f"largest difference of a log-likelihood in nats and of {len(peer.scores)} scores "
        "those that are not equal. Batch "
        f"sizes tried (CPU s): {', '.join(f'{size}: {value:.0f}' for size, value in sizes.items())}. "
        f"{_without(compiling)}"
        f"{threads} thread{'s' * (threads > 1)}; {given.note}",
        "maxtext_cpu_seconds": compiling,
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


def _without(compiling: dict[str, float]) -> str:
    """What MaxText's turns leave out."""
    if not compiling:
        return ""
    return (
        f"MaxText without loading ({compiling['loading']:.0f} CPU s) and compiled: its first call took "
        f"{compiling['first call']:.0f} CPU s. "
    )


if __name__ == "__main__":
    sys.exit(main())
