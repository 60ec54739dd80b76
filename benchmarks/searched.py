"""Searched and learned shapes against a uniform one of as many parameters, before and after training.

    python benchmarks/searched.py --model HF_DIRECTORY --shared ../shared --calibration TRAIN.jsonl

All come to the 107,972,928 parameters of SmolLM2-135M with MLPs of 1152 and 6 heads, Sheared LLaMA and the integer
program also to 80 million. TRAIN.jsonl as in structured.py; then every model is trained on the same windows of the
training text. Perplexity P1 (see bench/study.py). `curves` in the result file has the perplexity of each model on
WikiText-2 over the tokens that it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import CALIBRATION, MODEL, SHARED, arguments, option, work, write_result
from bench.study import BATCH, LENGTH, WINDOWS, Study, folder_name

PARAMETERS = "parameters=107972928"
UNIFORM = "ffn_hidden_size=1152,num_attention_heads=6"
SMALL = "num_layers=26,hidden_size=480,ffn_hidden_size=1104,num_attention_heads=6"
EVOLUTION = {"offspring": 8, "survivors": "2,1", "fitness_tokens": "1024,4096"}
UNTRAINED = {"training_tokens": 0}
TRAINED = {"training_tokens": "1024,4096", "training_batch": 2, "training_lr": "1e-4"}
LONG, FEW = {"generations": 15, **EVOLUTION, **UNTRAINED}, {"generations": 4, **EVOLUTION}
"""Training makes generations slow: few, with and without."""
INTEGER = {"search": "integer", "survivors": 1, "fitness_tokens": 512, **UNTRAINED}
FROM_INTEGER = {**FEW, **UNTRAINED, "start": "integer", "fitness_tokens": "512,4096"}


@dataclass(frozen=True)
class Row:
    """One way to the size."""

    name: str
    folder: str
    options: dict[str, object]
    target: str = PARAMETERS
    method: str = "darwinlm"

    @property
    def learned(self) -> bool:
        """Its pruning trains on `data`; others are calibrated."""
        return self.method == "sheared_llama"


ROWS = [
    Row("uniform, refit", folder_name("minitron", UNIFORM), {}, UNIFORM, "minitron"),
    Row("darwinlm, 15 generations", "darwinlm_evolution", LONG),
    Row("darwinlm, 4 generations", "darwinlm_short", FEW | UNTRAINED),
    Row("darwinlm, 4 generations, training-aware", "darwinlm_training_aware", FEW | TRAINED),
    Row("darwinlm, integer program", "darwinlm_integer", INTEGER),
    Row("darwinlm, integer program, then 4 generations", "darwinlm_from_integer", FROM_INTEGER),
    Row("sheared_llama", "sheared_llama", {}, UNIFORM, "sheared_llama"),
    Row("sheared_llama, 80M", "sheared_llama_80M", {}, SMALL, "sheared_llama"),
    Row("darwinlm, integer program, 80M", "darwinlm_integer_80M", INTEGER, "parameters=79329120"),
]
TOKENS = "tokens trained while pruning"
COLUMNS = ["how", "parameters", TOKENS, "perplexity", "tokens after", "perplexity after"]


class Searched(Study):
    """Prunes, evaluates, trains and evaluates again."""

    def pruned(self, row: Row, calibration: Path, steps: int) -> Path:
        """The run that decides; it trains for `steps`, where it trains."""
        run = self.work / row.folder
        text: dict[str, object] = {"calibration": calibration, **WINDOWS}
        if row.learned:
            text = self.training(steps) | {"lr": "1e-4", "lr_warmup_iters": steps // 10, "min_lr": "1e-5"}
        elif row.method == "darwinlm":
            text["database"] = self.work / "levels"
        what = {"input": self.dense, "method": row.method, "target": row.target}
        self.verb("prune", output=run, **what, **row.options, **text)
        return run

    def curve(self, row: Row, start: Path, steps: int) -> tuple[float, list[list[float]]]:
        """P1 after training, and [tokens, perplexity] on the way."""
        from megatron_prune.log import read_metrics

        run = self.work / f"{row.folder}_recovered_{steps}"
        look = {"eval_data": self.texts.wikitext, "eval_windows": 16, "eval_interval": max(1, steps // 5)}
        self.trained(start, run, steps, lr="2e-4", **look)
        lines = [line for line in read_metrics(run) if "eval_loss" in line]
        held_out = [[line["step"] * BATCH * LENGTH, math.exp(line["eval_loss"])] for line in lines]
        return self.perplexity(run / "weights"), held_out


def main() -> None:
    """Run everything and write the result file."""
    shearing = option("--shearing-steps", type=int, default=60)
    steps = option("--steps", type=int, default=50, help="of training, after pruning")
    only = option("--only", nargs="+", choices=[row.folder for row in ROWS], help="left out: all")
    given = arguments(__doc__, MODEL, SHARED, CALIBRATION, work("runs/structured"), shearing, steps, only)
    bench = Searched(given.work, given.shared)
    bench.imported(given.model)
    rows: list[list[Any]] = []
    curves: dict[str, list[list[float]]] = {}
    for row in [row for row in ROWS if not given.only or row.folder in given.only]:
        run = bench.pruned(row, given.calibration, given.shearing_steps)
        start = bench.trimmed(run)
        before = bench.perplexity(start)
        after, curves[row.name] = bench.curve(row, start, given.steps)
        seen = given.shearing_steps * BATCH * LENGTH if row.learned else 0
        rows.append([row.name, bench.parameters(run), seen, before, given.steps * BATCH * LENGTH, after])
    protocol = (
        f"Perplexity P1, bf16. Calibration: 64 x 512 tokens of Wikipedia. Evolution: generations of "
        f"{EVOLUTION['offspring']} children; integer program: single replacements on 512 tokens. Then next-token loss, "
        f"batches of {BATCH} x {LENGTH} tokens of C4 and Wikipedia, the same for all, learning rate 2e-4, linear. One "
        "seed."
    )
    write_result("searched", given, COLUMNS, rows, protocol, curves=curves)


if __name__ == "__main__":
    main()
