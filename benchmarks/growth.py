"""How the cost of pruning grows with width, depth, M of N:M and ranks, from measured points; one plot for each.

    pip install matplotlib
    python benchmarks/growth.py

Random LLaMA models in bf16 and random tokens: neither changes what is computed. A point is the CPU seconds and memory,
in a process of its own with one thread, of Wanda or SparseGPT over the whole model (4,096 calibration tokens; start-up
and loading left out), or of one step of mask learning (512 tokens; the median of three after one that does not count).
Memory is the resident set at its peak beyond what the libraries take, of one rank. Ranks are tensor-parallel processes
that talk through gloo. Points already in the work folder are not measured again. Writes
benchmarks/results/growth_DATE.json, of which a document's table is made, and the plots beside it; `--draw FILE` makes
the plots again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from quality import HERE, write_result
from torch import Tensor

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_target
from megatron_prune.log import MetricsLog
from megatron_prune.methods.base import get_method
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.option_groups import Training
from megatron_prune.statistics.runner import Runner
from megatron_prune.training.learning import LearningRunner
from megatron_prune.training.loop import Trainer

VOCABULARY, HEAD = 1024, 64
WINDOWS, LENGTH = 16, 256
STEP_TOKENS, STEPS = 512, 3
COSTS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "step": "mask-learning step"}


@dataclass(frozen=True)
class Point:
    """A model and how it is pruned."""

    width: int = 512
    depth: int = 4
    target: str = "2:4"
    ranks: int = 1


SERIES = {
    "width": [Point(width=width, depth=2) for width in (256, 512, 768, 1024, 1536)],
    "depth": [Point(depth=depth) for depth in (2, 4, 8, 16)],
    "M": [Point(target=target) for target in ("1:4", "2:4", "1:8", "2:8", "4:8")],
    "ranks": [Point(ranks=ranks) for ranks in (1, 2, 4)],
}


class RandomTokens:
    """Windows of random tokens."""

    def sample(self, index: int) -> Tensor:
        """`[STEP_TOKENS + 1]` int64 token ids."""
        return torch.randint(VOCABULARY, (STEP_TOKENS + 1,), generator=torch.Generator().manual_seed(index))


def write_model(point: Point, path: Path) -> None:
    """A random LLaMA as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point.width,
        intermediate_size=point.width * 8 // 3 // 64 * 64,
        num_hidden_layers=point.depth,
        num_attention_heads=point.width // HEAD,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def one_shot(model: PrunableModel, method: str, target: str, _folder: Path) -> float:
    """CPU seconds to prune the whole model."""
    tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    runner = Runner(model, tokens, None)
    get_method(method).decide(SimpleNamespace(linears=runner.layerwise, masks=runner.masks), parse_target(target))  # type: ignore[arg-type]
    return time.process_time() - began


def learning_step(model: PrunableModel, _method: str, target: str, folder: Path) -> float:
    """CPU seconds of an optimizer step on the mask logits."""
    training = Training(micro_batch_size=1, global_batch_size=1, seq_length=STEP_TOKENS)
    data, nm = RandomTokens(), parse_target(target)
    runner = LearningRunner(model, training, data, folder, writer=lambda: None, log=MetricsLog(folder))  # type: ignore[arg-type]
    draw = runner.learn_masks(nm.n, nm.m, hard=False, train_weights=False)  # type: ignore[union-attr]
    draw.scale, draw.temperature = 100.0, 4.0
    runner.start_logits(lambda mask: mask, std=0.01)
    trainer = Trainer(model, training, data, {"*mask_logits": 1.0})
    times = []
    for step in range(STEPS + 1):
        began = time.process_time()
        draw.step = step
        trainer.step(step)
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def peak() -> int:
    """Bytes of this process's resident set at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(cost: str, point: Point, model: Path, rank: int, port: int, answer: Any) -> None:
    """One rank of one measurement."""
    torch.set_num_threads(1)
    if point.ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(point.ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    libraries = peak()
    layout = backend.Layout(tensor=point.ranks)
    work: Callable[..., float] = learning_step if cost == "step" else one_shot
    with tempfile.TemporaryDirectory() as folder, backend.running(layout):
        seconds = work(open_model(model).load(layout), cost, point.target, Path(folder))
    answer.send((seconds, (peak() - libraries) / 2**30))


def in_processes(work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """Run `work` once for each tuple, at the same time, in forks of this process, whose imports are done."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a measurement failed")


