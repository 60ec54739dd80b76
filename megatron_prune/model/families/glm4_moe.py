"""GLM-4.5 and what is built like it: first layers with one MLP, then shared experts and others, which are chosen by
sigmoids and a bias.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    DOWN,
    EMBEDDING,
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    FINAL_NORM,
    GATE_UP,
    GATED_SILU,
    INPUT_NORM,
    KEY_NORM,
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
    QKV_BIAS,
    QUERY_NORM,
    ROTARY_TABLES,
    ROUTER,
    ROUTER_BIAS,
    SHARED_EXPERTS,
)

KEYS = {
    "num_moe_experts": "n_routed_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_num_shared_experts": "n_shared_experts",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "qkv_bias": "attention_bias",
    "qk_layernorm": "use_qk_norm",
}
FAMILY = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    keys=LLAMA_KEYS | KEYS,
    defaults=LLAMA_DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    | {"n_routed_experts": 128, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1}
    | {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"attention_bias": False, "use_qk_norm": False},
    nullable=("num_key_value_heads",),
    supported=GATED_SILU | {"norm_topk_prob": (True,)},
    constants={"moe_router_score_function": "sigmoid", "moe_router_expert_bias": True},
    partial_rotary=0.5,
    sparse_layers="first_dense",
    more_layers=True,
    also={"n_routed_experts": "num_local_experts"},
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, replace(QKV_BIAS, when="qkv_bias")),
        *(replace(norm, when="qk_layernorm") for norm in (QUERY_NORM, KEY_NORM)),
        *(PROJECTION, MLP_NORM, ROUTER, ROUTER_BIAS),
        *SHARED_EXPERTS,
        *(EXPERT_GATE_UP, EXPERT_DOWN, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
