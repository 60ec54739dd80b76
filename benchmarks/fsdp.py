"""Both engines of `train` side by side: optimizer steps of SmolLM2-135M, pruned to 2:4. One command:

    python benchmarks/fsdp.py --model HF_DIRECTORY --text TEXT.jsonl [--steps 6] [--work runs/fsdp]
    python benchmarks/fsdp.py --model HF_DIRECTORY --text TEXT.jsonl --curve

Both start from one Hugging Face directory and see the same windows. For seconds they take turns, step by step, in the
same processes, and the median counts; memory is measured with each engine in processes of its own. On two processes
megatron-core has two replicas with the distributed optimizer. What is in the work folder is not measured again. Writes
benchmarks/results/fsdp_DATE.json, of which a document's table is made. With `--curve` ten steps of the `train` verb in
float32 with either engine are compared instead, in benchmarks/results/fsdp_curve_DATE.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from quality import Bench, write_result

from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.data.training import training_windows
from megatron_prune.decision.source import read_hf
from megatron_prune.fsdp.model import ShardedModel, ShardedZeros
from megatron_prune.fsdp.trainer import FsdpTrainer, Objective
from megatron_prune.log import read_metrics
from megatron_prune.model.convert import HFReader
from megatron_prune.option_groups import Training
from megatron_prune.training.loop import Samples, Steps, Trainer
from megatron_prune.training.recovery import RecoveryLoss, Weighting
from megatron_prune.training.throughput import GIB, peak_memory
from megatron_prune.training.zeros import Zeros

BATCH, LENGTH = 4, 256
ENGINES = ("megatron", "fsdp")
CASES = ((1, 1), (1, 4), (2, 1), (2, 2))
"""Processes, and windows in a micro-batch of each."""


def megatron(reader: HFReader, training: Training, data: Samples) -> Steps:
    """megatron-core's trainer, as `train` makes it."""
    model = read_hf(reader, backend.Layout())
    count = training.num_microbatches(dist.get_world_size())
    objective = RecoveryLoss(model, Weighting(), None, count)
    return Trainer(model, training, data, objective=objective, before_update=Zeros(model).clear_gradients)


def fsdp(reader: HFReader, training: Training, data: Samples) -> Steps:
    """The FSDP trainer, as `train` makes it."""
    model = ShardedModel(reader)
    return FsdpTrainer(model, training, data, Objective(model, Weighting(), None), ShardedZeros(model))


def measure(model: Path, text: Path, steps: int, micro_batch: int, engines: list[str]) -> dict[str, Any]:
    """Wall and CPU seconds of each step, CPU over all ranks, losses, and the largest peak memory of a rank. Collective.

    The first step of an engine does not count.
    """
    reader = HFReader(model)
    training = Training(
        data=(text,),
        seq_length=LENGTH,
        micro_batch_size=micro_batch,
        global_batch_size=BATCH,
        train_iters=steps + 1,
        lr=1e-4,
        use_distributed_optimizer=dist.get_world_size() > 1,
    )
    vocabulary = reader.model_config.vocab_size
    data = training_windows(training, load_tokenizer(model, vocabulary), vocabulary)
    trainers = {name: {"megatron": megatron, "fsdp": fsdp}[name](reader, training, data) for name in engines}
    found: dict[str, Any] = {name: {"wall_s": [], "cpu_s": [], "loss": []} for name in engines}
    for step in range(steps + 1):
        for name, trainer in trainers.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            result = trainer.step(step)
            dist.barrier()
            spent = torch.tensor(time.process_time() - cpu)
            dist.all_reduce(spent)
            found[name]["loss"].append(result.loss)
            if step:
                found[name]["wall_s"].append(time.perf_counter() - wall)
                found[name]["cpu_s"].append(float(spent))
    peak = torch.tensor(peak_memory() / GIB)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {**found, "peak_gib": float(peak)}


def worker(given: argparse.Namespace) -> None:
    """One of torchrun's processes."""
    with backend.running(backend.Layout()):
        found = measure(given.model, given.text, given.steps, given.micro_batch, given.engines)
        if backend.rank() == 0:
            given.result.write_text(json.dumps(found))


def launch(
    given: argparse.Namespace, model: Path, processes: int, micro_batch: int, engines: tuple[str, ...]
) -> dict[str, Any]:
    """Measure in processes of their own."""
    result = given.work / f"{processes}_{micro_batch}_{'_'.join(engines)}.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["--model", model, "--text", given.text, "--steps", given.steps, "--micro-batch", micro_batch]
    words += ["--result", result, "--engines", *engines]
    if not result.exists():
        subprocess.run([*torchrun, __file__, *map(str, words)], check=True)
    return json.loads(result.read_text())


