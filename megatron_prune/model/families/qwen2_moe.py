"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts in place of the MLP, and one that all tokens go through besides."""

from __future__ import annotations

from megatron_prune.model.families import qwen2
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
    LLAMA_KEYS,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
    QKV_BIAS,
    ROTARY_TABLES,
    ROUTER,
    SHARED_DOWN,
    SHARED_GATE,
    SHARED_GATE_UP,
)

FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    keys=LLAMA_KEYS | EXPERT_KEYS | {"moe_shared_expert_intermediate_size": "shared_expert_intermediate_size"},
    defaults={
        **qwen2.FAMILY.defaults,
        **{"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False},
        **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    },
    nullable=("num_key_value_heads",),
    supported=GATED_SILU | {"qkv_bias": (True, None)},
    windowed=True,
    constants={"qkv_bias": True, "moe_shared_expert_gate": True},
    sparse_layers="step",
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, QKV_BIAS, PROJECTION, MLP_NORM),
        *(ROUTER, SHARED_GATE_UP, SHARED_DOWN, SHARED_GATE, EXPERT_GATE_UP, EXPERT_DOWN),
        *(GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
