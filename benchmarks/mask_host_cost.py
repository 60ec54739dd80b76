"""What Python does for one masked linear before its kernels start, on the road that a GPU takes: microseconds a call.

    python benchmarks/mask_host_cost.py [--rounds 5]

A layer's GPU work takes as long as this for all its linears when weights are split over many GPUs. Triton's own launch,
and PyTorch's for the linear itself, come on top and are not measured: they need a GPU. Medians of rounds of calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from bench.results import arguments, note, rounds, write_result

if __name__ == "__main__":
    GIVEN = arguments(__doc__, rounds(5), note())

import torch

from megatron_prune.kernels import gumbel, triton_gumbel
from megatron_prune.kernels.gumbel import Call, Draw, Position

CALLS = 20_000


def microseconds(work: Callable[[], object], count: int) -> float:
    """Of one call, the median of `count` rounds."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        for _ in range(CALLS):
            work()
        found.append((time.perf_counter() - began) / CALLS * 1e6)
    return median(found)


def main() -> None:
    """Measure the parts and write the result file."""
    torch.set_num_threads(1)
    weight, logits, sums = torch.randn(4, 8), torch.randn(4, 2, 6), torch.zeros(4, 2, 6)
    position, draw = Position.whole(4, 2), Draw(1, 2, 3, 4)
    call = Call(2, 4, 1.0, 1.0, draw.key(), position, False, 0.0, "triton")
    parts: dict[str, Callable[[], object]] = {
        "shapes and types": lambda: gumbel._check(weight, logits, 2, 4, 1.0, position),
        "the accumulated gradient": lambda: gumbel._check_accumulator(sums, logits),
        "key of the draw": draw.key,
        "choice of the kernels": lambda: gumbel._choose("auto", weight, logits),
        "what is asked of them": lambda: Call(2, 4, 1.0, 1.0, (1, 2), position, False, 0.0, "triton", sums),
        "what they were compiled for": lambda: triton_gumbel.mask_constants(call, 6),
    }
    rows: list[list[object]] = [[name, microseconds(work, GIVEN.rounds)] for name, work in parts.items()]
    rows.append(["together", sum(float(str(row[1])) for row in rows)])
    write_result("mask_host_cost", GIVEN, ["2:4, one call", "us"], rows, f"Medians of {GIVEN.rounds} rounds. 1 thread.")


if __name__ == "__main__":
    main()