def sparse_model(given: argparse.Namespace, dtype: str = "bfloat16") -> Path:
    """The model pruned to 2:4 by magnitude, as a Hugging Face directory."""
    bench = Bench(given.model, Path(), given.work)
    end = "" if dtype == "bfloat16" else f"_{dtype}"
    names = {name: given.work / f"{name}{end}" for name in ("dense", "pruned", "sparse", "hf")}
    bench.verb("import", "--input", given.model, "--dtype", dtype, output=names["dense"])
    method = ["--method", "magnitude", "--target", "2:4"]
    bench.verb("prune", "--input", names["dense"], *method, output=names["pruned"])
    bench.verb("trim", "--input", names["pruned"], output=names["sparse"])
    bench.verb("export", "--input", names["sparse"], output=names["hf"])
    return names["hf"]


def rows(given: argparse.Namespace, model: Path, processes: int, micro_batch: int) -> list[list[Any]]:
    """Both engines on a number of processes."""
    both = launch(given, model, processes, micro_batch, ENGINES)
    pairs = zip(both["megatron"]["loss"], both["fsdp"]["loss"], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    found: list[list[Any]] = []
    for name in ENGINES:
        wall, cpu = median(both[name]["wall_s"]), median(both[name]["cpu_s"])
        base = both["megatron"]
        ratio = median(a / b for a, b in zip(base["cpu_s"], both[name]["cpu_s"], strict=True))
        peak = launch(given, model, processes, micro_batch, (name,))["peak_gib"]
        shown = None if name == "megatron" else difference
        found.append([name, processes, micro_batch, BATCH * LENGTH / wall, cpu, ratio, peak, shown])
    return found


def curve(given: argparse.Namespace) -> dict[str, Any]:
    """Ten float32 steps of both engines, as a user trains."""
    model = sparse_model(given, "float32")
    bench = Bench(given.model, Path(), given.work)
    sizes = ["--seq-length", LENGTH, "--micro-batch-size", 2, "--global-batch-size", BATCH, "--train-iters", 10]
    words = ["train", "--input", model, "--data", given.text, *sizes, "--lr", "1e-4"]
    for engine in ENGINES:
        bench.verb(*words, "--engine", engine, output=given.work / f"curve_{engine}")
    runs = [[line for line in read_metrics(given.work / f"curve_{engine}") if "loss" in line] for engine in ENGINES]
    rows = [
        [a["step"], a["loss"], b["loss"] - a["loss"], a["grad_norm"], b["grad_norm"] / a["grad_norm"] - 1]
        for a, b in zip(*runs, strict=True)
    ]
    return {
        "columns": ["step", "loss", "fsdp's less megatron's", "gradient norm", "relative difference"],
        "rows": rows,
        "protocol": f"SmolLM2-135M in float32, 2:4 by magnitude, zeros kept: `train` on C4, {BATCH} x {LENGTH} tokens "
        "a step in two micro-batches, learning rate 1e-4, one process.",
    }


def main() -> None:
    """Run everything and write the result file; with `--result`, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/fsdp"))
    parser.add_argument("--curve", action="store_true", help="compare losses in float32 instead of speed")
    parser.add_argument("--note", default="", help="what the result file must say of how these rows came about")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first of them, in the order of CASES")
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.result is not None:
        worker(given)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    if given.curve:
        write_result("fsdp_curve", curve(given))
        return
    model = sparse_model(given)
    result = {
        "columns": [
            "engine",
            "processes",
            "windows at a time",
            "tokens/s",
            "CPU s a step",
            "tokens per CPU s, times megatron's",
            "peak GiB",
            "largest difference of a step's loss",
        ],
        "rows": [row for case in CASES[: given.cases] for row in rows(given, model, *case)],
        "protocol": f"SmolLM2-135M, 2:4 by magnitude, zeros kept, bf16 with float32 masters; {given.steps} steps of "
        f"{BATCH} x {LENGTH} tokens of C4 after one that does not count, medians; the "
        "engines take turns step by step. CPU seconds of all processes, one thread each; peak resident memory of a "
        f"process, libraries included, with one engine alone. {given.note}".rstrip(),
    }
    write_result("fsdp", result)


if __name__ == "__main__":
    main()
