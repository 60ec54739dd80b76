"""Sizes of published models, counted from their shapes by the package's cost model; no weights are needed.

python benchmarks/published_shapes.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.results import arguments, write_result

if __name__ == "__main__":
    GIVEN = arguments(__doc__)

from bench.models import llama

from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import family_of

LLAMA_2_7B = llama(4096, 11008, 32, 32)
LLAMA_31_8B = llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072, rope_theta=500000.0)


def count(hf: dict[str, Any], stay: Units | None = None) -> int:
    """Parameters of a shape, of what stays of it where `stay` is given."""
    config = family_of(hf).from_hf(hf)
    return parameters(config if stay is None else stay.config(config))


def llm_pruner() -> Units:
    """LLaMA-3.1-8B, ratio 0.25 of the layers 4 to 29: 6 of 8 query groups with 24 heads, 10,752 neurons."""
    whole = Units.all(family_of(LLAMA_31_8B).from_hf(LLAMA_31_8B))
    small = BlockUnits(tuple(range(6)), tuple(range(24)), tuple(range(10752)))
    return replace(whole, blocks=tuple(small if 4 <= n < 30 else block for n, block in enumerate(whole.blocks)))


def rows() -> list[list[Any]]:
    """Name, published size, and ours."""
    return [
        ["LLaMA-2 7B", "6,738,415,616", count(LLAMA_2_7B)],
        ["LLaMA-3.1 8B", "8,030,261,248", count(LLAMA_31_8B)],
        ["LLaMA-3.1 8B by LLM-Pruner, ratio 0.25", "6,612,586,496", count(LLAMA_31_8B, llm_pruner())],
        ["LLaMA-2 7B by ShortGPT, 9 layers removed", "27.1% removed", count(llama(4096, 11008, 23, 32))],
        ["LLaMA-2 7B by Sheared LLaMA, 2.7B", "2.7B", count(llama(2560, 6912, 32, 20))],
        ["LLaMA-2 7B by Sheared LLaMA, 1.3B", "1.3B", count(llama(2048, 5504, 24, 16))],
    ]


if __name__ == "__main__":
    columns = ["model", "published", "parameters"]
    write_result("published_shapes", GIVEN, columns, rows(), "Counted from the shapes alone.")
