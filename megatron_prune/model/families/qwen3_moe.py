"""Qwen3 with experts in place of the MLP, in all layers or some."""

from __future__ import annotations

from megatron_prune.model.families import qwen3
from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    DOWN,
    EMBEDDING,
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    EXPERT_KEYS,
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
    ROUTER,
)

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    keys=LLAMA_KEYS | EXPERT_KEYS,
    defaults={
        **qwen3.FAMILY.defaults,
        **{"num_key_value_heads": 4, "head_dim": None, "norm_topk_prob": False},
    },
    nullable=("num_key_value_heads",),
    supported=GATED_SILU | {"attention_bias": (False,), "use_sliding_window": (False, None)},
    constants={"qk_layernorm": True},
    also={"num_experts": "num_local_experts"},
    sparse_layers="step",
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, PROJECTION, MLP_NORM),
        *(ROUTER, EXPERT_GATE_UP, EXPERT_DOWN, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
