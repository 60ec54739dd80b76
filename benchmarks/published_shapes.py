"""Sizes of published models, counted from their shapes by the package's cost model; no weights are needed. One command:

    python benchmarks/published_shapes.py

Writes benchmarks/results/published_shapes_DATE.json.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quality import write_result

from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.model.cost import parameters
from megatron_prune.model.families import family_of

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
LLAMA_2_7B = LLAMA | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA_31_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}


def count(hf: dict[str, Any], stay: Units | None = None, **changes: int) -> int:
    """Parameters of a shape, of what stays of it where `stay` is given."""
    sizes = hf | {"head_dim": hf["hidden_size"] // hf["num_attention_heads"]} | changes
    config = family_of(sizes).from_hf(sizes)
    return parameters(config if stay is None else stay.config(config))


def llm_pruner() -> Units:
    """LLaMA-3.1-8B, ratio 0.25 of the layers 4 to 29: 6 of 8 query groups with 24 heads, 10,752 neurons."""
    whole = Units.all(family_of(LLAMA_31_8B).from_hf(LLAMA_31_8B))
    small = BlockUnits(tuple(range(6)), tuple(range(24)), tuple(range(10752)))
    return replace(whole, blocks=tuple(small if 4 <= n < 30 else block for n, block in enumerate(whole.blocks)))


def sheared(layers: int, hidden: int, heads: int, ffn: int) -> int:
    """LLaMA-2 7B sheared: heads keep their 128 channels."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn}
    return count(LLAMA_2_7B, **sizes, num_attention_heads=heads, num_key_value_heads=heads)


def main() -> None:
    """Count and write the result file."""
    result = {
        "columns": ["model", "published", "parameters"],
        "rows": [
            ["LLaMA-2 7B", "6,738,415,616", count(LLAMA_2_7B)],
            ["LLaMA-3.1 8B", "8,030,261,248", count(LLAMA_31_8B)],
            ["LLaMA-3.1 8B by LLM-Pruner, ratio 0.25", "6,612,586,496", count(LLAMA_31_8B, llm_pruner())],
            ["LLaMA-2 7B by ShortGPT, 9 layers removed", "27.1% removed", count(LLAMA_2_7B, num_hidden_layers=23)],
            ["LLaMA-2 7B by Sheared LLaMA, 2.7B", "2.7B", sheared(32, 2560, 20, 6912)],
            ["LLaMA-2 7B by Sheared LLaMA, 1.3B", "1.3B", sheared(24, 2048, 16, 5504)],
        ],
        "protocol": "Counted from the shapes alone.",
    }
    write_result("published_shapes", result)


if __name__ == "__main__":
    main()
