"""Searched and learned shapes against a uniform one of as many parameters, before and after training. One command:

    python benchmarks/searched.py --model HF_DIRECTORY --shared ../shared --calibration TRAIN.jsonl

All come to the 107,972,928 parameters of SmolLM2-135M with MLPs of 1152 and 6 heads, Sheared LLaMA and the integer
program also to 80 million. TRAIN.jsonl as in structured.py; then every model is trained on the same windows of
quality.py's text. Perplexity P1. What is in the work folder is not done again. Writes
benchmarks/results/searched_DATE.json, of which a document's table is made; `curves` in it has the perplexity of each
model on WikiText-2 over the tokens that it was trained on.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality import Bench, write_result
from recovery import BATCH, LENGTH, SCHEDULE, WINDOWS

from megatron_prune.log import read_metrics

PARAMETERS = "parameters=107972928"
UNIFORM = "ffn_hidden_size=1152,num_attention_heads=6"
SMALL = "num_layers=26,hidden_size=480,ffn_hidden_size=1104,num_attention_heads=6"
EVOLUTION = ("--offspring", 8, "--survivors", "2,1", "--fitness-tokens", "1024,4096")
UNTRAINED = ("--training-tokens", 0)
TRAINED = ("--training-tokens", "1024,4096", "--training-batch", 2, "--training-lr", "1e-4")
FEW = ("--generations", 4, *EVOLUTION)
"""Training makes generations slow: few, with and without."""
INTEGER = ("--search", "integer", "--survivors", 1, "--fitness-tokens", 512, *UNTRAINED)
FROM_INTEGER = ("--generations", 4, "--start", "integer", *EVOLUTION[:-1], "512,4096", *UNTRAINED)


@dataclass(frozen=True)
class Row:
    """One way to the size."""

    name: str
    folder: str
    method: str
    target: str
    options: tuple[object, ...] = ()
    learned: bool = False
    """Its pruning trains on `data`; others are calibrated."""


ROWS = [
    Row("uniform, refit", f"minitron_{UNIFORM.translate(str.maketrans('=,', '--'))}", "minitron", UNIFORM),
    Row(
        "darwinlm, 15 generations",
        "darwinlm_evolution",
        "darwinlm",
        PARAMETERS,
        ("--generations", 15, *EVOLUTION, *UNTRAINED),
    ),
    Row("darwinlm, 4 generations", "darwinlm_short", "darwinlm", PARAMETERS, (*FEW, *UNTRAINED)),
    Row("darwinlm, 4 generations, training-aware", "darwinlm_training_aware", "darwinlm", PARAMETERS, (*FEW, *TRAINED)),
    Row("darwinlm, integer program", "darwinlm_integer", "darwinlm", PARAMETERS, INTEGER),
    Row("darwinlm, integer program, then 4 generations", "darwinlm_from_integer", "darwinlm", PARAMETERS, FROM_INTEGER),
    Row("sheared_llama", "sheared_llama", "sheared_llama", UNIFORM, learned=True),
    Row("sheared_llama, 80M", "sheared_llama_80M", "sheared_llama", SMALL, learned=True),
    Row("darwinlm, integer program, 80M", "darwinlm_integer_80M", "darwinlm", "parameters=79329120", INTEGER),
]


class SearchedBench(Bench):
    """Prunes, evaluates, trains and evaluates again."""

    calibration: Path
    shearing_steps: int
    steps: int

    def pruned(self, row: Row) -> tuple[Path, int]:
        """The trimmed model and its parameters."""
        run = self.work / row.folder
        words = ["prune", "--input", self.dense, "--method", row.method, "--target", row.target, *row.options]
        if row.learned:
            words += [
                "--data",
                self.training_text(),
                "--train-iters",
                self.shearing_steps,
                "--lr",
                "1e-4",
                *WINDOWS,
            ]
            words += ["--lr-warmup-iters", self.shearing_steps // 10, "--min-lr", "1e-5", "--adam-eps", "1e-8"]
        else:
            words += ["--calibration", self.calibration, "--calibration-samples", 64, "--calibration-seq-length", 512]
        if row.method == "darwinlm":
            words += ["--database", self.work / "levels"]
        self.verb(*words, output=run)
        return self.trimmed(run)

    def trained(self, row: Row, start: Path) -> tuple[float, list[list[float]]]:
        """P1 after training, and [tokens, perplexity] on the way."""
        run = self.work / f"{row.folder}_recovered_{self.steps}"
        words: list[object] = ["train", "--input", start, "--data", self.training_text(), "--train-iters", self.steps]
        words += ["--lr", "2e-4", *SCHEDULE, *WINDOWS]
        words += ["--eval-data", self.text, "--eval-windows", 16, "--eval-interval", max(1, self.steps // 5)]
        self.verb(*words, output=run)
        lines = [line for line in read_metrics(run) if "eval_loss" in line]
        held_out = [[line["step"] * BATCH * LENGTH, math.exp(line["eval_loss"])] for line in lines]
        return self.perplexity(run / "weights")["perplexity"], held_out


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/structured"))
    parser.add_argument("--shearing-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50, help="of training, after pruning")
    parser.add_argument("--only", nargs="+", choices=[row.folder for row in ROWS], help="left out: all")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = SearchedBench(given.model, given.shared, given.work)
    bench.calibration, bench.shearing_steps, bench.steps = given.calibration, given.shearing_steps, given.steps
    bench.verb("import", "--input", given.model, output=bench.dense)
    rows: list[list[Any]] = []
    curves: dict[str, list[list[float]]] = {}
    for row in ROWS:
        if given.only and row.folder not in given.only:
            continue
        start, parameters = bench.pruned(row)
        before = bench.perplexity(start)["perplexity"]
        after, curves[row.name] = bench.trained(row, start)
        seen = bench.shearing_steps * BATCH * LENGTH if row.learned else 0
        rows.append([row.name, parameters, seen, before, bench.steps * BATCH * LENGTH, after])
    result = {
        "columns": [
            "how",
            "parameters",
            "tokens trained while pruning",
            "perplexity",
            "tokens after",
            "perplexity after",
        ],
        "rows": rows,
        "curves": curves,
        "protocol": f"Perplexity P1, bf16. Calibration: 64 x 512 tokens of Wikipedia. Evolution: generations of "
        f"{EVOLUTION[1]} children; integer program: single replacements on 512 tokens. Then next-token loss, batches "
        f"of {BATCH} x {LENGTH} tokens of C4 and Wikipedia, the same for all, learning rate 2e-4, linear. One seed.",
    }
    write_result("searched", result)


if __name__ == "__main__":
    main()
