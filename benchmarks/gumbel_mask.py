"""Times the learnable mask, forward and backward, against the published formulation spelt out in PyTorch (uniform
noise to Gumbel, softmax, product with the patterns, product with the weight; gradients by autograd). They take turns in
one run; the best of the repeats counts. Peak memory of each is read from the operating system in a process of its own
(Linux), above inputs, outputs and the gradient, give or take some 100 KB, so that "none" may read as less. Then the
same for growing weights and for other patterns. Writes benchmarks/results/gumbel_mask_DATE.json.

With --device cuda: seconds on the GPU between events, queued behind other work so that the time Python takes to launch
does not count (call_s has it); the bytes that must be read and written; and the share of the bandwidth of a plain copy,
measured in the same run, at which they go. Writes gumbel_mask_cuda_DTYPE_DATE.json.

    python benchmarks/gumbel_mask.py [--device cuda] [--size 4096] [--repeats 5] [--output DIR]
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quality import hardware as machine
from torch import Tensor

from megatron_prune.kernels import compiled
from megatron_prune.kernels.gumbel import SOURCE, Draw, Position, masked_weight, patterns

SCALE, TEMPERATURE = 100.0, 4.0


def published(weight: Tensor, logits: Tensor, table: Tensor) -> Tensor:
    """The formula step by step, as its paper writes it (arXiv 2409.17481, equations 5 to 7)."""
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    probabilities = torch.softmax((SCALE * logits + noise) / TEMPERATURE, dim=-1)
    return weight * (probabilities @ table.to(logits.dtype)).flatten(1).to(weight.dtype)


@functools.cache
def _position(rows: int, groups: int, device: torch.device) -> Position:
    return Position.whole(rows, groups, device)


def ours(weight: Tensor, logits: Tensor, table: Tensor, implementation: Any = None) -> Tensor:
    return masked_weight(
        weight,
        logits,
        n=int(table[0].sum()),
        m=table.shape[1],
        scale=SCALE,
        temperature=TEMPERATURE,
        draw=Draw(1, 2, 3, 4),
        position=_position(*logits.shape[:2], logits.device),
        implementation=implementation or ("triton" if weight.is_cuda else "auto"),
    )


def ours_eager(weight: Tensor, logits: Tensor, table: Tensor) -> Tensor:
    return ours(weight, logits, table, "eager")


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "published": published,
    "ours": ours,
    "ours_eager": ours_eager,
}


Problem = tuple[Tensor, Tensor, Tensor, Tensor]
"""(weight, logits, pattern table, gradient of the output)"""


@dataclass(frozen=True)
class Case:
    """One size x size layer."""

    size: int
    weight: str = "bfloat16"
    logits: str = "float32"
    n: int = 2
    m: int = 4

    def make(self, device: str = "cpu") -> Problem:
        """Its tensors."""
        torch.manual_seed(0)
        weight, grad = (torch.randn(self.size, self.size).to(device, getattr(torch, self.weight)) for _ in range(2))
        table = patterns(self.n, self.m).float().to(device)
        logits = 0.01 * torch.randn(self.size, self.size // self.m, len(table))
        return weight, logits.to(device, getattr(torch, self.logits)).requires_grad_(), table, grad


DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
"""Of weight and logits."""
GROWTH = [Case(size) for size in (1024, 2048, 4096, 8192)] + [
    Case(2304, n=n, m=m) for n, m in ((1, 2), (1, 4), (2, 4), (3, 4), (2, 6), (3, 6), (1, 8), (2, 8), (4, 8))
]


def once(name: str, tensors: Problem) -> dict[str, float]:
    """Seconds of one forward and one backward, by the clock and of processor time over all threads."""
    weight, logits, table, grad = tensors
    logits.grad = None
    start, processor_start = time.perf_counter(), time.process_time()
    output = CANDIDATES[name](weight, logits, table)
    middle = time.perf_counter()
    output.backward(grad)
    end, processor_end = time.perf_counter(), time.process_time()
    return {
        "forward_s": middle - start,
        "backward_s": end - middle,
        "total_s": end - start,
        "processor_s": processor_end - processor_start,
    }


def timings(case: Case, repeats: int, names: Iterable[str] = CANDIDATES) -> dict[str, dict[str, float]]:
    """The smallest of each time of every candidate, taken in turns after one warm-up each."""
    tensors = case.make()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name, times in runs.items():
            times.append(once(name, tensors))
    return {name: {key: min(t[key] for t in times[1:]) for key in times[0]} for name, times in runs.items()}


def process_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def extra_memory(name: str, case: Case) -> int:
    """Peak bytes above inputs, output and gradient of the logits, of this process (Linux only)."""
    once(name, replace(case, size=48 * case.m).make())
    weight, logits, table, grad = case.make()
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    before = process_bytes("VmRSS")
    once(name, (weight, logits, table, grad))
    unavoidable = weight.nbytes + logits.nbytes
    return process_bytes("VmHWM") - before - unavoidable


def measured_memory(case: Case) -> dict[str, int]:
    """Of every candidate, each in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--memory-of"]
    return {name: int(subprocess.check_output([*command, name], text=True)) for name in CANDIDATES}


