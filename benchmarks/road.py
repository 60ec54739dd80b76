"""The road to a 2:4 model of SmolLM2-135M, by what it costs: perplexity against tokens and CPU minutes.

    python benchmarks/road.py --model HF_DIRECTORY --shared ../shared [--only NAME ...] [--kept] [--plot | --losses]

Rows begin with SparseGPT (calibration C1, see bench/study.py), or with channels in order, SparseGPT and two passes of
descent. Those that train keep the zeros; the row of frozen weights learns the mask from SparseGPT's alone. The text is
C4 and Wikipedia, once through at most. Minutes are those of the whole way. Judged by P1 and by C4 that nothing was
learned or calibrated on. With `--losses` what a few minutes of training bring by each loss, over orders of the data:
another table.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.results import HERE, MODEL, SHARED, arguments, note, option, work, write_result
from bench.study import C4_TRAINING, SMALL_LENGTH, SMALL_STEPS, Study

MASK_LENGTH = 512
LEARNING: dict[str, Any] = {"seq_length": MASK_LENGTH, "lr": 9e-4, "min_lr": 9e-5, "eval_interval": 150}
"""A learning rate that is the smaller the more steps there are: with the recipe's, of 200 steps, 1000 are worse."""
MUCH_LEARNING = LEARNING | {"scale_end": 5333, "save_interval": 300}
"""Masks that stay soft for longer: with the recipe's last scale nearly all of them are settled after 200 steps."""
SPARSEGPT: dict[str, Any] = {"method": "sparsegpt", "target": "2:4"}
STARTS: dict[str, dict[str, Any]] = {
    "sparsegpt": {},
    "ordered": {"descent_passes": 2},
    "quarter": {"descent_passes": 2, "target": "2:4,dense=25%"},
    "mask_only": {"update_weights": False, "descent_passes": 5},
    "mask_quarter": {"update_weights": False, "descent_passes": 5, "target": "2:4,dense=25%"},
}
"""What SparseGPT is given; all but the first prune the model with its channels in order."""


@dataclass(frozen=True)
class Way:
    """How a model is pruned, and what is done after."""

    name: str
    folder: str
    start: str = "sparsegpt"
    steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    """The mask is learned, and the weights are the dense model's."""

    @property
    def tokens(self) -> int:
        """That are learned from."""
        return self.steps * (MASK_LENGTH if self.frozen else SMALL_LENGTH)


ORDERED = "channels in order, SparseGPT, descent"
QUARTER = f"{ORDERED}, a quarter dense"
WAYS = [
    Way("SparseGPT", "sparsegpt"),
    Way("then training, KL from the dense model", "taught_200", steps=200),
    Way(ORDERED, "ordered", "ordered"),
    Way(f"{ORDERED}, then training, KL", "ordered_840", "ordered", 840),
    Way(f"{ORDERED}, then much training, KL", "ordered_2700", "ordered", 2700, {"save_interval": 500}),
    Way(QUARTER, "quarter", "quarter"),
    Way(f"{QUARTER}, then training, KL", "quarter_400", "quarter", 400),
    Way("learned masks, frozen weights, KL", "frozen_450", "mask_only", 450, LEARNING, frozen=True),
    Way("much learning of masks, frozen weights, KL", "frozen_1000", "mask_only", 1000, MUCH_LEARNING, frozen=True),
    Way(
        "learned masks, frozen weights, a quarter dense, KL",
        "frozen_quarter",
        "mask_quarter",
        300,
        LEARNING | {"target": "2:4,dense=25%", "lr": 1.2e-3, "min_lr": 1.2e-4},
        frozen=True,
    ),
]
FEW = 80
"""Steps: with the pruning before, about five CPU minutes."""
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("next token", {"teacher": None}),
    ("KL from the dense model", {}),
    ("both", {"lm_weight": 1}),
]
LOSS_COLUMNS = ["loss", "tokens", "perplexity", "lowest", "highest", "held-out C4", "orders", "CPU min"]
COLUMNS = ["way", "tokens", "perplexity", "held-out C4", "CPU min"]
PROTOCOL = "P1: WikiText-2 test, windows of 1024, first 32, no BOS, bf16; held-out C4: the sample's last 406 documents."


