"""DeepSeek-V2-Lite and what is built like it: DeepSeek-V3 with experts chosen by a softmax and without a bias."""

from __future__ import annotations

from megatron_prune.model.families import deepseek_v3
from megatron_prune.model.family import Family
from megatron_prune.model.rows import ROUTER_BIAS

FAMILY = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    keys=deepseek_v3.FAMILY.keys,
    defaults=deepseek_v3.LATENT_DEFAULTS
    | {"num_key_value_heads": None, "max_position_embeddings": 2048, "first_k_dense_replace": 0}
    | {"n_routed_experts": 64, "moe_intermediate_size": 1407, "n_shared_experts": 2}
    | {"routed_scaling_factor": 1.0, "n_group": None, "topk_group": None},
    nullable=("num_key_value_heads", "q_lora_rank"),
    supported=deepseek_v3.SUPPORTED
    | {"norm_topk_prob": (False,), "scoring_func": ("softmax",), "topk_method": ("greedy",), "mlp_bias": (False,)},
    constants={"moe_renormalize": False},
    rope_types=("default", "yarn"),
    sparse_layers="first_dense",
    also={"n_routed_experts": "num_experts"},
    table=tuple(row for row in deepseek_v3.FAMILY.table if row != ROUTER_BIAS),
    ignored=deepseek_v3.FAMILY.ignored,
)