def queued(work: Callable[[], None]) -> None:
    """Run `work` to its end, behind a multiplication that outlasts its launches."""
    blocker = torch.ones(8192, 8192, device="cuda")
    torch.mm(blocker, blocker)
    work()
    torch.cuda.synchronize()
    del blocker


def gpu_once(name: str, tensors: Problem) -> dict[str, float]:
    """Seconds of one forward and one backward on the GPU, and of both as called, launches included."""
    weight, logits, table, grad = tensors
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def work() -> None:
        logits.grad = None
        events[0].record()
        output = CANDIDATES[name](weight, logits, table)
        events[1].record()
        output.backward(grad)
        events[2].record()

    queued(work)
    forward, backward = (events[i].elapsed_time(events[i + 1]) / 1e3 for i in range(2))
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    called = time.perf_counter() - start
    return {"forward_s": forward, "backward_s": backward, "total_s": forward + backward, "call_s": called}


def gpu_extra_memory(name: str, tensors: Problem) -> int:
    """Peak bytes above inputs, output and gradient of the logits, from the allocator."""
    weight, logits, table, grad = tensors
    logits.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    CANDIDATES[name](weight, logits, table).backward(grad)
    return torch.cuda.max_memory_allocated() - before - weight.nbytes - logits.nbytes


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a plain copy of 1 GiB reads and writes, the best of the repeats."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(repeats + 1):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

        def work(events: list[Any] = events) -> None:
            events[0].record()
            target.copy_(source)
            events[1].record()

        queued(work)
        best = min(best, events[0].elapsed_time(events[1]) / 1e3)
    return 2 * source.nbytes / best


def necessary_bytes(weight: Tensor, logits: Tensor) -> dict[str, int]:
    """What must cross the memory bus: forward reads logits and weight and writes the masked weight; backward reads
    logits, weight and its output's gradient and writes the logits' gradient.
    """
    forward, backward = logits.nbytes + 2 * weight.nbytes, 2 * logits.nbytes + 2 * weight.nbytes
    return {"forward": forward, "backward": backward, "total": forward + backward}


def largest_difference(tensors: Problem) -> dict[str, float]:
    """Between our two implementations on this GPU, relative to the largest value."""
    weight, logits, table, grad = tensors
    results = []
    for candidate in (ours, ours_eager):
        logits.grad = None
        output = candidate(weight, logits, table)
        output.backward(grad)
        results.append((output.detach().float(), logits.grad))
    names = ("masked_weight", "grad_logits")
    return {n: float((a - b).abs().max() / b.abs().max()) for n, a, b in zip(names, *results, strict=True)}


