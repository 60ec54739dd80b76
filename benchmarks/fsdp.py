"""Both engines of `train` side by side: optimizer steps of SmolLM2-135M, pruned to 2:4.

    python benchmarks/fsdp.py --model HF_DIRECTORY --text TEXT.jsonl [--steps 6] [--work runs/fsdp]
    python benchmarks/fsdp.py --model HF_DIRECTORY --text TEXT.jsonl --curve

Both start from one Hugging Face directory and see the same windows. For seconds they take turns, step by step, in the
same processes, and the median counts; memory is measured with each engine in processes of its own. On two processes
megatron-core has two replicas with the distributed optimizer. With `--curve` ten steps of the `train` verb in float32
with either engine are compared instead, in RESULTS/fsdp_curve_DATE.json.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import MODEL, arguments, option, work, write_result
from bench.running import GIB, Times, apart, each, in_turns, kept, ratios, seconds
from bench.study import Study

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        MODEL,
        option("--text", type=Path, required=True),
        option("--steps", type=int, default=6),
        work("runs/fsdp"),
        option("--curve", action="store_true", help="compare losses in float32 instead of speed"),
        option("--cases", type=int, help="the first of them, in the order of CASES"),
    )

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist

from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.data.training import training_windows
from megatron_prune.decision.source import read_hf
from megatron_prune.fsdp.model import ShardedModel, ShardedZeros
from megatron_prune.fsdp.trainer import FsdpTrainer, Objective
from megatron_prune.log import read_metrics
from megatron_prune.model.convert import HFReader
from megatron_prune.option_groups import Training
from megatron_prune.training.loop import Samples, Steps, Trainer
from megatron_prune.training.recovery import RecoveryLoss
from megatron_prune.training.throughput import peak_memory
from megatron_prune.training.weighting import Weighting
from megatron_prune.training.zeros import Zeros

BATCH, LENGTH = 4, 256
CASES = ((1, 1), (1, 4), (2, 1), (2, 2))
"""Processes, and windows in a micro-batch of each."""
COLUMNS = [
    "engine",
    "processes",
    "windows at a time",
    "tokens/s",
    "CPU s a step",
    "tokens per CPU s, times megatron's",
    "peak GiB",
    "largest difference of a step's loss",
]


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


ENGINES = {"megatron": megatron, "fsdp": fsdp}


def measure(model: Path, text: Path, steps: int, micro_batch: int, engines: list[str]) -> dict[str, Any]:
    """Seconds of each step, CPU over all ranks, and losses of each engine; the largest peak memory of a rank.

    The first step of an engine does not count in seconds. Runs on every rank.
    """
    with backend.running(backend.Layout()):
        training = Training(
            data=(text,),
            seq_length=LENGTH,
            micro_batch_size=micro_batch,
            global_batch_size=BATCH,
            train_iters=steps + 1,
            lr=1e-4,
            use_distributed_optimizer=dist.get_world_size() > 1,
        )
        reader = HFReader(model)
        vocabulary = reader.model_config.vocab_size
        data = training_windows(training, load_tokenizer(model, vocabulary), vocabulary)
        losses: dict[str, list[float]] = {name: [] for name in engines}

        trainers = {name: ENGINES[name](reader, training, data) for name in engines}
        works = {name: partial(timed_step, trainer, losses[name]) for name, trainer in trainers.items()}
        times = in_turns(works, steps)
        peak = torch.tensor(peak_memory() / GIB)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return {"times": times, "losses": losses, "peak_gib": float(peak)}


def timed_step(trainer: Steps, losses: list[float]) -> Times:
    """Seconds of the next step, CPU over all ranks; its loss goes to `losses`."""
    dist.barrier()
    times = seconds(lambda: losses.append(trainer.step(len(losses)).loss), end=dist.barrier)
    spent = torch.tensor(times["cpu_s"])
    dist.all_reduce(spent)
    return times | {"cpu_s": float(spent)}


def measured(model: Path, processes: int, micro_batch: int, *engines: str) -> dict[str, Any]:
    """Of engines that take turns, in processes of their own."""
    record = GIVEN.work / f"{processes}_{micro_batch}_{'_'.join(engines)}.steps.json"
    what = (model, GIVEN.text, GIVEN.steps, micro_batch, engines)
    return kept(record, lambda: apart(measure, *what, ranks=processes)[0])


def sparse_model(bench: Study, dtype: str = "bfloat16") -> Path:
    """The model pruned to 2:4 by magnitude, as a Hugging Face directory."""
    end = "" if dtype == "bfloat16" else f"_{dtype}"
    bench.dense, run = bench.work / f"dense{end}", bench.work / f"pruned{end}"
    bench.imported(GIVEN.model, dtype=dtype)
    bench.verb("prune", input=bench.dense, output=run, method="magnitude", target="2:4")
    sparse, exported = bench.trimmed(run, "_sparse"), bench.work / f"hf{end}"
    bench.verb("export", input=sparse, output=exported)
    return exported


def rows(model: Path, processes: int, micro_batch: int) -> list[list[Any]]:
    """Both engines on a number of processes."""
    both = measured(model, processes, micro_batch, *ENGINES)
    difference = max(abs(a - b) for a, b in zip(*both["losses"].values(), strict=True))
    found: list[list[Any]] = []
    for name, times in both["times"].items():
        wall, cpu = each(median, times).values()
        ratio = median(ratios(both["times"]["megatron"], times, "cpu_s"))
        peak = measured(model, processes, micro_batch, name)["peak_gib"]
        shown = None if name == "megatron" else difference
        found.append([name, processes, micro_batch, BATCH * LENGTH / wall, cpu, ratio, peak, shown])
    return found


def curve(bench: Study) -> None:
    """Ten float32 steps of both engines, as a user trains."""
    model = sparse_model(bench, "float32")
    sizes = {"seq_length": LENGTH, "micro_batch_size": 2, "global_batch_size": BATCH, "train_iters": 10, "lr": "1e-4"}
    runs = []
    for engine in ENGINES:
        output = bench.work / f"curve_{engine}"
        bench.verb("train", input=model, data=GIVEN.text, output=output, engine=engine, **sizes)
        runs.append([line for line in read_metrics(output) if "loss" in line])
    rows = [
        [a["step"], a["loss"], b["loss"] - a["loss"], a["grad_norm"], b["grad_norm"] / a["grad_norm"] - 1]
        for a, b in zip(*runs, strict=True)
    ]
    columns = ["step", "loss", "fsdp's less megatron's", "gradient norm", "relative difference"]
    protocol = (
        f"SmolLM2-135M in float32, 2:4 by magnitude, zeros kept: `train` on C4, {BATCH} x {LENGTH} tokens a step in "
        "two micro-batches, learning rate 1e-4, one process."
    )
    write_result("fsdp_curve", GIVEN, columns, rows, protocol)


def speed(bench: Study) -> None:
    """Both engines on one and on two processes."""
    model = sparse_model(bench)
    found = [row for case in CASES[: GIVEN.cases] for row in rows(model, *case)]
    protocol = (
        f"SmolLM2-135M, 2:4 by magnitude, zeros kept, bf16 with float32 masters; {GIVEN.steps} steps of {BATCH} x "
        f"{LENGTH} tokens of C4 after one that does not count, medians; the engines take turns step by step. CPU "
        "seconds of all processes, one thread each; peak resident memory of a process, libraries included, with one "
        "engine alone."
    )
    write_result("fsdp", GIVEN, COLUMNS, found, protocol)


if __name__ == "__main__":
    (curve if GIVEN.curve else speed)(Study(GIVEN.work, Path()))
