"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, first layers with one MLP, then shared experts and others,
which are chosen by sigmoids and a bias, from the best groups where there are groups.
"""

from __future__ import annotations

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
    LATENT_ATTENTION,
    LLAMA_KEYS,
    MLP_NORM,
    OUTPUT,
    ROTARY_TABLES,
    ROUTER,
    ROUTER_BIAS,
    SHARED_EXPERTS,
)

LATENT_KEYS = {
    "kv_channels": "v_head_dim",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
}
EXPERT_KEYS = {
    "num_moe_experts": "n_routed_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_num_shared_experts": "n_shared_experts",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
}
LATENT_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
}
SUPPORTED = GATED_SILU | {"attention_bias": (False,), "moe_layer_freq": (1,)}
FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),
    keys=LLAMA_KEYS | LATENT_KEYS | EXPERT_KEYS,
    defaults=LATENT_DEFAULTS
    | {"num_key_value_heads": 128, "max_position_embeddings": 4096, "first_k_dense_replace": 3}
    | {"n_routed_experts": 256, "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_shared_experts": 1}
    | {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
    nullable=("num_key_value_heads", "q_lora_rank"),
    supported=SUPPORTED
    | {"norm_topk_prob": (True,), "rope_interleave": (True,)}
    | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    constants={"moe_router_score_function": "sigmoid", "moe_router_expert_bias": True},
    rope_types=("default", "yarn"),
    sparse_layers="first_dense",
    more_layers=True,
    fp8_blocks=True,
    also={"n_routed_experts": "num_local_experts"},
    table=(
        *(EMBEDDING, INPUT_NORM, *LATENT_ATTENTION, MLP_NORM, ROUTER, ROUTER_BIAS, *SHARED_EXPERTS),
        *(EXPERT_GATE_UP, EXPERT_DOWN, GATE_UP, DOWN, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
