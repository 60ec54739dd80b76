"""Perplexity of SmolLM2-135M after every method that masks weights, through the verbs a user would type.

    python benchmarks/quality.py --model HF_DIRECTORY --shared ../shared --work runs/quality

Protocol P1, calibration C1 (see bench/study.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import HERE, MODEL, SHARED, arguments, note, option, work, write_result
from bench.running import Times
from bench.study import C4_TRAINING, Row, Study

MASK_ONLY = Row(
    "SparseGPT, mask only", "sparsegpt", "2:4", ("--no-update-weights",), peer="175.4 (locuslab/wanda's mask)"
)
"""What learned masks start from."""
ONE_SHOT = [
    Row("magnitude", "magnitude", "2:4", peer="1730 (locuslab/wanda)"),
    Row("Wanda", "wanda", "2:4", peer="173.9 (locuslab/wanda)"),
    Row("Wanda", "wanda", "1:4"),
    Row("Wanda", "wanda", "4:8", peer="91.0 (locuslab/wanda)"),
    Row("Wanda", "wanda", "0.5", peer="53.0 (locuslab/wanda)"),
    Row("SparseGPT, weights updated", "sparsegpt", "2:4", peer="95.5 (llm-compressor)"),
    Row("SparseGPT, weights updated", "sparsegpt", "0.5", peer="50.0 (locuslab/wanda)"),
    Row("SparseGPT, weights updated, sequential", "sparsegpt", "2:4", ("--true-sequential",)),
    Row("SparseGPT, weights updated, sequential", "sparsegpt", "0.5", ("--true-sequential",)),
    MASK_ONLY,
    Row("SparseGPT, mask only, sequential", "sparsegpt", "2:4", ("--no-update-weights", "--true-sequential")),
]
SEEDS = ("0", "1", "2")
"""Draws of the calibration windows with which SparseGPT 2:4, weights updated, is repeated."""
LEARNED = [
    ("learned masks, 60 steps of 512 tokens", "maskllm_60_steps.yaml", "124.7 (published formulation)"),
    ("learned masks, long run", "maskllm_long.yaml", ""),
]
JOINT = (
    *("--train-weights", "--train-norms", "--weight-gradient", "dense", "--weight-lr-multiplier", "0.1"),
    *("--weight-eps", "1e-8", "--weight-clip", "1", "--masked-decay", "10"),
)
"""Weights at a tenth of the recipe's learning rate, as `train` has it; what masks remove decays."""
TRAINED: dict[str, Any] = {
    "train_iters": 200,
    "global_batch_size": 1,
    "seq_length": 1024,
    "lr": 1.5e-4,
    "min_lr": 1.5e-5,
}
"""After learning: as many tokens again, at the weights' learning rate of the joint rows."""


@dataclass(frozen=True)
class Taught:
    """A learned mask that is given more than the recipe has; the recipe is that of the long run."""

    name: str
    folder: str
    options: tuple[str, ...] = ()
    taught: bool = False
    """By the dense model, also in what follows."""
    warm: bool = False
    """From the weights that SparseGPT has updated, and its mask."""
    trained: bool = False
    """Weights train after the masks are learned."""


TAUGHT = [
    Taught("learned masks, KL from the dense model", "taught", taught=True),
    Taught("learned masks, then training, next token", "then_trained", trained=True),
    Taught("learned masks, then training, KL from the dense model", "then_taught", trained=True, taught=True),
    Taught("masks and weights together, next token", "joint", JOINT),
    Taught("masks and weights together, KL from the dense model", "joint_taught", JOINT, taught=True),
    Taught("learned masks from SparseGPT's weights, KL", "warm_taught", taught=True, warm=True),
    Taught("masks and weights together from SparseGPT's weights, KL", "warm_joint", JOINT, taught=True, warm=True),
]
UPDATED = ONE_SHOT[5]
"""SparseGPT 2:4 with its weights, the start of warm rows."""
COLUMNS = ["method", "kept", "perplexity", "other tools", "wall s", "CPU s", "peak GiB"]


