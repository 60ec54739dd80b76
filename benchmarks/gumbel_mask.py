"""Times the learnable mask, forward and backward, against the published formulation spelt out in PyTorch (uniform
noise to Gumbel, softmax, product with the patterns, product with the weight; gradients by autograd). They take turns in
one run; the best of the rounds counts. Peak memory of each is read from the operating system in a process of its own
(Linux), above inputs, outputs and the gradient, give or take some 100 KB, so that "none" may read as less. Then the
same for growing weights and for other patterns.

    python benchmarks/gumbel_mask.py [--device cuda] [--size 4096] [--rounds 5] [--output DIR]

With --device cuda: seconds on the GPU between events, queued behind other work so that the time Python takes to launch
does not count (call_s has it); the bytes that must be read and written; and the share of the bandwidth of a plain copy,
measured in the same run, at which they go, in RESULTS/gumbel_mask_cuda_DTYPE_DATE.json.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.results import DEVICE, arguments, installed, option, rounds, write_result
from bench.running import Times, apart, each, gpu_seconds, in_turns, peak_bytes, seconds

if __name__ == "__main__":
    GIVEN = arguments(
        __doc__,
        DEVICE,
        option("--size", type=int, default=4096),
        option("--largest", type=int, default=8192, help="size of the weights that grow"),
        rounds(5),
        option("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weight, on a GPU"),
    )

import torch
from bench.models import published
from torch import Tensor

from megatron_prune.kernels import compiled
from megatron_prune.kernels.gumbel import SOURCE, Draw, Position, masked_weight, patterns

SHARPNESS: dict[str, Any] = {"scale": 100.0, "temperature": 4.0}
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
"""Of weight and logits."""
SIZES, PATTERNS_SIZE = (1024, 2048, 4096, 8192), 2304
PATTERNS = ((1, 2), (1, 4), (2, 4), (3, 4), (2, 6), (3, 6), (1, 8), (2, 8), (4, 8))
COLUMNS = ["2:4, forward and backward", "published ms", "ours ms", "times faster", "published MiB", "ours MiB"]

position = functools.cache(Position.whole)


def ours(weight: Tensor, logits: Tensor, table: Tensor, implementation: Any = None) -> Tensor:
    """The masked weight by the fused kernel."""
    how = implementation or ("triton" if weight.is_cuda else "auto")
    noise = {"draw": Draw(1, 2, 3, 4), "position": position(*logits.shape[:2], logits.device)}
    nm = {"n": int(table[0].sum()), "m": table.shape[1]}
    return masked_weight(weight, logits, **nm, **SHARPNESS, **noise, implementation=how)  # type: ignore[arg-type]


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "published": functools.partial(published, **SHARPNESS),
    "ours": ours,
    "ours_eager": functools.partial(ours, implementation="eager"),
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


def passes(name: str, tensors: Problem, between: Callable[[], Any] = lambda: None) -> tuple[Tensor, Tensor]:
    """(masked weight, gradient of the logits) of one forward and one backward pass."""
    weight, logits, table, grad = tensors
    logits.grad = None
    output = CANDIDATES[name](weight, logits, table)
    between()
    output.backward(grad)
    assert logits.grad is not None
    return output.detach(), logits.grad


def once(name: str, tensors: Problem) -> Times:
    """Seconds of one forward and one backward, by the clock and of processor time over all threads."""
    moments = [time.perf_counter()]
    wall, cpu = seconds(lambda: passes(name, tensors, lambda: moments.append(time.perf_counter()))).values()
    forward = moments[1] - moments[0]
    return {"forward_s": forward, "backward_s": wall - forward, "total_s": wall, "processor_s": cpu}


def timings(
    tensors: Problem, count: int, names: Iterable[str] = CANDIDATES, measure: Callable[..., Times] = once
) -> dict[str, Times]:
    """The smallest of each time of every candidate, taken in turns after one warm-up each."""
    runs = in_turns({name: functools.partial(measure, name, tensors) for name in names}, count)
    return {name: each(min, times) for name, times in runs.items()}


def extra_memory(name: str, case: Case, device: str = "cpu") -> int:
    """Peak bytes above inputs, output and gradient of the logits, of this process."""
    if device == "cpu":
        passes(name, replace(case, size=48 * case.m).make())
    tensors = case.make(device)
    peak = peak_bytes(lambda: passes(name, tensors)[0].numel(), device)[1]
    return peak - tensors[0].nbytes - tensors[1].nbytes


def faster(times: dict[str, Times]) -> dict[str, float]:
    """How many times as fast as the published formulation."""
    return {name: times["published"]["total_s"] / one["total_s"] for name, one in times.items()}


def compared(case: Case, count: int, times: dict[str, Times], memory: dict[str, int]) -> dict[str, Any]:
    """What the result file has of a case."""
    return {
        "problem": asdict(case) | {"repeats": count},
        "times": times,
        "extra_bytes": memory,
        "speedup_over_published": faster(times),
        "extra_memory_over_published": {name: one / memory["published"] for name, one in memory.items()},
    }


def compare(case: Case, count: int) -> dict[str, Any]:
    """Times, and memory in processes of their own, of all candidates."""
    times = timings(case.make(), count)
    return compared(case, count, times, {name: apart(extra_memory, name, case, threads=None)[0] for name in CANDIDATES})


def grow(case: Case, count: int) -> dict[str, Any]:
    """Times alone, and what a weight takes."""
    times = timings(case.make(), count, ("published", "ours"))
    return {
        "problem": asdict(case) | {"repeats": count},
        "patterns": math.comb(case.m, case.n),
        "times": times,
        "speedup_over_published": faster(times)["ours"],
        "ours_ns_per_weight": times["ours"]["total_s"] * 1e9 / case.size**2,
    }


def row(name: str, found: dict[str, Any]) -> list[Any]:
    """One line of the table."""
    sides = ("published", "ours")
    milliseconds = [found["times"][side]["total_s"] * 1e3 for side in sides]
    mebibytes = [found["extra_bytes"][side] / 2**20 for side in sides]
    return [name, *milliseconds, found["speedup_over_published"]["ours"], *mebibytes]


def on_cpu() -> None:
    """Everything on the CPU."""
    cases = [compare(Case(GIVEN.size, weight, logits), GIVEN.rounds) for weight, logits in DTYPES]
    rows = [row(f"{case['problem']['weight']} weight, {case['problem']['logits']} logits", case) for case in cases]
    growing = [Case(size) for size in SIZES if size <= GIVEN.largest]
    growing += [Case(min(GIVEN.largest // 24 * 24, PATTERNS_SIZE), n=n, m=m) for n, m in PATTERNS]
    growth = [grow(case, max(1, GIVEN.rounds // 2)) for case in growing]
    protocol = (
        f"A {GIVEN.size} x {GIVEN.size} weight; MiB: at the peak, beyond inputs, outputs and the gradient. "
        f"{torch.get_num_threads()} threads."
    )
    compiler = compiled._version(tuple(compiled.compilers()[0])) if compiled.load_library(SOURCE) else "none"
    about: dict[str, Any] = {"cases": cases, "growth": growth, "versions": {"compiler": compiler}}
    write_result("gumbel_mask", GIVEN, COLUMNS, rows, protocol, **about)


def gpu_once(name: str, tensors: Problem) -> Times:
    """Seconds of one forward and one backward on the GPU, and of both as called, launches included."""

    def work(begin: Any, between: Any, end: Any) -> None:
        begin.record()
        passes(name, tensors, between.record)
        end.record()

    forward, backward = gpu_seconds(work, 3)
    called = seconds(lambda: passes(name, tensors), end=torch.cuda.synchronize)["wall_s"]
    return {"forward_s": forward, "backward_s": backward, "total_s": forward + backward, "call_s": called}


def copy_bandwidth(count: int) -> float:
    """Bytes a second that a plain copy of 1 GiB reads and writes, the best of the rounds."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def work(begin: Any, end: Any) -> None:
        begin.record()
        target.copy_(source)
        end.record()

    return 2 * source.nbytes / min(gpu_seconds(work)[0] for _ in range(count + 1))