class Road(Study):
    """Makes the rows."""

    def start(self, name: str) -> tuple[Path, Path, float]:
        """The run that a way begins with, the model that it pruned, and CPU seconds of both."""
        model, before = (self.dense, {"cpu_s": 0.0}) if name == "sparsegpt" else self.ordered()
        run = self.work / name
        cost = self.verb("prune", input=model, output=run, **(SPARSEGPT | STARTS[name]), **self.texts.c1())
        return run, model, before["cpu_s"] + cost["cpu_s"]

    def run_of(self, way: Way) -> tuple[Path, float]:
        """The run at the end of a way, and the CPU seconds of all of it."""
        before, model, cost = self.start(way.start)
        if not way.steps:
            return before, cost
        run, data = self.work / way.folder, self.training_text()
        if way.frozen:
            recipe: dict[str, Any] = {"config": HERE / "maskllm_long.yaml", "prior": before, "teacher": model}
            held_out = {"eval_data": self.texts.c4, "eval_documents": f"{C4_TRAINING}:"}
            how = {**recipe, **held_out, "train_iters": way.steps, **way.options}
            more = self.verb("prune", input=model, output=run, data=data, **how)
        else:
            how = {**SMALL_STEPS, "log_interval": 10, "teacher": self.dense, "train_iters": way.steps, **way.options}
            more = self.verb("train", input=before, output=run, data=data, **how)
        return run, cost + more["cpu_s"]

    def line(self, way: Way | None) -> list[Any]:
        """A row, of the dense model without a way."""
        run, spent = (self.dense, 0.0) if way is None else self.run_of(way)
        model = run if way is None else self.trimmed(run, "_sparse")
        name, tokens = ("dense", 0) if way is None else (way.name, way.tokens)
        return [name, tokens, self.perplexity(model), self.on_held_out(model), round(spent / 60, 1)]

    def loss_line(self, name: str, options: dict[str, Any], seeds: list[int]) -> list[Any]:
        """A row of a loss, over orders of the data."""
        folder = name.replace(" ", "_")
        way = Way(name, "", "sparsegpt", FEW, options)
        ways = [replace(way, folder=f"{folder}_{n}", options={**options, "seed": n}) for n in seeds]
        lines = [self.line(each) for each in ways]
        means = [math.exp(fmean(math.log(line[place]) for line in lines)) for place in (2, 3)]
        found = [line[2] for line in lines]
        minutes = round(fmean(line[4] for line in lines), 1)
        return [name, way.tokens, means[0], min(found), max(found), means[1], len(seeds), minutes]


def draw(rows: list[list[Any]], path: Path) -> None:
    """Perplexity against CPU minutes, a point for every row that was pruned."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "road"
    import matplotlib.pyplot as plt

    dense, *others = rows
    figure, axis = plt.subplots(figsize=(8, 5.6))
    for name, _tokens, perplexity, _c4, minutes in others:
        axis.plot(minutes, perplexity, "o", label=f"{perplexity:.1f}: {name}")
    axis.axhline(dense[2], color="grey", linestyle="--", label=f"{dense[2]:.1f}: dense")
    axis.set(xlim=(0, None), xlabel="CPU minutes", ylabel="perplexity, WikiText-2", ylim=(0, None))
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Run everything and write the result file, or draw the picture of a result file."""
    only = option("--only", nargs="+", choices=[way.folder for way in WAYS], help="these rows, by folder")
    kept = option("--kept", action="store_true", help="write the rows whose runs are in the work folder")
    plot = option("--plot", type=Path, help="draw docs/images/road.svg from this result file, and run nothing")
    losses = option("--losses", action="store_true", help="the rows of losses, and their result file")
    seeds = option("--seeds", type=int, nargs="+", default=[0, 1, 2], help="orders of the data, of --losses")
    given = arguments(__doc__, MODEL, SHARED, work("runs/road"), only, kept, plot, losses, seeds, note())
    if given.plot:
        draw(json.loads(given.plot.read_text())["rows"], HERE.parent / "docs" / "images" / "road.svg")
        return
    bench = Road(given.work, given.shared)
    bench.imported(given.model)
    if given.losses:
        lines = [bench.loss_line(name, options, given.seeds) for name, options in LOSSES]
        write_result("losses", given, LOSS_COLUMNS, lines, PROTOCOL)
        return
    ways = [way for way in WAYS if not given.only or way.folder in given.only]
    if given.kept:
        ways = [way for way in ways if (bench.work / f"{way.folder}.cost.json").exists()]
    rows = [bench.line(None), *map(bench.line, ways)]
    write_result("road", given, COLUMNS, rows, f"{PROTOCOL} One order of the data.")


if __name__ == "__main__":
    main()
