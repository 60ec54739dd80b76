"""Perplexity of SmolLM2-135M, dense and pruned, after `export --quantize`: what is written, evaluated.

    python benchmarks/quantise.py --model HF_DIRECTORY --shared ../shared --work runs/quantise

Half of protocol P1, its first 16 windows; calibration C1 (see bench/study.py) for pruning, its first 16 windows for
quantising. `evaluate` opens the directory that engines get and computes in bf16 with its rounded weights and, for fp8
and nvfp4, with inputs rounded as it says. Wants nvidia-modelopt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.results import MODEL, SHARED, arguments, installed, option, work, write_result
from bench.study import Row, Study

FORMS = ("bf16", "fp8", "int4_awq", "nvfp4")
MODELS = (
    Row("dense", "", ""),
    Row("SparseGPT 2:4, weights updated", "sparsegpt", "2:4"),
    Row("Minitron, 99M parameters", "minitron", "ffn_hidden_size=1024,num_query_groups=2"),
)
"""Sizes of the last are multiples of 64, by which int4_awq goes."""
SAMPLES = 16
"""Calibration windows for quantising: AWQ's search runs every linear a dozen times for each."""
WINDOWS = 16
"""Of the text that is evaluated."""
COLUMNS = ["model", "form", "perplexity", "times bf16", "MB on disk", "zeros of the linears", "2:4"]


class Quantised(Study):
    """Makes the rows."""

    def checkpoint(self, row: Row) -> Path:
        """The dense model, or what pruning it leaves."""
        if not row.method:
            return self.dense
        run = self.work / row.folder
        self.verb("prune", input=self.dense, output=run, method=row.method, target=row.target, **self.texts.c1())
        return self.trimmed(run)

    def rows(self, row: Row) -> list[list[Any]]:
        """One for each form of a model."""
        checkpoint = self.checkpoint(row)
        found = [self.cells(row, form, self.exported(checkpoint, form)) for form in FORMS]
        return [[*line[:3], line[2] / found[0][2], *line[3:]] for line in found]

    def exported(self, checkpoint: Path, form: str) -> Path:
        """The directory of one form."""
        output = self.work / f"{checkpoint.name}_{form}"
        options = {} if form == "bf16" else {"quantize": form, **self.texts.c1(), "calibration_samples": SAMPLES}
        self.verb("export", input=checkpoint, output=output, **options)
        return output

    def cells(self, row: Row, form: str, directory: Path) -> list[Any]:
        """What is measured of one directory."""
        result = directory.with_name(directory.name + ".verified.json")
        pattern = {"target": row.target} if row.target == "2:4" else {}
        self.verb("verify", input=directory, output=result, **pattern)
        checks = json.loads(result.read_text())
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6
        holds = "holds" if pattern and checks["pattern"]["holds"] else ""
        zeros = f"{checks['zeros']['zeros'] / checks['density']['weights']:.2%}"
        return [row.name, form, self.first_windows(directory), size, zeros, holds]

    def first_windows(self, directory: Path) -> float:
        """Perplexity of the first windows of P1."""
        result = directory.with_name(f"{directory.name}.first_{WINDOWS}.json")
        self.verb("evaluate", input=directory, text=self.texts.wikitext, output=result, windows=WINDOWS)
        return float(json.loads(result.read_text())["perplexity"])


def main() -> None:
    """Run everything and write the result file."""
    only = option("--only", help="do just the models whose name has this in it, without a result file")
    given = arguments(__doc__, MODEL, SHARED, work("runs/quantise"), only)
    bench = Quantised(given.work, given.shared)
    bench.imported(given.model)
    if given.only:
        print([bench.rows(row) for row in MODELS if given.only in row.name])
        return
    rows = [line for row in MODELS for line in bench.rows(row)]
    protocol = (
        f"WikiText-2 test, windows of 1024, first {WINDOWS}, no BOS, bf16; calibration C1: 64 x 512 tokens of C4, for "
        f"pruning, the first {SAMPLES} windows for quantising. The decoder's linears are quantised; the embedding, 21% "
        "of the dense model and its output layer too, stays in bf16. int4_awq in blocks of 64: 128 does not divide 576."
    )
    write_result("quantise", given, COLUMNS, rows, protocol, versions=installed("nvidia-modelopt"))


if __name__ == "__main__":
    main()
