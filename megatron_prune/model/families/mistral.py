"""Mistral: LLaMA with a window."""

from __future__ import annotations

from megatron_prune.model.families import llama
from megatron_prune.model.family import Family
from megatron_prune.model.rows import GATED_SILU, LLAMA_DEFAULTS, LLAMA_KEYS, ROTARY_TABLES

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    keys=LLAMA_KEYS | {"sliding_window": "sliding_window"},
    defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    nullable=("sliding_window", "num_key_value_heads"),
    supported=GATED_SILU,
    table=llama.FAMILY.table,
    ignored=ROTARY_TABLES,
)