def measure(cost: str, point: Point, model: Path) -> dict[str, float]:
    """CPU seconds and GiB of the rank that takes most."""
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(point.ranks)]
    port = free_port()
    in_processes(worker, [(cost, point, model, rank, port, pipe[1]) for rank, pipe in enumerate(pipes)])
    found = [pipe[0].recv() for pipe in pipes]
    return {"seconds": max(each[0] for each in found), "gib": max(each[1] for each in found)}


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measured(work: Path) -> dict[str, list[dict[str, Any]]]:
    """Every cost at every point; what is in the work folder is not measured again."""
    return {name: [{**asdict(point), **costs(point, work)} for point in points] for name, points in SERIES.items()}


def costs(point: Point, work: Path) -> dict[str, dict[str, float]]:
    """Every cost at one point."""
    record = work / ("_".join(str(value).replace(":", "-") for value in asdict(point).values()) + ".json")
    if not record.exists():
        with tempfile.TemporaryDirectory() as folder:
            in_processes(write_model, [(point, Path(folder) / "model")])
            found = {cost: measure(cost, point, Path(folder) / "model") for cost in COSTS}
        record.write_text(json.dumps(found))
        print(point, found, flush=True)
    return json.loads(record.read_text())


def place(name: str, entry: dict[str, Any]) -> float:
    """Where a point of a series stands on its axis."""
    return int(entry["target"].split(":")[1]) if name == "M" else entry[name]


def table(series: dict[str, list[dict[str, Any]]]) -> list[list[Any]]:
    """First and last point of every series, and the exponent of growth between its last two places."""
    rows = []
    for name, entries in series.items():
        for cost, label in COSTS.items():
            first, last = entries[0], entries[-1]
            ends = [first["target"], last["target"]] if name == "M" else [str(first[name]), str(last[name])]
            cells = [found for key in ("seconds", "gib") for found in (first[cost][key], last[cost][key])]
            rows.append([label, name, " to ".join(ends), *cells, "" if name == "M" else exponent(name, entries, cost)])
    return rows


def exponent(name: str, entries: list[dict[str, Any]], cost: str) -> float:
    """Of seconds in what grows, between the last two points."""
    before, last = entries[-2:]
    return math.log(last[cost]["seconds"] / before[cost]["seconds"]) / math.log(last[name] / before[name])


def draw(series: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """One plot for each series: seconds on the left, memory on the right."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    import matplotlib.pyplot as plt

    for name, entries in series.items():
        figure, axes = plt.subplots(1, 2, figsize=(8, 3))
        for axis, key, label in zip(
            axes, ("seconds", "gib"), ("CPU seconds of a rank", "GiB beyond libraries"), strict=True
        ):
            for cost, legend in COSTS.items():
                points = sorted(((place(name, entry), entry[cost][key]) for entry in entries), key=lambda at: at[0])
                axis.plot(*zip(*points, strict=True), "o" if name == "M" else "o-", label=legend)
            if name == "M":
                for entry in entries:
                    axis.annotate(entry["target"], (place(name, entry), entry["step"][key]), fontsize=7)
            axis.set(xlabel=name, ylabel=label, ylim=(0, None))
        axes[0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"growth_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Measure and write the result file and the plots, or draw the plots of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/growth"))
    parser.add_argument("--draw", type=Path, help="a result file")
    given = parser.parse_args()
    if given.draw:
        draw(json.loads(given.draw.read_text())["series"], given.draw.parent)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    series = measured(given.work)
    result = {
        "columns": ["cost", "grows with", "range", "CPU s first", "CPU s last", "GiB first", "GiB last", "exponent"],
        "rows": table(series),
        "series": series,
        "protocol": "Random LLaMA in bf16: width 512, 4 layers (2 where the width grows), 2:4, one rank, except for "
        "what grows. CPU seconds and memory beyond libraries, of one rank with one thread. Wanda and SparseGPT: the "
        "whole model, 4,096 tokens; mask learning: one step of 512 tokens. Exponent: of CPU seconds, between the last "
        "two points. Other jobs ran beside.",
    }
    write_result("growth", result)
    draw(series, HERE / "results")


if __name__ == "__main__":
    main()
