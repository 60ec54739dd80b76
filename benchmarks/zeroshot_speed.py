"""Zero-shot tasks with `evaluate --tasks` and with lm-eval's own Hugging Face model, side by side in one process.

    python benchmarks/zeroshot_speed.py --model HF_DIRECTORY --shared ../shared

The same items of the eight local tasks, the same weights and type. lm-eval's model runs at its best batch size, found
beforehand among `--batch-sizes` on the same items; then all take turns for `--rounds` rounds. Each time is from items
to scores, with prompts and tokenisation. Exit status 1 when a log-likelihood differs by more than 1e-3 (float32) or an
answer is another. With `--maxtext FOLDER` the same model in MaxText takes its turns too, in a process of its
environment that waits meanwhile: without loading and compiling, which are given apart. Its CPU seconds are those of
both processes. In bfloat16 it writes RESULTS/zeroshot_speed_bf16_DATE.json.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import HERE, MODEL, SHARED, arguments, note, option, rounds, write_result
from bench.running import Times, each, in_turns, ratios, seconds, spread
from bench.study import TASKS, Texts

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        MODEL,
        SHARED,
        option("--limit", type=int, default=16, help="items of each task"),
        option("--dtype", choices=["float32", "bfloat16"], default="float32"),
        option("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32]),
        option("--tokens-per-batch", type=int, default=256),
        option("--maxtext", type=Path, help="the same model as export --format maxtext writes it"),
        note("nothing ran beside."),
        rounds(3),
    )

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

SCORES = ("acc,none", "acc_norm,none")
PEER = "lm-eval's HFLM"
MAXTEXT = "evaluate --tasks, MaxText"
COLUMNS = ["", "wall s", "CPU s", "times faster", "in CPU time", "largest difference", "scores that differ"]


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


class Evaluation:
    """Of one model: the answers and scores of the last run."""

    def __init__(self, model: Any, tasks: dict[str, Any], elsewhere: MaxTextProcess | None = None) -> None:
        """`elsewhere`: the process that computes, where it is not this one."""
        self.model, self.tasks, self.elsewhere = model, tasks, elsewhere
        self.answers: list[Any] = []
        self.scores: dict[str, float] = {}

    def run(self) -> Times:
        """Evaluate once; seconds."""
        times = seconds(self._evaluate)
        times["cpu_s"] += self.elsewhere.cpu[-1] if self.elsewhere else 0.0
        print(type(self.model).__name__, times, flush=True)
        return times

    def _evaluate(self) -> None:
        found: Any = evaluator.evaluate(self.model, self.tasks, limit=GIVEN.limit)
        samples = [sample for name in self.tasks["tasks"] for sample in found["samples"][name]]
        self.answers = [answer for sample in samples for resps in sample["resps"] for answer in resps]
        self.scores = {f"{n} {k}": v for n, s in found["results"].items() for k, v in s.items() if k in SCORES}

    def difference(self, other: Evaluation) -> float:
        """The largest of log-likelihoods, in nats."""
        return max(abs(a[0] - b[0]) for a, b in zip(self.answers, other.answers, strict=True))


def best_batch_size(lm: HFLM, peer: Evaluation) -> dict[int, float]:
    """CPU seconds of each batch size; `lm` is left at the best."""
    found = {}
    for size in GIVEN.batch_sizes:
        lm.batch_size_per_gpu = size
        found[size] = peer.run()["cpu_s"]
    lm.batch_size_per_gpu = min(found, key=found.__getitem__)
    return found


def main() -> int:
    """Measure, compare and write the result file."""
    logging.disable(logging.WARNING)
    tasks = harness.load_tasks(TASKS, [Texts(GIVEN.shared).tasks])
    tokenizer = load_tokenizer(GIVEN.model)
    peer = HFLM(str(GIVEN.model), device="cpu", dtype=GIVEN.dtype, softmax_dtype="float32")
    with backend.running(backend.Layout()):
        model = open_model(GIVEN.model).load(backend.Layout(), GIVEN.dtype)
        ours = MegatronScorer(model, GIVEN.tokens_per_batch)
        theirs = TransformersScorer(peer.model, ours.longest, GIVEN.tokens_per_batch)
        all_of = {
            "evaluate --tasks, Megatron": Evaluation(harness.Harness(ours, tokenizer), tasks),
            "evaluate --tasks, Hugging Face": Evaluation(harness.Harness(theirs, tokenizer), tasks),
            PEER: Evaluation(peer, tasks),
        }
        compiling = {}
        if GIVEN.maxtext is not None:
            process = MaxTextProcess(GIVEN.maxtext, GIVEN.dtype)
            all_of[MAXTEXT] = Evaluation(harness.Harness(process, tokenizer), tasks, process)
            all_of[MAXTEXT].run()
            compiling = {"loading": process.cpu[0], "first call": process.cpu[1]}
        sizes = best_batch_size(peer, all_of[PEER])
        runs = in_turns({name: one.run for name, one in all_of.items()}, GIVEN.rounds, uncounted=0)
    return report(all_of, runs, sizes, compiling)


def report(
    all_of: dict[str, Evaluation], runs: dict[str, list[Times]], sizes: dict[int, float], compiling: Times
) -> int:
    """Write the result file; `compiling`: CPU seconds of MaxText's process that are in none of its turns."""
    peer, compared = all_of[PEER], {}
    rows: list[list[Any]] = []
    for name, one in all_of.items():
        compared[name] = {key: spread(ratios(runs[PEER], runs[name], key)) for key in ("wall_s", "cpu_s")}
        faster = [found["median"] for found in compared[name].values()]
        changed = sum(one.scores[key] != value for key, value in peer.scores.items())
        title = f"{name}, batch size {min(sizes, key=sizes.__getitem__)}" if name == PEER else name
        rows.append([title, *each(median, runs[name]).values(), *faster, one.difference(peer), changed])
    threads = torch.get_num_threads()
    protocol = (
        f"SmolLM2-135M, {GIVEN.dtype}: the first {GIVEN.limit} items of each of {', '.join(TASKS)} "
        f"({len(peer.answers)} requests), from items to scores, in turn in one process, medians of {GIVEN.rounds} "
        f"rounds; largest difference of a log-likelihood in nats and of {len(peer.scores)} scores those that are not "
        f"equal. Batch sizes tried (CPU s): {', '.join(f'{size}: {value:.0f}' for size, value in sizes.items())}. "
        f"{without(compiling)}{threads} thread{'s' * (threads > 1)};"
    )
    times = {name: {key[:-2]: [one[key] for one in found] for key in found[0]} for name, found in runs.items()}
    about: dict[str, Any] = {"maxtext_cpu_seconds": compiling, "seconds": times, "ratios": compared}
    suffix = "" if GIVEN.dtype == "float32" else "_bf16"
    write_result(f"zeroshot_speed{suffix}", GIVEN, COLUMNS, rows, protocol, scores=peer.scores, **about)
    return int(GIVEN.dtype == "float32" and any(row[-2] > 1e-3 or row[-1] for row in rows))


def without(compiling: Times) -> str:
    """What MaxText's turns leave out."""
    if not compiling:
        return ""
    return (
        f"MaxText without loading ({compiling['loading']:.0f} CPU s) and compiled: its first call took "
        f"{compiling['first call']:.0f} CPU s. "
    )


if __name__ == "__main__":
    sys.exit(main())
