"""Memory of learning masks, in bytes for each masked weight, read from the operating system.

    python benchmarks/optimizer_memory.py

Every layout learns the 2:4 masks of the same matrices in processes of its own: the published formulation (plain
PyTorch: bf16 weights, fp32 logits, their gradient, Adam's moments, everything autograd keeps of noise, softmax and
mask), and ours on one process and on 2 and 4 that share the optimizer's state. A decoder of four wide layers and a tiny
vocabulary, and windows of 32 tokens: next to 1.5 logits for each of 31 million weights nothing else counts. Held is
what the process has resident between two steps, at the peak what it had at most in a step, both beyond what it had
after steps of a tiny model of the same kind. A process of a shared optimizer holds A + B / processes; A and B follow
from 2 and 4, and 8 is that line's value, not a measurement.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import arguments, option, write_result
from bench.running import apart, process_bytes, restart_peak

if __name__ == "__main__":
    GIVEN = arguments(__doc__, option("--layers", type=int, default=4, help="of the model; fewer need less memory"))

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
import torch.distributed as dist
from bench.models import RandomTokens, llama, published, write_random

from megatron_prune.decision.source import open_model
from megatron_prune.kernels.gumbel import patterns
from megatron_prune.model.masked_linear import MaskDraw
from megatron_prune.option_groups import Training
from megatron_prune.training.loop import RECOMPUTE, Trainer

LENGTH, STEPS, VOCABULARY = 32, 3, 128
COLUMNS = ["bytes for each masked weight", "processes", "counted, held", "held", "at the peak"]


class Size(NamedTuple):
    """Of a decoder whose query, key, value and output matrices are square."""

    hidden: int
    ffn: int
    layers: int

    @property
    def weights(self) -> int:
        """Masked ones."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    processes: int = 1
    logits: str = "float32"
    shared: bool = False
    """The optimizer's state, among the processes."""
    recompute: bool = False

    def counted(self, processes: int) -> float:
        """Bytes for each weight by arithmetic: bf16 weight, 1.5 logits with fp32 gradient, moments and masters."""
        logits, state = (2, 12) if self.logits == "bfloat16" else (4, 8)
        return 2 + 1.5 * (logits + 4 + state / (processes if self.shared else 1))


def shared(logits: str) -> list[Case]:
    """The same with 2 and with 4 processes."""
    name = f"ours, {logits} logits, layers recomputed, shared optimizer"
    return [Case(name, processes, logits, shared=True, recompute=True) for processes in (2, 4)]


TINY = Size(64, 96, 1)
CASES = [
    Case("ours, float32 logits"),
    Case("ours, float32 logits, layers recomputed", recompute=True),
    Case("ours, bfloat16 logits, layers recomputed", logits="bfloat16", recompute=True),
    *shared("float32"),
    *shared("bfloat16"),
]
Step = Callable[[int], Any]
"""Takes the step of some number."""


def measured(prepare: Callable[[Size], Step], size: Size) -> dict[str, float]:
    """Bytes for each weight that the steps of a model of this size hold and have at their peak (Linux)."""
    prepare(TINY)(0)
    give_back()
    before = process_bytes("VmRSS")
    step = prepare(size)
    for number in range(STEPS):
        gc.collect()
        restart_peak()
        step(number)
    give_back()
    peak, held = process_bytes("VmHWM") - before, process_bytes("VmRSS") - before
    return {"held": held / size.weights, "peak": peak / size.weights}


def give_back() -> None:
    """What nobody uses any more, to the operating system (glibc keeps it otherwise)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run_published(size: Size) -> dict[str, float]:
    """The formulation as its paper writes it, on the same matrices."""
    table = patterns(2, 4).float()

    def prepare(size: Size) -> Step:
        hidden, ffn = size.hidden, size.ffn
        shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)] * size.layers
        weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
        logits = [torch.zeros(out, inputs // 4, 6, requires_grad=True) for out, inputs in shapes]
        optimizer = torch.optim.Adam(logits, lr=1e-3)

        def step(_number: int) -> None:
            optimizer.zero_grad(set_to_none=False)
            x = torch.randn(LENGTH, hidden, dtype=torch.bfloat16)
            for weight, mask_logits in zip(weights, logits, strict=True):
                masked = published(weight, mask_logits, table)
                x = torch.nn.functional.linear(x[:, : weight.shape[1]], masked)
            x.float().square().mean().backward()
            optimizer.step()

        return step

    return measured(prepare, size)


def run_ours(case: Case, size: Size, models: dict[Size, Path]) -> dict[str, float]:
    """The trainer's steps on this process of a run."""
    layout = backend.Layout()
    with backend.running(layout):
        training = Training(
            micro_batch_size=1,
            global_batch_size=dist.get_world_size(),
            seq_length=LENGTH,
            use_distributed_optimizer=case.shared,
            recompute=case.recompute,
        )

        def prepare(size: Size) -> Step:
            made = open_model(models[size]).load(layout, **(RECOMPUTE if case.recompute else {}))
            for chunk in made.chunks:
                chunk.requires_grad_(False)
            made.learn_masks(MaskDraw(2, 4, seed=0, recompute=case.recompute, logits_dtype=getattr(torch, case.logits)))
            return Trainer(made, training, RandomTokens(VOCABULARY, LENGTH), {"*mask_logits": 1.0}).step

        return measured(prepare, size)


def eight(two: float, four: float) -> float:
    """The value at 8 of A + B / processes through the values of 2 and 4."""
    return four - (two - four) / 2


def table(size: Size, models: dict[Size, Path]) -> list[list[Any]]:
    """Measure everything; of several processes the largest counts."""
    found = apart(run_published, size)[0]
    rows: list[list[Any]] = [["published formulation", "1", None, found["held"], found["peak"]]]
    for case in CASES:
        last, ranks = found, apart(run_ours, case, size, models, ranks=case.processes)
        found = {key: max(one[key] for one in ranks) for key in ("held", "peak")}
        rows.append([case.name, str(case.processes), case.counted(case.processes), *found.values()])
        print(rows[-1], flush=True)
        if case.processes == 4:
            line = [eight(last[key], found[key]) for key in ("held", "peak")]
            rows.append([case.name, "8, from 2 and 4", case.counted(8), *line])
    return rows


def main() -> None:
    """Run everything and write the result file."""
    size = Size(768, 2304, GIVEN.layers)
    with tempfile.TemporaryDirectory() as folder:
        models = {size: Path(folder) / "full", TINY: Path(folder) / "tiny"}
        for one, path in models.items():
            write_random(llama(*one, heads=8, vocabulary=VOCABULARY), path)
        rows = table(size, models)
    protocol = (
        f"2:4, {size.weights:,} masked weights in bf16, Adam; resident memory of the largest process, beyond what it "
        "has with a tiny model. Counted: weight, logits, gradient, moments, masters."
    )
    write_result("optimizer_memory", GIVEN, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
