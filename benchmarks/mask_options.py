"""What options of mask learning that save time or memory do to the masks: stories260K, 2:4, several seeds. One command:

    PYTHONPATH=. python benchmarks/mask_options.py [--shared ../shared]

The recipe of 60 steps (maskllm_60_steps.yaml) with 8 micro-batches of 256 tokens in a step, from the mask of SparseGPT,
on C4; every variant with the same seeds, which fix data and noise. The loss is that of held-out documents of C4 with
the finished masks, in nats per token. The model was trained on children's stories, so it is high, and the same for all.
Writes benchmarks/results/mask_options_DATE.json, of which a document's table is made.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quality import C4_TRAINING, HERE, write_result

from megatron_prune.log import read_metrics
from tests.models import stories260k

SEEDS = (0, 1, 2, 3)
VARIANTS: dict[str, tuple[str, ...]] = {
    "a mask for each micro-batch, float32 logits": (),
    "a mask for each step": ("--mask-draw", "step"),
    "bfloat16 logits": ("--logits-dtype", "bfloat16"),
}


def verb(*words: object) -> None:
    """Run a verb."""
    subprocess.run([sys.executable, "-m", "megatron_prune", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def learned(root: Path, c4: Path, seed: int, options: tuple[str, ...]) -> tuple[float, float]:
    """Held-out loss before the first step and after the last."""
    run = root / f"run_{seed}_{'_'.join(options).strip('-')}"
    words = ["prune", "--config", HERE / "maskllm_60_steps.yaml", "--input", root / "dense", "--prior", root / "prior"]
    words += ["--data", c4, "--data-documents", C4_TRAINING, "--eval-data", c4, "--eval-documents", f"{C4_TRAINING}:"]
    words += [
        "--seq-length",
        256,
        "--global-batch-size",
        8,
        "--seed",
        seed,
        "--log-interval",
        60,
        "--eval-windows",
        256,
    ]
    verb(*words, *options, "--output", run)
    records = read_metrics(run)
    first, last = (record["eval_loss"] for record in records if "eval_loss" in record)
    return first, last


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    given = parser.parse_args()
    c4 = given.shared / "data" / "c4" / "c4_en_sample.jsonl"
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        verb("import", "--input", stories260k(root / "hf"), "--dtype", "bfloat16", "--output", root / "dense")
        prior = ["prune", "--input", root / "dense", "--method", "sparsegpt", "--no-update-weights", "--target", "2:4"]
        prior += ["--calibration", c4, "--calibration-documents", C4_TRAINING]
        verb(*prior, "--calibration-samples", 64, "--calibration-seq-length", 256, "--output", root / "prior")
        for seed in SEEDS:
            for name, options in VARIANTS.items():
                before, after = learned(root, c4, seed, options)
                found[name].append(after)
                print(seed, name, before, after, flush=True)
    base = next(iter(found.values()))
    rows: list[list[Any]] = [["prior, before the first step", before, None, None]]
    for name, losses in found.items():
        change = [a - b for a, b in zip(losses, base, strict=True)]
        rows.append([name, statistics.mean(losses), statistics.mean(change), statistics.stdev(change)])
    result = {
        "columns": ["2:4, stories260K", "held-out loss", "change", "its deviation over seeds"],
        "rows": rows,
        "protocol": f"Nats per token of C4, means of {len(SEEDS)} seeds; changes against the first variant with the "
        "same seed; 60 steps of 8 micro-batches of 256 tokens; bf16.",
        "losses": found,
    }
    write_result("mask_options", result)


if __name__ == "__main__":
    main()
