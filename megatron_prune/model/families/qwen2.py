"""Qwen2 and Qwen2.5: LLaMA with biases of query, key and value."""

from __future__ import annotations

from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE_UP,
    GATED_SILU,
    INPUT_NORM,
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
    QKV_BIAS,
    ROTARY_TABLES,
)

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    keys=LLAMA_KEYS,
    defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    nullable=("num_key_value_heads",),
    supported=GATED_SILU,
    windowed=True,
    constants={"qkv_bias": True},
    table=(EMBEDDING, INPUT_NORM, QKV, QKV_BIAS, PROJECTION, MLP_NORM, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ignored=ROTARY_TABLES,
)
