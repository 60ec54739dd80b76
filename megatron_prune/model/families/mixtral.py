"""Mixtral: Mistral with experts in place of the MLP."""

from __future__ import annotations

from megatron_prune.model.family import Family, WeightPattern
from megatron_prune.model.rows import (
    EMBEDDING,
    EXPERT,
    EXPERT_KEYS,
    FINAL_NORM,
    GATED_SILU,
    HF,
    INPUT_NORM,
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    MEGATRON,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
    ROTARY_TABLES,
    down,
    gate_up,
)

SPARSE = HF + "block_sparse_moe."
ROUTER = WeightPattern(MEGATRON + "mlp.router.weight", {SPARSE + "gate.weight": ("experts", "hidden")})
GATE_UP = gate_up(EXPERT, SPARSE + "experts.{expert}.w1", SPARSE + "experts.{expert}.w3")
DOWN = down(EXPERT, SPARSE + "experts.{expert}.w2")
KEYS = {
    "num_moe_experts": "num_local_experts",
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_router_topk": EXPERT_KEYS["moe_router_topk"],
    "sliding_window": "sliding_window",
}
FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    keys=LLAMA_KEYS | KEYS,
    defaults=LLAMA_DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    nullable=("sliding_window", "num_key_value_heads"),
    supported=GATED_SILU,
    also={"num_local_experts": "num_experts"},
    table=(EMBEDDING, INPUT_NORM, QKV, PROJECTION, MLP_NORM, ROUTER, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ignored=ROTARY_TABLES,
)
