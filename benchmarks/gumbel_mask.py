"""Times the learnable 2:4 mask, forward and backward, against the published formulation spelt out in PyTorch
(uniform noise to Gumbel, softmax, product with the patterns, product with the weight; gradients by autograd).
They take turns in one run; the best of the repeats counts. Peak memory of each is read from the operating
system in a process of its own (Linux). Writes benchmarks/results/gumbel_mask_DTYPE_THREADS_DATE.json.

    python benchmarks/gumbel_mask.py [--size 4096] [--repeats 7] [--dtype float32] [--output DIR]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.kernels import compiled
from megatron_prune.kernels.gumbel import SOURCE, Draw, Position, masked_weight, patterns

SCALE, TEMPERATURE = 100.0, 4.0
SMOLLM2_135M_GROUPS = 26_542_080
"""Groups of four in the prunable weights of SmolLM2-135M: 30 layers x 3,538,944 weights / 4."""


def published(weight: Tensor, logits: Tensor, table: Tensor) -> Tensor:
    """The formula step by step, as its paper writes it (arXiv 2409.17481, equations 5 to 7)."""
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    probabilities = torch.softmax((SCALE * logits + noise) / TEMPERATURE, dim=-1)
    return weight * (probabilities @ table).flatten(1)


def ours(weight: Tensor, logits: Tensor, table: Tensor, implementation: Any = "auto") -> Tensor:
    position = Position.whole(*logits.shape[:2])
    return masked_weight(
        weight,
        logits,
        n=2,
        m=4,
        scale=SCALE,
        temperature=TEMPERATURE,
        draw=Draw(1, 2, 3, 4),
        position=position,
        implementation=implementation,
    )


def ours_eager(weight: Tensor, logits: Tensor, table: Tensor) -> Tensor:
    return ours(weight, logits, table, "eager")


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "published": published,
    "ours": ours,
    "ours_eager": ours_eager,
}


def problem(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, fp32 logits, pattern table, gradient of the output) of one size x size layer."""
    torch.manual_seed(0)
    weight, grad = (torch.randn(size, size).to(dtype) for _ in range(2))
    logits = (0.01 * torch.randn(size, size // 4, 6)).requires_grad_()
    return weight, logits, patterns(2, 4).float(), grad


def once(name: str, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Seconds of one forward and one backward, by the clock and of processor time over all threads."""
    weight, logits, table, grad = tensors
    logits.grad = None
    start, processor_start = time.perf_counter(), time.process_time()
    output = CANDIDATES[name](weight, logits, table)
    middle = time.perf_counter()
    output.backward(grad.to(output.dtype))
    end, processor_end = time.perf_counter(), time.process_time()
    return {
        "forward_s": middle - start,
        "backward_s": end - middle,
        "total_s": end - start,
        "processor_s": processor_end - processor_start,
    }


def timings(size: int, dtype: torch.dtype, repeats: int) -> dict[str, dict[str, float]]:
    """The smallest of each time of every candidate, taken in turns after one warm-up each."""
    tensors = problem(size, dtype)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(repeats + 1):
        for name, times in runs.items():
            times.append(once(name, tensors))
    return {name: {key: min(t[key] for t in times[1:]) for key in times[0]} for name, times in runs.items()}


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def extra_memory(name: str, size: int, dtype: torch.dtype) -> int:
    """Peak bytes above inputs, output and gradient of the logits, of this process (Linux only)."""
    once(name, problem(64, dtype))
    weight, logits, table, grad = problem(size, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    before = _status("VmRSS")
    once(name, (weight, logits, table, grad))
    unavoidable = weight.nbytes + logits.nbytes
    return _status("VmHWM") - before - unavoidable


def measured_memory(size: int, dtype: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--size", str(size), "--dtype", dtype, "--memory-of"]
    return {name: int(subprocess.check_output([*command, name], text=True)) for name in CANDIDATES}


def hardware() -> dict[str, Any]:
    models = [x for x in compiled.processor().splitlines() if x.startswith("model name")]
    model = models[0].split(":")[1].strip() if models else platform.machine()
    load = os.getloadavg()[0]  # other work on the machine; trust times only near or below the number of threads
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": load}


def report(size: int, dtype: str, repeats: int) -> dict[str, Any]:
    machine = hardware()
    times = timings(size, getattr(torch, dtype), repeats)
    memory = measured_memory(size, dtype)
    base = times["published"]
    per_group = times["ours"]["total_s"] / (size * size / 4)
    return {
        "benchmark": "learnable 2:4 mask, forward and backward, noise on",
        "date": datetime.date.today().isoformat(),
        "hardware": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": _compiler(),
        },
        "problem": {
            "weight": [size, size],
            "weight_dtype": dtype,
            "logits_dtype": "float32",
            "repeats": repeats,
        },
        "times": times,
        "extra_bytes": memory,
        "speedup_over_published": {name: base["total_s"] / t["total_s"] for name, t in times.items()},
        "processor_time_over_published": {name: t["processor_s"] / base["processor_s"] for name, t in times.items()},
        "extra_memory_over_published": {name: m / memory["published"] for name, m in memory.items()},
        "smollm2_135m_all_layers_s": per_group * SMOLLM2_135M_GROUPS,
    }


def _compiler() -> str | None:
    """What the compiler says it is; None when the C path is off."""
    if compiled.load_library(SOURCE) is None:
        return None
    return compiled._version(tuple(compiled.compilers()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(extra_memory(options.memory_of, options.size, getattr(torch, options.dtype)))
        return
    result = report(options.size, options.dtype, options.repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"gumbel_mask_{options.dtype}_threads{torch.get_num_threads()}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