class Quality(Study):
    """Makes the rows."""

    def one_shot(self, row: Row) -> list[Any]:
        """Prune, trim and evaluate."""
        run, what = self.work / row.folder, {"method": row.method, "target": row.target}
        text = {} if row.method == "magnitude" else self.texts.c1()
        cost = self.verb("prune", *row.options, input=self.dense, output=run, **what, **text)
        return self.cells(row.name, row.target, self.trimmed(run, "_sparse"), cost, row.peer)

    def seeds(self, *options: str) -> list[float]:
        """P1 of SparseGPT 2:4, weights updated, over other draws of the calibration windows."""
        draws: list[tuple[str, ...]] = [() if seed == "0" else ("--calibration-seed", seed) for seed in SEEDS]
        return [self.one_shot(Row("", "sparsegpt", "2:4", (*options, *draw)))[2] for draw in draws]

    def learned(self, name: str, recipe: str, peer: str) -> list[Any]:
        """Learn from the mask-only SparseGPT prior, trim and evaluate."""
        self.one_shot(MASK_ONLY)
        run = self.work / Path(recipe).stem
        start = {"config": HERE / recipe, "input": self.dense, "prior": self.work / MASK_ONLY.folder}
        text = {"data": self.training_text(), "eval_data": self.texts.c4, "eval_documents": f"{C4_TRAINING}:"}
        cost = self.verb("prune", output=run, **start, **text)
        return self.cells(name, "2:4", self.trimmed(run, "_sparse"), cost, peer)

    def more(self, row: Taught) -> list[Any]:
        """Learn with what the row has besides, train on where it says so, trim and evaluate."""
        prior = UPDATED if row.warm else MASK_ONLY
        self.one_shot(prior)
        run, start = self.work / row.folder, self.work / prior.folder
        teacher: dict[str, Any] = {"teacher": self.dense} if row.taught else {}
        first = {} if row.trained else teacher
        places = {"input": start / "weights" if row.warm else self.dense, "prior": start}
        text: dict[str, Any] = {"data": self.training_text()}
        held_out = {"eval_data": self.texts.c4, "eval_documents": f"{C4_TRAINING}:"}
        recipe = HERE / "maskllm_long.yaml"
        cost = self.verb("prune", *row.options, output=run, config=recipe, **places, **text, **held_out, **first)
        if row.trained:
            run = self.work / f"{row.folder}_trained"
            more = self.verb("train", input=self.work / row.folder, output=run, **TRAINED, **text, **teacher)
            cost = {
                name: max(spent, more[name]) if name == "peak_gib" else spent + more[name]
                for name, spent in cost.items()
            }
        return self.cells(row.name, "2:4", self.trimmed(run, "_sparse"), cost, "")

    def cells(self, name: str, target: str, checkpoint: Path, cost: Times, peer: str) -> list[Any]:
        """One line of the table."""
        spent = [round(cost["wall_s"]), round(cost["cpu_s"]), round(cost["peak_gib"], 1)]
        return [name, target, self.perplexity(checkpoint), peer, *spent]


def main() -> None:
    """Run everything and write the result file."""
    only = option("--only", help="do just this recipe, or row of --taught, and what it needs, without a result file")
    more = option("--seeds", action="store_true", help="SparseGPT 2:4 over more draws of calibration windows too")
    taught = option("--taught", action="store_true", help="masks with a teacher, with weights, and warm starts too")
    given = arguments(__doc__, MODEL, SHARED, work("runs/quality"), only, more, taught, note())
    bench = Quality(given.work, given.shared)
    cost = bench.imported(given.model)
    if given.only:
        print([bench.learned(*item) for item in LEARNED if given.only in item[1]])
        print([bench.more(row) for row in TAUGHT if given.only == row.folder])
        return
    rows = [bench.cells("dense", "", bench.dense, cost, "24.195 (transformers)")]
    rows += [bench.one_shot(row) for row in ONE_SHOT]
    rows += [bench.learned(*item) for item in LEARNED]
    rows += [bench.more(row) for row in TAUGHT] if given.taught else []
    seeds = {"layer by layer": bench.seeds(), "sequential": bench.seeds("--true-sequential")} if given.seeds else {}
    drawn = "; ".join(f"{name} {', '.join(f'{p1:.2f}' for p1 in found)}" for name, found in seeds.items())
    spread = f" SparseGPT 2:4, weights updated, calibration seeds {', '.join(SEEDS)}: {drawn}." if seeds else ""
    protocol = (
        "P1: WikiText-2 test, windows of 1024, first 32, no BOS, bf16; calibration C1: 64 x 512 tokens of C4. Other "
        f"tools: same model, text and protocol, measured earlier on a machine of the same kind.{spread}"
    )
    write_result("quality", given, COLUMNS, rows, protocol, seeds=seeds)


if __name__ == "__main__":
    main()
