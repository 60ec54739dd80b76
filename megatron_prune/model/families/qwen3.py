"""Qwen3: LLaMA with norms of queries and keys."""

from __future__ import annotations

from megatron_prune.model.families import qwen2
from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE_UP,
    GATED_SILU,
    INPUT_NORM,
    KEY_NORM,
    LLAMA_KEYS,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
    QUERY_NORM,
    ROTARY_TABLES,
)

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    keys=LLAMA_KEYS,
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128},
    nullable=("num_key_value_heads",),
    supported=GATED_SILU | {"attention_bias": (False,)},
    windowed=True,
    constants={"qk_layernorm": True},
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, PROJECTION),
        *(MLP_NORM, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
