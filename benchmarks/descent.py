"""What descent on SparseGPT's masks and weights brings: perplexity of SmolLM2-135M over draws of calibration windows.

    python benchmarks/descent.py --model HF_DIRECTORY --shared ../shared [--targets | --permuted | --dense]

With `--targets` what layers that lose different shares bring; with `--permuted` what an order of channels brings, which
is chosen once, with the first draw; with `--dense` what it brings to leave a share dense: other tables.

Protocol P1, calibration C1 (see bench/study.py), the draws being its seeds. What is kept in `--work` is not done again.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.results import MODEL, SHARED, arguments, note, option, work, write_result
from bench.study import Row, Study

MORE_TEXT = "--calibration-samples=256"
PASSES, SEQUENTIAL = "--descent-passes=5", "--true-sequential=true"
ROWS = [
    Row("SparseGPT", "sparsegpt", "2:4", peer="95.5 (llm-compressor)"),
    Row("and descent", "sparsegpt", "2:4", (PASSES,)),
    Row("SparseGPT, linear by linear", "sparsegpt", "2:4", (SEQUENTIAL,)),
    Row("linear by linear, and descent", "sparsegpt", "2:4", (SEQUENTIAL, PASSES)),
    Row(
        "linear by linear, 8 passes, four times the text",
        "sparsegpt",
        "2:4",
        (SEQUENTIAL, "--descent-passes=8", MORE_TEXT),
    ),
    Row("SparseGPT, mask only", "sparsegpt", "2:4", ("--no-update-weights",), peer="175.4 (locuslab/wanda's mask)"),
    Row("and descent", "sparsegpt", "2:4", ("--no-update-weights", PASSES)),
    Row("SparseGPT", "sparsegpt", "0.5", peer="50.0 (locuslab/wanda)"),
    Row("and descent", "sparsegpt", "0.5", (PASSES,)),
]
TARGETS = [
    *ROWS[-2:],
    Row("Wanda", "wanda", "0.5", peer="53.0 (locuslab/wanda)"),
    Row("Wanda, layers by outliers", "wanda", "0.5,spread=0.16"),
    Row("SparseGPT, layers by outliers", "sparsegpt", "0.5,spread=0.16"),
    Row("SparseGPT, layers by outliers, and descent", "sparsegpt", "0.5,spread=0.16", (PASSES,)),
    Row(
        "SparseGPT, values dense, layers by outliers, descent",
        "sparsegpt",
        "0.5162,spread=0.16,dense=v_proj",
        (PASSES,),
    ),
    Row("SparseGPT, some weights dense, and descent", "sparsegpt", "0.5556,dense=10%", (PASSES,)),
]
ORDERED = "channels in order"
"""Begins the names of rows that prune what `permute` writes."""
PERMUTED = [
    Row("SparseGPT", "sparsegpt", "2:4", peer="95.5 (llm-compressor)"),
    Row(f"{ORDERED}, SparseGPT", "sparsegpt", "2:4"),
    Row("SparseGPT and descent", "sparsegpt", "2:4", (PASSES,)),
    Row(f"{ORDERED}, SparseGPT and descent", "sparsegpt", "2:4", (PASSES,)),
    Row("Wanda", "wanda", "2:4", peer="173.9 (locuslab/wanda)"),
    Row(f"{ORDERED}, Wanda", "wanda", "2:4"),
]
DENSE = [
    Row("SparseGPT on all", "sparsegpt", "2:4"),
    Row("three quarters of each weight, columns", "sparsegpt", "2:4@0.75,tile=allx64"),
    Row("three quarters of each weight, tiles", "sparsegpt", "2:4@0.75"),
    Row("some weights dense", "sparsegpt", "2:4,dense=10%"),
    Row("some weights dense", "sparsegpt", "2:4,dense=25%"),
    Row("some weights dense, and descent", "sparsegpt", "2:4,dense=25%", (PASSES,)),
    Row(f"{ORDERED}, some weights dense, and descent", "sparsegpt", "2:4,dense=25%", (PASSES,)),
]
TABLES = {"descent": ROWS, "targets": TARGETS, "permuted": PERMUTED, "dense": DENSE}
COLUMNS = ["method", "kept", "perplexity", "lowest", "highest", "draws", "other tools", "CPU s"]


def drawn(row: Row, seed: int) -> Row:
    """The row with one draw of the calibration windows."""
    return Row(row.name, row.method, row.target, (*row.options, f"--calibration-seed={seed}"))


class Descent(Study):
    """Makes the rows."""

    def kept(self, row: Row, seeds: list[int]) -> bool:
        """Whether all its runs were made and evaluated."""
        names = [self.folder_of(drawn(row, seed)) for seed in seeds]
        return all((self.work / f"{name}_trimmed.p1.json").exists() for name in names)

    @staticmethod
    def folder_of(row: Row) -> str:
        """Of its run."""
        return ("permuted_" if row.name.startswith(ORDERED) else "") + row.folder

    def start(self, row: Row) -> Path:
        """The dense model, its channels in order where the row says so."""
        return self.ordered()[0] if row.name.startswith(ORDERED) else self.dense

    def line(self, row: Row, seeds: list[int]) -> list[Any]:
        """One row, over draws of the calibration windows."""
        found, spent = [], []
        for each in (drawn(row, seed) for seed in seeds):
            run, what = self.work / self.folder_of(each), {"method": each.method, "target": each.target}
            text = self.texts.c1()
            if MORE_TEXT in each.options:
                del text["calibration_samples"]
            cost = self.verb("prune", *each.options, input=self.start(each), output=run, **what, **text)
            found.append(self.perplexity(self.trimmed(run)))
            spent.append(cost["cpu_s"])
        mean = math.exp(fmean(map(math.log, found)))
        return [row.name, row.target, mean, min(found), max(found), len(seeds), row.peer, round(fmean(spent))]


def main() -> None:
    """Run everything and write the result file."""
    seeds = option("--seeds", type=int, nargs="+", default=[0, 1])
    only = option("--only", type=int, nargs="+", help="rows, by number from 0")
    tables = [
        option(
            f"--{name}",
            dest="table",
            action="store_const",
            const=name,
            help=f"the rows of {what}, and their result file",
        )
        for name, what in (
            ("targets", "other targets"),
            ("permuted", "an order of channels"),
            ("dense", "dense weights"),
        )
    ]
    kept = option("--kept", action="store_true", help="write the rows whose runs are in the work folder, and run none")
    given = arguments(__doc__, MODEL, SHARED, work("runs/descent"), seeds, only, *tables, kept, note())
    name = given.table or "descent"
    rows_of = TABLES[name]
    bench = Descent(given.work, given.shared)
    bench.imported(given.model)
    chosen = rows_of if given.kept or not given.only else [rows_of[number] for number in given.only]
    wanted = [row for row in chosen if not given.kept or bench.kept(row, given.seeds)]
    rows = [bench.line(row, given.seeds) for row in wanted]
    protocol = (
        "P1: WikiText-2 test, windows of 1024, first 32, no BOS, bf16, where the dense model has 24.20; calibration "
        "C1: 64 x 512 tokens of C4, drawn with other seeds. Descent: 5 passes unless named. Other tools: same model, "
        "text and protocol."
    )
    if any(row.name.startswith(ORDERED) for row in wanted):
        spent = bench.ordered()[1]["cpu_s"]
        protocol += f" Seconds are of prune; an order of channels takes {spent:.0f} more, once."
    write_result(name, given, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
