"""LLaMA 2, 3 and what is built like them, SmolLM2 among them."""

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
    NO_BIAS,
    OUTPUT,
    PROJECTION,
    QKV,
    ROTARY_TABLES,
)

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    keys=LLAMA_KEYS,
    defaults=LLAMA_DEFAULTS,
    supported=GATED_SILU | NO_BIAS,
    table=(EMBEDDING, INPUT_NORM, QKV, PROJECTION, MLP_NORM, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ignored=ROTARY_TABLES,
)
