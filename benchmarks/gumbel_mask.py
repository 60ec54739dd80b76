"""Times the learnable 2:4 mask, forward and backward, against the published formulation spelt out in PyTorch
(uniform noise to Gumbel, softmax, product with the patterns, product with the weight; gradients by autograd).
They take turns in one run; the best of the repeats counts. Peak memory of each is read from the operating
system in a process of its own (Linux). Writes benchmarks/results/gumbel_mask_DTYPE_THREADS_DATE.json.

With --device cuda: seconds on the GPU between events, queued behind other work so that the time Python takes to launch
does not count (call_s has it); the bytes that must be read and written; and the share of the bandwidth of a plain copy,
measured in the same run, at which they go. Writes gumbel_mask_cuda_DTYPE_DATE.json.

    python benchmarks/gumbel_mask.py [--device cuda] [--size 4096] [--repeats 7] [--dtype float32] [--output DIR]
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
from collections.abc import Callable
from importlib.metadata import version
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


@functools.cache
def _position(rows: int, groups: int, device: torch.device) -> Position:
    return Position.whole(rows, groups, device)


def ours(weight: Tensor, logits: Tensor, table: Tensor, implementation: Any = None) -> Tensor:
    return masked_weight(
        weight,
        logits,
        n=2,
        m=4,
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


def problem(size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, fp32 logits, pattern table, gradient of the output) of one size x size layer."""
    torch.manual_seed(0)
    weight, grad = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    logits = (0.01 * torch.randn(size, size // 4, 6)).to(device).requires_grad_()
    return weight, logits, patterns(2, 4).float().to(device), grad


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


Problem = tuple[Tensor, Tensor, Tensor, Tensor]


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
        output.backward(grad.to(output.dtype))
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


def gpu_report(size: int, dtype: str, repeats: int) -> dict[str, Any]:
    tensors = problem(size, getattr(torch, dtype), "cuda")
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
        "problem": _problem(size, dtype, repeats),
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


def _problem(size: int, dtype: str, repeats: int) -> dict[str, Any]:
    return {"weight": [size, size], "weight_dtype": dtype, "logits_dtype": "float32", "repeats": repeats}


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
        "problem": _problem(size, dtype, repeats),
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(extra_memory(options.memory_of, options.size, getattr(torch, options.dtype)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given and PyTorch sees no GPU")
    measure, kind = (gpu_report, "cuda_") if options.device == "cuda" else (report, "")
    result = measure(options.size, options.dtype, options.repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    threads = "" if options.device == "cuda" else f"_threads{torch.get_num_threads()}"
    path = options.output / f"gumbel_mask_{kind}{options.dtype}{threads}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