def gpu_report(case: Case, repeats: int) -> dict[str, Any]:
    tensors = case.make("cuda")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    for _ in range(repeats + 1):
        for name, found in runs.items():
            found.append(gpu_once(name, tensors))
    times = {name: {key: min(t[key] for t in found[1:]) for key in found[0]} for name, found in runs.items()}
    memory = {name: gpu_extra_memory(name, tensors) for name in CANDIDATES}
    needed, bandwidth = necessary_bytes(*tensors[:2]), copy_bandwidth(repeats)
    device = torch.cuda.get_device_properties(0)
    return {
        "benchmark": "learnable 2:4 mask, forward and backward, noise on",
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "gpu": device.name,
            "memory_bytes": device.total_memory,
            "multiprocessors": device.multi_processor_count,
            "copy_bytes_per_s": bandwidth,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
        },
        "problem": asdict(case) | {"repeats": repeats},
        "times": times,
        "extra_bytes": memory,
        "necessary_bytes": needed,
        "largest_relative_difference_from_eager": largest_difference(tensors),
        "speedup_over_published": {name: times["published"]["total_s"] / t["total_s"] for name, t in times.items()},
        "extra_memory_over_published": {name: m / memory["published"] for name, m in memory.items()},
        "share_of_roofline": {
            name: {part: needed[part] / bandwidth / t[f"{part}_s"] for part in needed} for name, t in times.items()
        },
    }


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """Times and memory of all candidates."""
    times, memory = timings(case, repeats), measured_memory(case)
    return {
        "problem": asdict(case) | {"repeats": repeats},
        "times": times,
        "extra_bytes": memory,
        "speedup_over_published": {n: times["published"]["total_s"] / t["total_s"] for n, t in times.items()},
        "extra_memory_over_published": {n: m / memory["published"] for n, m in memory.items()},
    }


def grow(case: Case, repeats: int) -> dict[str, Any]:
    """Times alone, and what a weight takes."""
    times = timings(case, repeats, ("published", "ours"))
    return {
        "problem": asdict(case) | {"repeats": repeats},
        "patterns": math.comb(case.m, case.n),
        "times": times,
        "speedup_over_published": times["published"]["total_s"] / times["ours"]["total_s"],
        "ours_ns_per_weight": times["ours"]["total_s"] * 1e9 / case.size**2,
    }


def report(size: int, repeats: int) -> dict[str, Any]:
    """Everything on the CPU."""
    load = os.getloadavg()[0]
    cases = [compare(Case(size, weight, logits), repeats) for weight, logits in DTYPES]
    return {
        "columns": [
            "2:4, forward and backward",
            "published ms",
            "ours ms",
            "times faster",
            "published MiB",
            "ours MiB",
        ],
        "rows": [_row(case) for case in cases],
        "protocol": f"A {size} x {size} weight; MiB: at the peak, beyond inputs, outputs and the gradient. "
        f"{torch.get_num_threads()} threads.",
        "hardware": machine(),
        "date": datetime.date.today().isoformat(),
        "load_before": load,  # other work on the machine; trust times only near or below the number of threads
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": _compiler(),
        },
        "cases": cases,
        "growth": [grow(case, max(1, repeats // 2)) for case in GROWTH],
    }


def _row(found: dict[str, Any]) -> list[Any]:
    case, times, memory = found["problem"], found["times"], found["extra_bytes"]
    cells = [f"{case['weight']} weight, {case['logits']} logits"]
    cells += [times[name]["total_s"] * 1e3 for name in ("published", "ours")]
    return [*cells, found["speedup_over_published"]["ours"], *(memory[n] / 2**20 for n in ("published", "ours"))]


def _compiler() -> str | None:
    """What the compiler says it is; None when the C path is off."""
    if compiled.load_library(SOURCE) is None:
        return None
    return compiled._version(tuple(compiled.compilers()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weight, on a GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(extra_memory(options.memory_of, Case(**options.case)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given and PyTorch sees no GPU")
    if options.device == "cuda":
        result, name = gpu_report(Case(options.size, options.dtype), options.repeats), f"cuda_{options.dtype}_"
    else:
        result, name = report(options.size, options.repeats), ""
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"gumbel_mask_{name}{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
