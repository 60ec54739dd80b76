"""Products of bfloat16 on a CPU: torch's own, those that verbs make in float32 where the processor has none, and the
same in float32 throughout. Shapes of SmolLM2-135M, 512 tokens.

    python benchmarks/narrow_products.py [--rounds 5]

The three take turns, the median of the rounds counts. Writes RESULTS/narrow_products_DATE.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.results import arguments, rounds, write_result
from bench.running import in_turns, seconds

if __name__ == "__main__":
    GIVEN = arguments(__doc__, rounds(5))

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.kernels import products

TOKENS = 512
COLUMNS = ["product", "bfloat16, torch's own", "in float32, rounded", "float32", "times faster"]
OWN, WIDE, FLOAT32 = COLUMNS[1:4]


def linear(inputs: int, outputs: int, dtype: torch.dtype, gradients: bool) -> Callable[[], Any]:
    """What multiplies TOKENS rows."""
    x, weight = (torch.randn(rows, inputs, dtype=dtype, requires_grad=gradients) for rows in (TOKENS, outputs))
    return lambda: _backward(F.linear(x, weight), gradients)


def attention(dtype: torch.dtype, gradients: bool) -> Callable[[], Any]:
    """What attends, causally, with nine heads of 64 channels."""
    x = torch.randn(1, 9, TOKENS, 64, dtype=dtype, requires_grad=gradients)
    return lambda: _backward(F.scaled_dot_product_attention(x, x, x, is_causal=True), gradients)


def _backward(found: Tensor, wanted: bool) -> None:
    if wanted:
        found.sum().backward()


def main() -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    rows = []
    for name, make in {
        "576 -> 1536": lambda *how: linear(576, 1536, *how),
        "1536 -> 576": lambda *how: linear(1536, 576, *how),
        "attention": attention,
    }.items():
        for gradients in (False, True):
            narrow, wide = (make(dtype, gradients) for dtype in (torch.bfloat16, torch.float32))

            def widened(narrow: Callable[[], Any] = narrow) -> None:
                with products.wide_products():
                    narrow()

            works = {key: partial(seconds, w) for key, w in {OWN: narrow, WIDE: widened, FLOAT32: wide}.items()}
            found = {
                key: statistics.median(turn["cpu_s"] for turn in turns)
                for key, turns in in_turns(works, GIVEN.rounds).items()
            }
            times = [f"{found[key] * 1e3:.1f} ms" for key in (OWN, WIDE, FLOAT32)]
            rows.append([f"{name}{', with gradients' * gradients}", *times, round(found[OWN] / found[WIDE], 1)])
    lacks = "lacks" if torch.bfloat16 in products.lacking() else "has"
    protocol = f"{TOKENS} rows, or 9 heads of 64 channels; the processor {lacks} products of bfloat16. One thread."
    write_result("narrow_products", GIVEN, COLUMNS, rows, protocol)


if __name__ == "__main__":
    main()
