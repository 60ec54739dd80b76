"""What options of mask learning that save time or memory do to the masks: stories260K, 2:4, several seeds.

    PYTHONPATH=. python benchmarks/mask_options.py

The recipe of 60 steps (maskllm_60_steps.yaml) with 8 micro-batches of 256 tokens in a step, from the mask of SparseGPT,
on C4; every variant with the same seeds, which fix data and noise. The loss is that of held-out documents of C4 with
the finished masks, in nats per token. The model was trained on children's stories, so it is high, and the same for all.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.results import HERE, SHARED, arguments, option, write_result
from bench.study import C4_TRAINING, Study, folder_name

VARIANTS: dict[str, tuple[str, ...]] = {
    "a mask for each micro-batch, float32 logits": (),
    "a mask for each step": ("--mask-draw", "step"),
    "bfloat16 logits": ("--logits-dtype", "bfloat16"),
}
SIZES = {"seq_length": 256, "global_batch_size": 8, "log_interval": 60, "eval_windows": 256}


def prepared(bench: Study) -> Path:
    """Import the model; the mask of SparseGPT that all start from."""
    from tests.models import stories260k

    bench.imported(stories260k(bench.work / "hf"), dtype="bfloat16")
    c1 = bench.texts.c1() | {"calibration_seq_length": 256}
    what = {"method": "sparsegpt", "update_weights": False, "target": "2:4"}
    bench.verb("prune", input=bench.dense, output=bench.work / "prior", **what, **c1)
    return bench.work / "prior"


def learned(bench: Study, prior: Path, seed: int, words: tuple[str, ...]) -> tuple[float, float]:
    """Held-out loss before the first step and after the last."""
    from megatron_prune.log import read_metrics

    run, c4 = bench.work / folder_name("run", str(seed), *words), bench.texts.c4
    start = {"config": HERE / "maskllm_60_steps.yaml", "input": bench.dense, "prior": prior, "seed": seed}
    text = {"data": c4, "data_documents": C4_TRAINING, "eval_data": c4, "eval_documents": f"{C4_TRAINING}:"}
    bench.verb("prune", *words, output=run, **start, **text, **SIZES)
    first, last = (record["eval_loss"] for record in read_metrics(run) if "eval_loss" in record)
    return first, last


def main() -> None:
    """Run everything and write the result file."""
    given = arguments(__doc__, SHARED, option("--seeds", type=int, default=4, help="how many, two at least"))
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as work:
        bench = Study(Path(work), given.shared)
        prior = prepared(bench)
        for seed in range(given.seeds):
            for name, words in VARIANTS.items():
                before, after = learned(bench, prior, seed, words)
                found[name].append(after)
    base = next(iter(found.values()))
    rows: list[list[Any]] = [["prior, before the first step", before, None, None]]
    for name, losses in found.items():
        change = [a - b for a, b in zip(losses, base, strict=True)]
        rows.append([name, statistics.mean(losses), statistics.mean(change), statistics.stdev(change)])
    columns = ["2:4, stories260K", "held-out loss", "change", "its deviation over seeds"]
    protocol = (
        f"Nats per token of C4, means of {given.seeds} seeds; changes against the first variant with the same seed; "
        "60 steps of 8 micro-batches of 256 tokens; bf16."
    )
    write_result("mask_options", given, columns, rows, protocol, losses=found)


if __name__ == "__main__":
    main()
