"""gpt-oss: experts with biases and a limited SwiGLU, attention with a sink in each head and a window in every other
layer.
"""

from __future__ import annotations

from megatron_prune.model.family import Family, WeightPattern
from megatron_prune.model.rows import (
    EMBEDDING,
    EXPERT_DOWN,
    EXPERT_GATE_UP,
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
    QKV_BIAS,
    ROTARY_TABLES,
    SINKS,
    linear_bias,
)

ROUTER = WeightPattern(MEGATRON + "mlp.router.weight", {HF + "mlp.router.weight": ("experts", "hidden")})
KEYS = {
    "num_moe_experts": "num_local_experts",
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "sliding_window": "sliding_window",
    "activation_func_clamp_value": "swiglu_limit",
}
YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    keys=LLAMA_KEYS | KEYS,
    defaults=LLAMA_DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    | {"num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0},
    nullable=("num_key_value_heads", "head_dim"),
    supported=GATED_SILU | {"attention_bias": (True,), "swiglu_alpha": (1.702,)},
    constants={"linear_bias": True, "qkv_bias": True, "attention_sinks": True}
    | {"activation": "quick_gelu", "glu_linear_offset": 1.0, "norm_rounds_last": True},
    rope={"rope_theta": 150000.0, "rope_parameters": {"rope_type": "yarn", "truncate": False, **YARN}},
    rope_types=("default", "yarn"),
    mixed_windows=2,
    alternating=True,
    also={"num_local_experts": "num_experts"},
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, QKV_BIAS, SINKS, PROJECTION, linear_bias(PROJECTION), MLP_NORM),
        *(ROUTER, linear_bias(ROUTER)),
        *(EXPERT_GATE_UP, linear_bias(EXPERT_GATE_UP), EXPERT_DOWN, linear_bias(EXPERT_DOWN), FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