def necessary_bytes(weight: Tensor, logits: Tensor) -> dict[str, int]:
    """What must cross the memory bus: forward reads logits and weight and writes the masked weight; backward reads
    logits, weight and its output's gradient and writes the logits' gradient.
    """
    forward, backward = logits.nbytes + 2 * weight.nbytes, 2 * logits.nbytes + 2 * weight.nbytes
    return {"forward": forward, "backward": backward, "total": forward + backward}


def largest_difference(tensors: Problem) -> dict[str, float]:
    """Between our two implementations on this GPU, relative to the largest value."""
    pairs = zip(passes("ours", tensors), passes("ours_eager", tensors), strict=True)
    found = [float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs]
    return dict(zip(("masked_weight", "grad_logits"), found, strict=True))


def on_gpu() -> None:
    """Everything on a GPU."""
    case = Case(GIVEN.size, GIVEN.dtype)
    tensors, device = case.make("cuda"), torch.cuda.get_device_properties(0)
    times = timings(tensors, GIVEN.rounds, measure=gpu_once)
    needed, bandwidth = necessary_bytes(*tensors[:2]), copy_bandwidth(GIVEN.rounds)
    memory = {name: extra_memory(name, case, "cuda") for name in CANDIDATES}
    found = {
        **compared(case, GIVEN.rounds, times, memory),
        "necessary_bytes": needed,
        "copy_bytes_per_s": bandwidth,
        "share_of_roofline": {
            name: {part: needed[part] / bandwidth / t[f"{part}_s"] for part in needed} for name, t in times.items()
        },
        "largest_relative_difference_from_eager": largest_difference(tensors),
    }
    rows = [row(f"{case.weight} weight, {case.logits} logits", found)]
    about: dict[str, Any] = {"device": device.name, "versions": installed("triton") | {"cuda": str(torch.version.cuda)}}
    protocol = f"A {GIVEN.size} x {GIVEN.size} weight, noise on; MiB: beyond inputs, outputs and the gradient."
    write_result(f"gumbel_mask_cuda_{GIVEN.dtype}", GIVEN, COLUMNS, rows, protocol, **about, **found)


if __name__ == "__main__":
    on_gpu() if GIVEN.device == "cuda" else on_cpu()
