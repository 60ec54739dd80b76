"""The road to a 2:4 model of SmolLM2-135M, by what it costs: perplexity against tokens and CPU minutes.

    python benchmarks/road.py --model HF_DIRECTORY --shared ../shared [--only NAME ...] [--kept]

Rows that train begin with SparseGPT's weights (calibration C1, see bench/study.py) and keep its zeros; the row of
frozen weights learns the mask from SparseGPT's alone. The text is C4 and Wikipedia, once through at most. Minutes are
those of the whole way: SparseGPT, then the run. Judged by P1 and by C4 that nothing was learned or calibrated on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results import HERE, MODEL, SHARED, arguments, note, option, work, write_result
from bench.running import Times
from bench.study import C4_TRAINING, Study

LENGTH = 1024
TRAINING: dict[str, Any] = {
    **{"seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 1, "adam_eps": "1e-8"},
    **{"lr_decay_style": "linear", "min_lr": 0, "log_interval": 10},
}
SPARSEGPT = {"method": "sparsegpt", "target": "2:4"}


@dataclass(frozen=True)
class Way:
    """What is done after SparseGPT."""

    name: str
    folder: str
    steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    taught: bool = False
    frozen: bool = False
    """The mask is learned, and the weights are the dense model's."""


WAYS = [
    Way("SparseGPT", "sparsegpt"),
    Way("then training, KL from the dense model", "taught_100", 100, {"lr": 2e-4, "lr_warmup_iters": 5}, taught=True),
    Way(
        "then training, KL and half the next-token loss",
        "both_420",
        420,
        {"lr": 3e-4, "lr_warmup_iters": 10, "lm_weight": 0.5, "distillation_weight": 1},
        taught=True,
    ),
    Way("learned masks, frozen weights", "frozen_950", 950, {"adam_eps": 5e-5, "eval_interval": 190}, frozen=True),
]
COLUMNS = ["way", "tokens", "perplexity", "held-out C4", "CPU min"]


class Road(Study):
    """Makes the rows."""

    def start(self, frozen: bool) -> tuple[Path, Times]:
        """SparseGPT's run, its mask alone where weights are frozen, and what it took."""
        run = self.work / ("mask_only" if frozen else "sparsegpt")
        update = {"update_weights": False} if frozen else {}
        return run, self.verb("prune", input=self.dense, output=run, **SPARSEGPT, **update, **self.texts.c1())

    def run_of(self, way: Way) -> tuple[Path, float]:
        """The run at the end of a way, and the CPU seconds of all of it."""
        before, cost = self.start(way.frozen)
        if not way.steps:
            return before, cost["cpu_s"]
        run, data = self.work / way.folder, self.training_text()
        if way.frozen:
            recipe: dict[str, Any] = {"config": HERE / "maskllm_long.yaml", "prior": before}
            held_out = {"eval_data": self.texts.c4, "eval_documents": f"{C4_TRAINING}:"}
            how = {**recipe, **held_out, "train_iters": way.steps, **way.options}
            more = self.verb("prune", input=self.dense, output=run, data=data, **how)
        else:
            teacher = {"teacher": self.dense} if way.taught else {}
            how = {**TRAINING, **teacher, "train_iters": way.steps, **way.options}
            more = self.verb("train", input=before, output=run, data=data, **how)
        return run, cost["cpu_s"] + more["cpu_s"]

    def line(self, way: Way | None) -> list[Any]:
        """A row, of the dense model without a way."""
        run, spent = (self.dense, 0.0) if way is None else self.run_of(way)
        model = run if way is None else self.trimmed(run, "_sparse")
        tokens = 0 if way is None else LENGTH * way.steps
        on_c4 = self.perplexity(model, self.work / f"{model.name}.c4.json", self.held_out())
        return ["dense" if way is None else way.name, tokens, self.perplexity(model), on_c4, round(spent / 60, 1)]

    def held_out(self) -> Path:
        """The documents of C4 that nothing sees before."""
        path = self.work / "c4_held_out.jsonl"
        if not path.exists():
            lines = self.texts.c4.read_text(encoding="utf-8").splitlines()[C4_TRAINING:]
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path


def main() -> None:
    """Run everything and write the result file."""
    only = option("--only", nargs="+", choices=[way.folder for way in WAYS], help="these rows, by folder")
    kept = option("--kept", action="store_true", help="write the rows whose runs are in the work folder")
    given = arguments(__doc__, MODEL, SHARED, work("runs/road"), only, kept, note())
    bench = Road(given.work, given.shared)
    bench.imported(given.model)
    ways = [way for way in WAYS if not given.only or way.folder in given.only]
    if given.kept:
        ways = [way for way in ways if (bench.work / f"{way.folder}.cost.json").exists()]
    rows = [bench.line(None), *map(bench.line, ways)]
    protocol = (
        "P1: WikiText-2 test, windows of 1024, first 32, no BOS, bf16; held-out C4: the sample's last 406 "
        "documents. One order of the data."
    )
    write_result("road", given, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
