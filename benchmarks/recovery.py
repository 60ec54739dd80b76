"""Recovery of a pruned SmolLM2-135M: next-token loss, distillation, LoRA, from one start on one text. One command:

    python benchmarks/recovery.py --model HF_DIRECTORY --shared ../shared --start CHECKPOINT

CHECKPOINT is a trimmed one, for instance runs/structured/minitron_parameters-100M_trimmed, which structured.py leaves.
Every run sees the same windows of quality.py's training text in the same order. Perplexity P1. Runs that are in the
work folder are not done again, and are in the table whatever was asked for this time. Writes
benchmarks/results/recovery_DATE.json, of which a document's table is made.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality import Bench, write_result


@dataclass(frozen=True)
class Recovery:
    """One way to train."""

    name: str
    folder: str
    options: tuple[object, ...]
    teacher: bool


LORA = ("--lora-rank", 16, "--lora-alpha", 32)
WAYS = [
    Recovery("next-token loss", "lm", ("--lr", "2e-4"), teacher=False),
    Recovery("distillation", "distillation", ("--lr", "2e-4"), teacher=True),
    Recovery("distillation, LoRA", "distillation_lora", ("--lr", "1e-3", *LORA), teacher=True),
    Recovery("next-token loss, LoRA", "lm_lora", ("--lr", "1e-3", *LORA), teacher=False),
]
SCHEDULE = ("--lr-decay-style", "linear", "--min-lr", 0, "--lr-warmup-iters", 5, "--adam-eps", "1e-8")
BATCH, LENGTH = 4, 512
WINDOWS = ("--seq-length", LENGTH, "--micro-batch-size", BATCH, "--global-batch-size", BATCH)


class RecoveryBench(Bench):
    """Trains and evaluates."""

    def row(self, way: Recovery, start: Path, steps: int, run_it: bool) -> list[Any] | None:
        """One line of the table; None when it has not been run and is not to be."""
        words: list[object] = ["train", "--input", start, "--data", self.training_text(), "--train-iters", steps]
        words += [*WINDOWS, *SCHEDULE, *way.options, *(["--teacher", self.dense] if way.teacher else [])]
        run = self.work / f"{way.folder}_{steps}"
        if not run_it and not (run / "weights.p1.json").exists():
            return None
        cost = self.verb(*words, output=run)
        found = self.perplexity(run / "weights")["perplexity"]
        return [way.name, steps, steps * BATCH * LENGTH, found, round(cost["wall_s"] / 60, 1)]


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--ways", nargs="+", choices=[way.folder for way in WAYS], default=[way.folder for way in WAYS])
    parser.add_argument("--note", default="", help="what the result file must say of how these rows came about")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = RecoveryBench(given.model, given.shared, given.work)
    bench.verb("import", "--input", given.model, output=bench.dense)
    start = bench.perplexity(given.start)["perplexity"]
    known = {int(run.name.rpartition("_")[2]) for way in WAYS for run in given.work.glob(f"{way.folder}_[0-9]*[0-9]")}
    wanted = {(way, given.steps) for way in WAYS if way.folder in given.ways}
    rows = [(way, steps) for steps in sorted(known | {given.steps}) for way in WAYS]
    found = [bench.row(way, given.start, steps, (way, steps) in wanted) for way, steps in rows]
    result = {
        "columns": ["recovery", "steps", "tokens", "perplexity", "wall min"],
        "rows": [["before", 0, 0, start, 0.0], *(row for row in found if row is not None)],
        "protocol": f"{given.start.name}: perplexity P1, bf16 weights with float32 masters; batches of {BATCH} x "
        f"{LENGTH} tokens of C4 and Wikipedia, the same for all; learning rate 2e-4 (LoRA, rank 16: 1e-3), linear. "
        f"Minutes are of whole processes, teacher included. {given.note}".rstrip(),
    }
    write_result("recovery", result)


if __name__ == "__main__":
    main()
