"""OLMoE: LLaMA with experts in place of the MLP, and norms of all queries and of all keys together."""

from __future__ import annotations

from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    EMBEDDING,
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    EXPERT_KEYS,
    FINAL_NORM,
    GATED_SILU,
    INPUT_NORM,
    LLAMA_DEFAULTS,
    LLAMA_KEYS,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
    ROTARY_TABLES,
    ROUTER,
    WHOLE_KEY_NORM,
    WHOLE_QUERY_NORM,
)

FAMILY = Family(
    name="olmoe",
    model_types=("olmoe",),
    keys=LLAMA_KEYS | EXPERT_KEYS | {"moe_ffn_hidden_size": "intermediate_size"},
    defaults=LLAMA_DEFAULTS
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    supported=GATED_SILU | {"attention_bias": (False, None), "clip_qkv": (None,)},
    constants={"qk_layernorm": True, "qk_layernorm_whole": True},
    also={"num_experts": "num_local_experts"},
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, WHOLE_QUERY_NORM, WHOLE_KEY_NORM, PROJECTION, MLP_NORM),
        *(ROUTER, EXPERT_GATE_UP, EXPERT_DOWN, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
