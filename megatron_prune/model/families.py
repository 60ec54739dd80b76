"""The model families, as data: which config.json keys and Hugging Face tensors make which ModelConfig and Megatron
tensors. One table per family serves both directions and every parallel layout; adding a family means adding an entry to
``FAMILIES``. What the fields mean is in ``family``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prune.errors import UserError, brief
from megatron_prune.model.blocks import KEY, SUFFIX, Block
from megatron_prune.model.family import Family, ModelConfig, WeightMap, WeightPattern, dimensions

__all__ = [
    "FAMILIES",
    "Block",
    "Family",
    "ModelConfig",
    "WeightMap",
    "WeightPattern",
    "check_exportable",
    "dimensions",
    "family_of",
    "get_family",
]


def get_family(name: str) -> Family:
    """The family called ``name``; UserError names the nearest and lists all."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown model family {name!r}; {hint}allowed: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its ``model_type``; UserError lists the supported ones."""
    model_type = hf_config.get("model_type")
    end = SUFFIX if KEY in hf_config else ""
    for family in FAMILIES.values():
        if model_type in [name + end for name in family.model_types]:
            return family
    allowed = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise UserError(
        f"config.json has model_type {brief(model_type)}; supported: {', '.join(allowed)}{_inside(hf_config, allowed)}"
    )


def _inside(hf_config: Mapping[str, Any], allowed: Sequence[str]) -> str:
    """What to do about a model that wraps a language model of a supported family."""
    inner = hf_config.get("text_config")
    kind = inner.get("model_type") if isinstance(inner, Mapping) else None
    if kind not in allowed:
        return ""
    return (
        f"; its text_config is of a {kind} model: save that alone, with text_config as its config.json, "
        "by model.language_model.save_pretrained(NEW_DIR)"
    )


def check_exportable(config: ModelConfig) -> None:
    """UserError when no config.json can say what ``config`` is, or transformers would not open it: before work starts.

    A model whose layers differ is exportable when it can be padded to an ordinary one.
    """
    get_family(config.family).to_hf(config)


_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."

_EMBEDDING = WeightPattern(
    "embedding.word_embeddings.weight",
    {"model.embed_tokens.weight": ("vocab", "hidden")},
    shard_dim=0,
    pad_rows=True,
)
_INPUT_NORM = WeightPattern(
    _MEGATRON + "input_layernorm.weight",
    {_HF + "input_layernorm.weight": ("hidden",)},
)
_QKV = WeightPattern(
    _MEGATRON + "self_attention.linear_qkv.weight",
    {
        _HF + "self_attn.q_proj.weight": ("query", "hidden"),
        _HF + "self_attn.k_proj.weight": ("key_value", "hidden"),
        _HF + "self_attn.v_proj.weight": ("key_value", "hidden"),
    },
    transform="qkv",
    shard_dim=0,
    shard_unit="group_rows",
    prunable=True,
)
_QKV_BIAS = WeightPattern(
    _MEGATRON + "self_attention.linear_qkv.bias",
    {
        _HF + "self_attn.q_proj.bias": ("query",),
        _HF + "self_attn.k_proj.bias": ("key_value",),
        _HF + "self_attn.v_proj.bias": ("key_value",),
    },
    transform="qkv",
    shard_dim=0,
    shard_unit="group_rows",
)
_QUERY_NORM = WeightPattern(
    _MEGATRON + "self_attention.q_layernorm.weight",
    {_HF + "self_attn.q_norm.weight": ("head",)},
)
_KEY_NORM = WeightPattern(
    _MEGATRON + "self_attention.k_layernorm.weight",
    {_HF + "self_attn.k_norm.weight": ("head",)},
)
_PROJECTION = WeightPattern(
    _MEGATRON + "self_attention.linear_proj.weight",
    {_HF + "self_attn.o_proj.weight": ("hidden", "query")},
    shard_dim=1,
    shard_unit="group_inputs",
    prunable=True,
)
_MLP_NORM = WeightPattern(
    _MEGATRON + "pre_mlp_layernorm.weight",
    {_HF + "post_attention_layernorm.weight": ("hidden",)},
)
_GATE_UP = WeightPattern(
    _MEGATRON + "mlp.linear_fc1.weight",
    {
        _HF + "mlp.gate_proj.weight": ("ffn", "hidden"),
        _HF + "mlp.up_proj.weight": ("ffn", "hidden"),
    },
    transform="gated",
    shard_dim=0,
    prunable=True,
)
_UP = WeightPattern(
    _MEGATRON + "mlp.linear_fc1.weight",
    {_HF + "mlp.up_proj.weight": ("ffn", "hidden")},
    shard_dim=0,
    prunable=True,
)
_DOWN = WeightPattern(
    _MEGATRON + "mlp.linear_fc2.weight",
    {_HF + "mlp.down_proj.weight": ("hidden", "ffn")},
    shard_dim=1,
    prunable=True,
)
_FINAL_NORM = WeightPattern("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)})
_OUTPUT = WeightPattern(
    "output_layer.weight",
    {"lm_head.weight": ("vocab", "hidden")},
    shard_dim=0,
    pad_rows=True,
    untied_only=True,
)

_LLAMA_KEYS = {
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
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
_GATED_SILU = {"hidden_act": ("silu",)}
_ROTARY_TABLES = ("model.layers.*.self_attn.rotary_emb.*", "model.rotary_emb.*")

_LLAMA = Family(
    name="llama",
    model_types=("llama",),
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS,
    supported=_GATED_SILU | _NO_BIAS,
    table=(_EMBEDDING, _INPUT_NORM, _QKV, _PROJECTION, _MLP_NORM, _GATE_UP, _DOWN, _FINAL_NORM, _OUTPUT),
    ignored=_ROTARY_TABLES,
)

_MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    keys=_LLAMA_KEYS | {"sliding_window": "sliding_window"},
    defaults=_LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    nullable=("sliding_window", "num_key_value_heads"),
    supported=_GATED_SILU,
    table=_LLAMA.table,
    ignored=_ROTARY_TABLES,
)

_QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    nullable=("num_key_value_heads",),
    supported=_GATED_SILU,
    windowed=True,
    constants={"qkv_bias": True},
    table=(_EMBEDDING, _INPUT_NORM, _QKV, _QKV_BIAS, _PROJECTION, _MLP_NORM, _GATE_UP, _DOWN, _FINAL_NORM, _OUTPUT),
    ignored=_ROTARY_TABLES,
)

_QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    keys=_LLAMA_KEYS,
    defaults={**_QWEN2.defaults, "head_dim": 128},
    nullable=("num_key_value_heads",),
    supported=_GATED_SILU | {"attention_bias": (False,)},
    windowed=True,
    constants={"qk_layernorm": True},
    table=(
        *(_EMBEDDING, _INPUT_NORM, _QKV, _QUERY_NORM, _KEY_NORM, _PROJECTION),
        *(_MLP_NORM, _GATE_UP, _DOWN, _FINAL_NORM, _OUTPUT),
    ),
    ignored=_ROTARY_TABLES,
)


def _norm_bias(norm: WeightPattern) -> WeightPattern:
    """The row of the bias beside a norm's gain."""
    names = {name.removesuffix("weight") + "bias": shape for name, shape in norm.hf.items()}
    return WeightPattern(norm.megatron.removesuffix("weight") + "bias", names)


_NEMOTRON = Family(
    name="nemotron",
    model_types=("nemotron",),
    keys=_LLAMA_KEYS | {"layernorm_epsilon": "norm_eps"},
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    supported={"hidden_act": ("relu2",)} | _NO_BIAS,
    constants={"activation": "relu2", "gated": False, "normalization": "LayerNorm1P"},
    partial_rotary=0.5,
    table=(
        *(_EMBEDDING, _INPUT_NORM, _norm_bias(_INPUT_NORM), _QKV, _PROJECTION),
        *(_MLP_NORM, _norm_bias(_MLP_NORM), _UP, _DOWN, _FINAL_NORM, _norm_bias(_FINAL_NORM), _OUTPUT),
    ),
    ignored=_ROTARY_TABLES,
)

_GPT2_HF = "transformer.h.{layer}."


def _gpt2_norm(megatron: str, hf: str) -> tuple[WeightPattern, WeightPattern]:
    """A norm's gain and bias."""
    gain = WeightPattern(megatron + ".weight", {hf + ".weight": ("hidden",)})
    return gain, _norm_bias(gain)


_GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    keys={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "ffn_hidden_size": "n_inner",
        "num_attention_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "n_positions",
        "layernorm_epsilon": "layer_norm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
        "activation": "activation_function",
    },
    defaults={
        "n_inner": None,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
    },
    supported={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    constants={"gated": False, "normalization": "LayerNorm", "linear_bias": True, "position_embedding": "learned"},
    conv1d=True,
    head="LMHeadModel",
    prefix="transformer.",
    table=(
        WeightPattern(
            "embedding.word_embeddings.weight",
            {"transformer.wte.weight": ("vocab", "hidden")},
            shard_dim=0,
            pad_rows=True,
        ),
        WeightPattern("embedding.position_embeddings.weight", {"transformer.wpe.weight": ("positions", "hidden")}),
        *_gpt2_norm(_MEGATRON + "input_layernorm", _GPT2_HF + "ln_1"),
        WeightPattern(
            _MEGATRON + "self_attention.linear_qkv.weight",
            {_GPT2_HF + "attn.c_attn.weight": ("qkv", "hidden")},
            transform="fused_qkv",
            shard_dim=0,
            shard_unit="group_rows",
            prunable=True,
        ),
        WeightPattern(
            _MEGATRON + "self_attention.linear_qkv.bias",
            {_GPT2_HF + "attn.c_attn.bias": ("qkv",)},
            transform="fused_qkv",
            shard_dim=0,
            shard_unit="group_rows",
        ),
        WeightPattern(
            _MEGATRON + "self_attention.linear_proj.weight",
            {_GPT2_HF + "attn.c_proj.weight": ("hidden", "query")},
            shard_dim=1,
            shard_unit="group_inputs",
            prunable=True,
        ),
        WeightPattern(_MEGATRON + "self_attention.linear_proj.bias", {_GPT2_HF + "attn.c_proj.bias": ("hidden",)}),
        *_gpt2_norm(_MEGATRON + "pre_mlp_layernorm", _GPT2_HF + "ln_2"),
        WeightPattern(
            _MEGATRON + "mlp.linear_fc1.weight",
            {_GPT2_HF + "mlp.c_fc.weight": ("ffn", "hidden")},
            shard_dim=0,
            prunable=True,
        ),
        WeightPattern(_MEGATRON + "mlp.linear_fc1.bias", {_GPT2_HF + "mlp.c_fc.bias": ("ffn",)}, shard_dim=0),
        WeightPattern(
            _MEGATRON + "mlp.linear_fc2.weight",
            {_GPT2_HF + "mlp.c_proj.weight": ("hidden", "ffn")},
            shard_dim=1,
            prunable=True,
        ),
        WeightPattern(_MEGATRON + "mlp.linear_fc2.bias", {_GPT2_HF + "mlp.c_proj.bias": ("hidden",)}),
        *_gpt2_norm("decoder.final_layernorm", "transformer.ln_f"),
        _OUTPUT,
    ),
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _NEMOTRON, _GPT2)}
