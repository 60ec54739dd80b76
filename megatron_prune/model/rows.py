"""Rows that the tables of several families share, and keys that config.json files of LLaMA's kind share."""

from __future__ import annotations

from dataclasses import replace

from megatron_prune.model.family import WeightPattern

HF = "model.layers.{layer}."
MEGATRON = "decoder.layers.{layer}."


def gate_up(mlp: str, gate: str, up: str, width: str = "ffn") -> WeightPattern:
    """`linear_fc1` of a gated MLP: start of its Megatron names, Hugging Face names of both matrices, its width."""
    names = {f"{name}.weight": (width, "hidden") for name in (gate, up)}
    return WeightPattern(f"{mlp}linear_fc1.weight", names, transform="gated", shard_dim=0, prunable=True)


def down(mlp: str, name: str, width: str = "ffn") -> WeightPattern:
    """`linear_fc2` of an MLP; see `gate_up`."""
    return WeightPattern(f"{mlp}linear_fc2.weight", {f"{name}.weight": ("hidden", width)}, shard_dim=1, prunable=True)


EMBEDDING = WeightPattern(
    "embedding.word_embeddings.weight",
    {"model.embed_tokens.weight": ("vocab", "hidden")},
    shard_dim=0,
    pad_rows=True,
)
INPUT_NORM = WeightPattern(
    MEGATRON + "input_layernorm.weight",
    {HF + "input_layernorm.weight": ("hidden",)},
)
QKV = WeightPattern(
    MEGATRON + "self_attention.linear_qkv.weight",
    {
        HF + "self_attn.q_proj.weight": ("query", "hidden"),
        HF + "self_attn.k_proj.weight": ("key_value", "hidden"),
        HF + "self_attn.v_proj.weight": ("key_value", "hidden"),
    },
    transform="qkv",
    shard_dim=0,
    shard_unit="group_rows",
    prunable=True,
)
QKV_BIAS = WeightPattern(
    MEGATRON + "self_attention.linear_qkv.bias",
    {
        HF + "self_attn.q_proj.bias": ("query",),
        HF + "self_attn.k_proj.bias": ("key_value",),
        HF + "self_attn.v_proj.bias": ("key_value",),
    },
    transform="qkv",
    shard_dim=0,
    shard_unit="group_rows",
)
QUERY_NORM = WeightPattern(
    MEGATRON + "self_attention.q_layernorm.weight",
    {HF + "self_attn.q_norm.weight": ("head",)},
)
KEY_NORM = WeightPattern(
    MEGATRON + "self_attention.k_layernorm.weight",
    {HF + "self_attn.k_norm.weight": ("head",)},
)
WHOLE_QUERY_NORM = WeightPattern(
    MEGATRON + "self_attention.q_layernorm.weight",
    {HF + "self_attn.q_norm.weight": ("query",)},
)
WHOLE_KEY_NORM = WeightPattern(
    MEGATRON + "self_attention.k_layernorm.weight",
    {HF + "self_attn.k_norm.weight": ("key_value",)},
)
PROJECTION = WeightPattern(
    MEGATRON + "self_attention.linear_proj.weight",
    {HF + "self_attn.o_proj.weight": ("hidden", "query")},
    shard_dim=1,
    shard_unit="group_inputs",
    prunable=True,
)
QUERY_DOWN = WeightPattern(
    MEGATRON + "self_attention.linear_q_down_proj.weight",
    {HF + "self_attn.q_a_proj.weight": ("query_rank", "hidden")},
    prunable=True,
    when="q_lora_rank",
)
QUERY_RANK_NORM = WeightPattern(
    MEGATRON + "self_attention.q_layernorm.weight",
    {HF + "self_attn.q_a_layernorm.weight": ("query_rank",)},
    when="q_lora_rank",
)
QUERY_UP = WeightPattern(
    MEGATRON + "self_attention.linear_q_up_proj.weight",
    {HF + "self_attn.q_b_proj.weight": ("latent_query", "query_rank")},
    shard_dim=0,
    shard_unit="query_head",
    prunable=True,
    when="q_lora_rank",
)
DIRECT_QUERY = WeightPattern(
    MEGATRON + "self_attention.linear_q_proj.weight",
    {HF + "self_attn.q_proj.weight": ("latent_query", "hidden")},
    shard_dim=0,
    shard_unit="query_head",
    prunable=True,
    when="direct_queries",
)
KEY_VALUE_DOWN = WeightPattern(
    MEGATRON + "self_attention.linear_kv_down_proj.weight",
    {HF + "self_attn.kv_a_proj_with_mqa.weight": ("latent_rope", "hidden")},
    prunable=True,
)
LATENT_NORM = WeightPattern(
    MEGATRON + "self_attention.kv_layernorm.weight",
    {HF + "self_attn.kv_a_layernorm.weight": ("latent",)},
)
KEY_VALUE_UP = WeightPattern(
    MEGATRON + "self_attention.linear_kv_up_proj.weight",
    {HF + "self_attn.kv_b_proj.weight": ("latent_key_value", "latent")},
    shard_dim=0,
    shard_unit="up_head",
    prunable=True,
)
LATENT_ATTENTION = (
    *(QUERY_DOWN, QUERY_RANK_NORM, QUERY_UP, DIRECT_QUERY),
    *(KEY_VALUE_DOWN, LATENT_NORM, KEY_VALUE_UP, PROJECTION),
)
SINKS = WeightPattern(
    MEGATRON + "self_attention.core_attention.softmax_offset",
    {HF + "self_attn.sinks": ("heads",)},
    shard_dim=0,
    shard_unit="group_heads",
)
MLP_NORM = WeightPattern(
    MEGATRON + "pre_mlp_layernorm.weight",
    {HF + "post_attention_layernorm.weight": ("hidden",)},
)
POST_ATTENTION_NORM = WeightPattern(
    MEGATRON + "self_attention.linear_proj.post_layernorm.weight",
    {HF + "post_attention_layernorm.weight": ("hidden",)},
)
BEFORE_MLP_NORM = WeightPattern(
    MEGATRON + "pre_mlp_layernorm.weight",
    {HF + "pre_feedforward_layernorm.weight": ("hidden",)},
)
POST_MLP_NORM = WeightPattern(
    MEGATRON + "mlp.linear_fc2.post_layernorm.weight",
    {HF + "post_feedforward_layernorm.weight": ("hidden",)},
)
MLP = MEGATRON + "mlp."
GATE_UP = gate_up(MLP, HF + "mlp.gate_proj", HF + "mlp.up_proj")
UP = WeightPattern(
    MEGATRON + "mlp.linear_fc1.weight",
    {HF + "mlp.up_proj.weight": ("ffn", "hidden")},
    shard_dim=0,
    prunable=True,
)
DOWN = down(MLP, HF + "mlp.down_proj")
ROUTER = WeightPattern(
    MEGATRON + "mlp.router.weight",
    {HF + "mlp.gate.weight": ("experts", "hidden")},
)
ROUTER_BIAS = WeightPattern(
    MEGATRON + "mlp.router.expert_bias",
    {HF + "mlp.gate.e_score_correction_bias": ("experts",)},
)
EXPERT = MEGATRON + "mlp.experts.local_experts.{expert}."
"""With the expert's number in the whole model."""
EXPERT_GATE_UP = gate_up(EXPERT, HF + "mlp.experts.{expert}.gate_proj", HF + "mlp.experts.{expert}.up_proj")
EXPERT_DOWN = down(EXPERT, HF + "mlp.experts.{expert}.down_proj")
SHARED = MEGATRON + "mlp.shared_experts."
SHARED_GATE_UP = gate_up(SHARED, HF + "mlp.shared_expert.gate_proj", HF + "mlp.shared_expert.up_proj", "shared_ffn")
SHARED_DOWN = down(SHARED, HF + "mlp.shared_expert.down_proj", "shared_ffn")
SHARED_EXPERTS = (
    gate_up(SHARED, HF + "mlp.shared_experts.gate_proj", HF + "mlp.shared_experts.up_proj", "shared_ffn"),
    down(SHARED, HF + "mlp.shared_experts.down_proj", "shared_ffn"),
)
"""As GLM-4.5 and DeepSeek name them."""
SHARED_GATE = WeightPattern(
    MEGATRON + "mlp.shared_experts.gate_weight",
    {HF + "mlp.shared_expert_gate.weight": ("one", "hidden")},
)
FINAL_NORM = WeightPattern("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)})
OUTPUT = WeightPattern(
    "output_layer.weight",
    {"lm_head.weight": ("vocab", "hidden")},
    shard_dim=0,
    pad_rows=True,
    untied_only=True,
)
LLAMA_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
EXPERT_KEYS = {
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_renormalize": "norm_topk_prob",
}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
GATED_SILU = {"hidden_act": ("silu",)}
ROTARY_TABLES = ("model.layers.*.self_attn.rotary_emb.*", "model.rotary_emb.*")


def norm_bias(norm: WeightPattern) -> WeightPattern:
    """The row of the bias beside a norm's gain."""
    names = {name.removesuffix("weight") + "bias": shape for name, shape in norm.hf.items()}
    return WeightPattern(norm.megatron.removesuffix("weight") + "bias", names)


def linear_bias(linear: WeightPattern) -> WeightPattern:
    """The row of the bias beside a linear's weight."""
    names = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in linear.hf.items()}
    megatron, dim = linear.megatron.removesuffix("weight") + "bias", 0 if linear.shard_dim == 0 else None
    return replace(linear, megatron=megatron, hf=names, shard_dim=dim, prunable=False)
