"""Recovery of a pruned SmolLM2-135M: next-token loss, distillation, LoRA, from one start on one text.

    python benchmarks/recovery.py --model HF_DIRECTORY --shared ../shared --start CHECKPOINT

CHECKPOINT is a trimmed one, for instance runs/structured/minitron_parameters-100M_trimmed, which structured.py leaves.
Every run sees the same windows of the training text in the same order. Perplexity P1 (see bench/study.py). Runs that
are in the work folder are in the table whatever was asked for this time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import MODEL, SHARED, arguments, option, work, write_result
from bench.study import BATCH, LENGTH, Study


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    folder: str
    lr: str
    teacher: bool
    lora: bool = False


WAYS = [
    Way("next-token loss", "lm", "2e-4", teacher=False),
    Way("distillation", "distillation", "2e-4", teacher=True),
    Way("distillation, LoRA", "distillation_lora", "1e-3", teacher=True, lora=True),
    Way("next-token loss, LoRA", "lm_lora", "1e-3", teacher=False, lora=True),
]


def row(bench: Study, way: Way, start: Path, steps: int, run_it: bool) -> list[Any] | None:
    """One line of the table; None when it has not been run and is not to be."""
    run = bench.work / f"{way.folder}_{steps}"
    if not run_it and not (run / "weights.p1.json").exists():
        return None
    lora = {"lora_rank": 16, "lora_alpha": 32} if way.lora else {}
    cost = bench.trained(start, run, steps, lr=way.lr, teacher=bench.dense if way.teacher else None, **lora)
    return [way.name, steps, steps * BATCH * LENGTH, bench.perplexity(run / "weights"), round(cost["wall_s"] / 60, 1)]


def main() -> None:
    """Run everything and write the result file."""
    folders = [way.folder for way in WAYS]
    start = option("--start", type=Path, required=True)
    steps = option("--steps", type=int, default=400)
    ways = option("--ways", nargs="+", choices=folders, default=folders)
    given = arguments(__doc__, MODEL, SHARED, start, steps, work("runs/recovery"), ways)
    bench = Study(given.work, given.shared)
    bench.imported(given.model)
    rows = [["before", 0, 0, bench.perplexity(given.start), 0.0]]
    known = {int(run.name.rpartition("_")[2]) for way in WAYS for run in given.work.glob(f"{way.folder}_[0-9]*[0-9]")}
    for count in sorted(known | {given.steps}):
        wanted = given.ways if count == given.steps else []
        found = [row(bench, way, given.start, count, way.folder in wanted) for way in WAYS]
        rows += [line for line in found if line is not None]
    protocol = (
        f"{given.start.name}: perplexity P1, bf16 weights with float32 masters; batches of {BATCH} x {LENGTH} tokens "
        "of C4 and Wikipedia, the same for all; learning rate 2e-4 (LoRA, rank 16: 1e-3), linear. Minutes are of whole "
        "processes, teacher included."
    )
    write_result("recovery", given, ["recovery", "steps", "tokens", "perplexity", "wall min"], rows, protocol)


if __name__ == "__main__":
    main()
