"""How the cost of pruning grows with width, depth, M of N:M and ranks, from measured points; one plot for each.

    pip install matplotlib
    python benchmarks/growth.py

Random LLaMA models in bf16 and random tokens: neither changes what is computed. A point is the CPU seconds and memory,
in a process of its own with one thread, of Wanda or SparseGPT over the whole model (4,096 calibration tokens; start-up
and loading left out), or of one step of mask learning (512 tokens; the median of three after one that does not count).
Memory is the resident set at its peak beyond what the libraries take, of one rank. Ranks are tensor-parallel processes
that talk through gloo. Plots are written beside the result file; `--draw FILE` makes the plots again.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.results import arguments, option, work, write_result
from bench.running import GIB, apart, in_turns, kept, process_bytes, seconds

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        work("runs/growth"),
        option("--draw", type=Path, help="a result file"),
        option("--points", type=int, help="just the first of every series, two at least"),
    )

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
from bench.models import MaskLearning, RandomTokens, llama, write_random

from megatron_prune.decision.source import open_model
from megatron_prune.decision.target import parse_target
from megatron_prune.methods.base import get_method
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.runner import Runner

VOCABULARY, HEAD = 1024, 64
WINDOWS, LENGTH = 16, 256
STEP_TOKENS, STEPS = 512, 3
COSTS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "step": "mask-learning step"}
COLUMNS = ["cost", "grows with", "range", "CPU s first", "CPU s last", "GiB first", "GiB last", "exponent"]


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


def one_shot(model: PrunableModel, method: str, target: str, _folder: Path) -> float:
    """CPU seconds to prune the whole model."""
    tokens = RandomTokens(VOCABULARY, LENGTH - 1).batch(WINDOWS)
    began = time.process_time()
    runner = Runner(model, tokens, None)
    get_method(method).decide(SimpleNamespace(linears=runner.layerwise, masks=runner.masks), parse_target(target))  # type: ignore[arg-type]
    return time.process_time() - began


def learning_step(model: PrunableModel, _method: str, target: str, folder: Path) -> float:
    """CPU seconds of an optimizer step on the mask logits."""
    nm = parse_target(target)
    learning = MaskLearning(model, folder, (nm.n, nm.m), 1, STEP_TOKENS, scale=100.0, temperature=4.0)  # type: ignore[union-attr]
    times = in_turns({"": lambda: seconds(learning.step)["cpu_s"]}, STEPS)
    return statistics.median(times[""])


def one_rank(cost: str, point: Point, model: Path) -> tuple[float, float]:
    """CPU seconds and GiB of one rank of one measurement."""
    libraries = process_bytes("VmHWM")
    layout = backend.Layout(tensor=point.ranks)
    work: Callable[..., float] = learning_step if cost == "step" else one_shot
    with tempfile.TemporaryDirectory() as folder, backend.running(layout):
        spent = work(open_model(model).load(layout), cost, point.target, Path(folder))
    return spent, (process_bytes("VmHWM") - libraries) / GIB


def measure(point: Point) -> dict[str, dict[str, float]]:
    """Every cost at one point, of the rank that takes most."""
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = point.width, point.width * 8 // 3 // 64 * 64, point.depth, point.width // HEAD
        write_random(llama(*sizes, vocabulary=VOCABULARY), Path(folder) / "model")
        for cost in COSTS:
            found = apart(one_rank, cost, point, Path(folder) / "model", ranks=point.ranks)
            costs[cost] = {"seconds": max(each[0] for each in found), "gib": max(each[1] for each in found)}
    print(point, costs, flush=True)
    return costs


def measured(point: Point) -> dict[str, Any]:
    """The point and its costs."""
    name = "_".join(str(value).replace(":", "-") for value in asdict(point).values())
    return {**asdict(point), **kept(GIVEN.work / f"{name}.json", lambda: measure(point))}


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

    labels = {"seconds": "CPU seconds of a rank", "gib": "GiB beyond libraries"}
    for name, entries in series.items():
        figure, axes = plt.subplots(1, 2, figsize=(8, 3))
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for cost, legend in COSTS.items():
                points = sorted(((place(name, entry), entry[cost][key]) for entry in entries), key=lambda at: at[0])
                axis.plot(*zip(*points, strict=True), "o" if name == "M" else "o-", label=legend)
            for entry in entries if name == "M" else ():
                axis.annotate(entry["target"], (place(name, entry), entry["step"][key]), fontsize=7)
            axis.set(xlabel=name, ylabel=label, ylim=(0, None))
        axes[0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"growth_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Measure and write the result file and the plots, or draw the plots of a file."""
    if GIVEN.draw:
        draw(json.loads(GIVEN.draw.read_text())["series"], GIVEN.draw.parent)
        return
    series = {name: [measured(point) for point in points[: GIVEN.points]] for name, points in SERIES.items()}
    protocol = (
        "Random LLaMA in bf16: width 512, 4 layers (2 where the width grows), 2:4, one rank, except for what grows. "
        "CPU seconds and memory beyond libraries, of one rank with one thread. Wanda and SparseGPT: the whole model, "
        "4,096 tokens; mask learning: one step of 512 tokens. Exponent: of CPU seconds, between the last two points."
    )
    draw(series, write_result("growth", GIVEN, COLUMNS, table(series), protocol, series=series).parent)


if __name__ == "__main__":
    main()
