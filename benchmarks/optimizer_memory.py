"""Memory of learning masks, in bytes for each masked weight, read from the operating system. One command:

    PYTHONPATH=. python benchmarks/optimizer_memory.py

Every layout learns the 2:4 masks of the same matrices in processes of its own: the published formulation (plain
PyTorch: bf16 weights, fp32 logits, their gradient, Adam's moments, everything autograd keeps of noise, softmax and
mask), and ours on one process and on 2 and 4 that share the optimizer's state. A decoder of four wide layers and a tiny
vocabulary, and windows of 32 tokens: next to 1.5 logits for each of 31 million weights nothing else counts. Held is
what the process has resident between two steps, at the peak what it had at most in a step, both beyond what it had
after steps of a tiny model of the same kind. A process of a shared optimizer holds A + B / processes; A and B follow
from 2 and 4, and 8 is that line's value, not a measurement. Writes
benchmarks/results/optimizer_memory_DATE.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gumbel_mask import process_bytes, published
from quality import write_result

from tests.models import tiny_model

HIDDEN, FFN, LAYERS, LENGTH, STEPS = 768, 2304, 4, 32, 3
SIZES = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WEIGHTS = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN)
"""Masked weights."""


Steps = Callable[[bool], Callable[[int], Any]]
"""`steps(tiny)` makes a model, of full size or not, and gives a function that takes its step of some number."""


def measured(prepare: Steps) -> dict[str, float]:
    """Bytes for each weight that `prepare`d steps hold and have at their peak (Linux)."""
    warm = prepare(True)
    warm(0)
    del warm
    _give_back()
    before = process_bytes("VmRSS")
    step = prepare(False)
    for number in range(STEPS):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
        step(number)
    _give_back()
    peak, held = process_bytes("VmHWM") - before, process_bytes("VmRSS") - before
    return {"held": held / WEIGHTS, "peak": peak / WEIGHTS}


def _give_back() -> None:
    """What nobody uses any more, to the operating system (glibc keeps it otherwise)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run_published() -> dict[str, float]:
    """The formulation as its paper writes it, on the same matrices."""
    from megatron_prune.kernels.gumbel import patterns

    table = patterns(2, 4).float()

    def prepare(tiny: bool) -> Callable[[int], Any]:
        hidden, ffn, layers = (32, 96, 1) if tiny else (HIDDEN, FFN, LAYERS)
        shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)] * layers
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

    return measured(prepare)


def run_ours(model: Path, logits: str, shared: bool, recompute: bool, **_of_launch: Any) -> dict[str, float]:
    """The trainer's steps on this process of a run."""
    import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
    import torch.distributed as dist

    from megatron_prune.decision.source import open_model
    from megatron_prune.model.masked_linear import MaskDraw
    from megatron_prune.option_groups import Training
    from megatron_prune.training.loop import RECOMPUTE, Trainer

    class Tokens:
        def sample(self, index: int) -> torch.Tensor:
            return torch.randint(128, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))

    layout = backend.Layout()
    with backend.running(layout):
        replicas = dist.get_world_size()
        training = Training(
            micro_batch_size=1,
            global_batch_size=replicas,
            seq_length=LENGTH,
            use_distributed_optimizer=shared,
            recompute=recompute,
        )

        def prepare(tiny: bool) -> Callable[[int], Any]:
            made = open_model(model / ("tiny" if tiny else "full")).load(layout, **(RECOMPUTE if recompute else {}))
            for chunk in made.chunks:
                chunk.requires_grad_(False)
            draw = MaskDraw(2, 4, seed=0, recompute=recompute, logits_dtype=getattr(torch, logits))
            made.learn_masks(draw)
            trainer = Trainer(made, training, Tokens(), {"*mask_logits": 1.0})
            return trainer.step

        found = measured(prepare)
        everyone: list[Any] = [None] * replicas
        dist.all_gather_object(everyone, found)
    return {key: max(each[key] for each in everyone) for key in found}


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


CASES = [
    Case("ours, float32 logits"),
    Case("ours, float32 logits, layers recomputed", recompute=True),
    Case("ours, bfloat16 logits, layers recomputed", logits="bfloat16", recompute=True),
    *shared("float32"),
    *shared("bfloat16"),
]


def start(case: Case | None, model: Path) -> dict[str, float]:
    """Measure in processes of their own; None is the published formulation."""
    command = [sys.executable]
    if case is None:
        command += [__file__, "--measure", "null", "--model", str(model)]
    else:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
        command += [__file__, "--measure", json.dumps(asdict(case)), "--model", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.check_output(command, text=True, env=environment, stderr=subprocess.DEVNULL).splitlines()[-1]
    )


def line(two: float, four: float, processes: int) -> float:
    """A + B / processes through the values of 2 and 4."""
    share = (two - four) * 4
    return two - share / 2 + share / processes


def table(model: Path) -> list[list[Any]]:
    """Measure everything."""
    found = start(None, model)
    rows: list[list[Any]] = [["published formulation", "1", None, found["held"], found["peak"]]]
    last: dict[str, float] = {}
    for case in CASES:
        found = start(case, model)
        rows.append([case.name, str(case.processes), case.counted(case.processes), found["held"], found["peak"]])
        print(rows[-1], flush=True)
        if case.processes == 4:
            eight = [line(last[key], found[key], 8) for key in ("held", "peak")]
            rows.append([case.name, "8, from 2 and 4", case.counted(8), *eight])
        last = found
    return rows


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=json.loads, default=False, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not False:
        of_one = run_ours(given.model, **given.measure) if given.measure else run_published()
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(of_one))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in (("full", SIZES), ("tiny", {})):
            tiny_model(Path(folder) / name, "llama", dtype=torch.bfloat16, **sizes)
        rows = table(Path(folder))
    result = {
        "columns": ["bytes for each masked weight", "processes", "counted, held", "held", "at the peak"],
        "rows": rows,
        "protocol": f"2:4, {WEIGHTS:,} masked weights in bf16, Adam; resident memory of the largest process, beyond "
        "what it has with a tiny model. Counted: weight, logits, gradient, moments, masters.",
    }
    write_result("optimizer_memory", result)


if __name__ == "__main__":
    main()
