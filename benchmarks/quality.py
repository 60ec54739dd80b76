"""Perplexity of SmolLM2-135M after every method, through the verbs a user would type. One command:

    python benchmarks/quality.py --model HF_DIRECTORY --shared ../shared --work runs/quality

Protocol P1: WikiText-2 test, tokenised whole without BOS, non-overlapping windows of 1024 tokens, the first 32, bf16.
Calibration C1: the first 1,624 documents of the C4 sample, 64 windows of 512 tokens, seed 0. Stages that are already in
the work folder are not done again. Writes benchmarks/results/quality_DATE.json, of which a document's table is made.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
C4_TRAINING = 1624
"""Documents of the C4 sample that may be learned from; those after them are held out."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    method: str
    target: str
    options: tuple[str, ...] = ()
    peer: str = ""
    """The same row by the best other tool on this model, text and protocol."""

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        return "_".join([self.method, self.target.replace(":", "-"), *(o.strip("-") for o in self.options)])


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


class Bench:
    """Runs verbs in subprocesses and remembers what they took."""

    def __init__(self, model: Path, shared: Path, work: Path) -> None:
        self.model, self.shared, self.work = model, shared, work
        self.c4 = shared / "data" / "c4" / "c4_en_sample.jsonl"
        self.text = shared / "data" / "wikitext2" / "wiki.test.joined_nn.txt"
        self.dense = work / "dense"

    def verb(self, *words: object, output: Path) -> dict[str, float]:
        """Run a verb unless its output exists; wall and CPU seconds and peak memory, kept beside the output."""
        record = output.with_name(output.name + ".cost.json")
        if output.exists() and record.exists():
            return json.loads(record.read_text())
        command = [sys.executable, "-m", "megatron_prune", *map(str, words), "--output", str(output)]
        began = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
        cost = {
            "wall_s": time.perf_counter() - began,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_gib": usage.ru_maxrss / 2**20,
        }
        record.write_text(json.dumps(cost))
        return cost

    def perplexity(self, checkpoint: Path) -> dict[str, Any]:
        """P1 of a checkpoint."""
        result = checkpoint.with_name(checkpoint.name + ".p1.json")
        self.verb("evaluate", "--input", checkpoint, "--text", self.text, output=result)
        return json.loads(result.read_text())

    def trimmed(self, run: Path) -> tuple[Path, int]:
        """The cut model of a run that decided which units go, and its parameters."""
        small = run.with_name(run.name + "_trimmed")
        self.verb("trim", "--input", run, output=small)
        return small, json.loads((run / "decision" / "trim.json").read_text())["parameters"]

    def one_shot(self, row: Row) -> list[Any]:
        """Prune, trim and evaluate."""
        run = self.work / row.folder
        calibration = ["--calibration", self.c4, "--calibration-documents", C4_TRAINING]
        calibration += ["--calibration-samples", 64, "--calibration-seq-length", 512]
        words = ["prune", "--input", self.dense, "--method", row.method, "--target", row.target, *row.options]
        cost = self.verb(*words, *calibration, output=run)
        sparse = run.with_name(run.name + "_sparse")
        self.verb("trim", "--input", run, output=sparse)
        return self._cells(row.name, row.target, sparse, cost, row.peer)

    def seeds(self, *options: str) -> list[float]:
        """P1 of SparseGPT 2:4, weights updated, over other draws of the calibration windows."""
        draws: list[tuple[str, ...]] = [() if seed == "0" else ("--calibration-seed", seed) for seed in SEEDS]
        return [self.one_shot(Row("", "sparsegpt", "2:4", (*options, *draw)))[2] for draw in draws]

    def learned(self, name: str, recipe: str, peer: str) -> list[Any]:
        """Learn from the mask-only SparseGPT prior, trim and evaluate."""
        self.one_shot(MASK_ONLY)
        run = self.work / Path(recipe).stem
        words = ["prune", "--config", HERE / recipe, "--input", self.dense, "--prior", self.work / MASK_ONLY.folder]
        held_out = ["--eval-data", self.c4, "--eval-documents", f"{C4_TRAINING}:"]
        cost = self.verb(*words, "--data", self.training_text(), *held_out, output=run)
        sparse = run.with_name(run.name + "_sparse")
        self.verb("trim", "--input", run, output=sparse)
        return self._cells(name, "2:4", sparse, cost, peer)

    def training_text(self) -> Path:
        """The calibration documents of C4 and the Wikipedia articles of the training mix: none is evaluated on."""
        path = self.work / "training.jsonl"
        if not path.exists():
            c4 = self.c4.read_text(encoding="utf-8").splitlines()[:C4_TRAINING]
            with gzip.open(self.shared / "data" / "train" / "train_mix.jsonl.gz", "rt", encoding="utf-8") as mix:
                wiki = [line.rstrip("\n") for line in mix if "wiki" in json.loads(line)["source"]]
            path.write_text("".join(line + "\n" for line in [*c4, *wiki]), encoding="utf-8")
        return path

    def _cells(self, name: str, target: str, checkpoint: Path, cost: dict[str, float], peer: str) -> list[Any]:
        p1 = self.perplexity(checkpoint)["perplexity"]
        return [name, target, p1, peer, round(cost["wall_s"]), round(cost["cpu_s"]), round(cost["peak_gib"], 1)]


def hardware() -> str:
    """Processor and cores, as the operating system names them."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", help="do just this recipe (and what it needs), without a result file")
    parser.add_argument("--seeds", action="store_true", help="SparseGPT 2:4 over more draws of calibration windows too")
    parser.add_argument("--note", default="", help="what the result file must say of how these rows came about")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.model, given.shared, given.work)
    cost = bench.verb("import", "--input", given.model, output=bench.dense)
    if given.only:
        print([bench.learned(*item) for item in LEARNED if given.only in item[1]])
        return
    rows = [bench._cells("dense", "", bench.dense, cost, "24.195 (transformers)")]
    rows += [bench.one_shot(row) for row in ONE_SHOT]
    rows += [bench.learned(*item) for item in LEARNED]
    seeds = {"layer by layer": bench.seeds(), "sequential": bench.seeds("--true-sequential")} if given.seeds else {}
    drawn = "; ".join(f"{name} {', '.join(f'{p1:.2f}' for p1 in found)}" for name, found in seeds.items())
    spread = f"SparseGPT 2:4, weights updated, calibration seeds {', '.join(SEEDS)}: {drawn}. " if seeds else ""
    result = {
        "columns": ["method", "kept", "perplexity", "other tools", "wall s", "CPU s", "peak GiB"],
        "rows": rows,
        "protocol": "P1: WikiText-2 test, windows of 1024, first 32, no BOS, bf16; calibration C1: 64 x 512 tokens of "
        "C4. Other tools: same model, text and protocol, measured earlier on a machine of the same kind. "
        f"{spread}{given.note}",
        "seeds": seeds,
    }
    write_result("quality", result)


def write_result(name: str, result: dict[str, Any], **more_versions: str) -> None:
    """Write `results/NAME_DATE.json`: what was measured, when, and on what; print its path."""
    today = datetime.date.today().isoformat()
    path = HERE / "results" / f"{name}_{today}.json"
    path.parent.mkdir(exist_ok=True)
    about = {"hardware": hardware(), "date": today, "versions": versions() | more_versions}
    path.write_text(json.dumps(result | about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path)


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "megatron-core", "transformers", "numpy")}


if __name__ == "__main__":
    main()
