"""What descent on SparseGPT's masks and weights brings: perplexity of SmolLM2-135M over draws of calibration windows.

    python benchmarks/descent.py --model HF_DIRECTORY --shared ../shared

Protocol P1, calibration C1 (see bench/study.py), the draws being its seeds. What is kept in `--work` is not done again.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from bench.results import MODEL, SHARED, arguments, option, work, write_result
from bench.study import Row, Study

PASSES = "--descent-passes=5"
ROWS = [
    Row("SparseGPT", "sparsegpt", "2:4", peer="95.5 (llm-compressor)"),
    Row("and descent", "sparsegpt", "2:4", (PASSES,)),
    Row("SparseGPT, mask only", "sparsegpt", "2:4", ("--no-update-weights",), peer="175.4 (locuslab/wanda's mask)"),
    Row("and descent", "sparsegpt", "2:4", ("--no-update-weights", PASSES)),
    Row("SparseGPT", "sparsegpt", "0.5", peer="50.0 (locuslab/wanda)"),
    Row("and descent", "sparsegpt", "0.5", (PASSES,)),
]
COLUMNS = ["method", "kept", "perplexity", "lowest", "highest", "draws", "other tools", "CPU s"]


class Descent(Study):
    """Makes the rows."""

    def line(self, row: Row, seeds: list[int]) -> list[Any]:
        """One row, over draws of the calibration windows."""
        found, spent = [], []
        for seed in seeds:
            options = (*row.options, f"--calibration-seed={seed}")
            drawn = Row(row.name, row.method, row.target, options)
            run, what = self.work / drawn.folder, {"method": row.method, "target": row.target}
            cost = self.verb("prune", *options, input=self.dense, output=run, **what, **self.texts.c1())
            found.append(self.perplexity(self.trimmed(run)))
            spent.append(cost["cpu_s"])
        mean = math.exp(fmean(map(math.log, found)))
        return [row.name, row.target, mean, min(found), max(found), len(seeds), row.peer, round(fmean(spent))]


def main() -> None:
    """Run everything and write the result file."""
    seeds = option("--seeds", type=int, nargs="+", default=[0, 1])
    given = arguments(__doc__, MODEL, SHARED, work("runs/descent"), seeds)
    bench = Descent(given.work, given.shared)
    bench.imported(given.model)
    rows = [bench.line(row, given.seeds) for row in ROWS]
    protocol = (
        "P1: WikiText-2 test, windows of 1024, first 32, no BOS, bf16, where the dense model has 24.20; calibration "
        "C1: 64 x 512 tokens of C4, drawn with other seeds. Descent: 5 passes. Other tools: same model, text and "
        "protocol."
    )
    write_result("descent", given, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
