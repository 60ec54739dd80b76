"""GPT-2 and GPT-3: learned positions, LayerNorm, biases, linears stored `[in, out]`."""

from __future__ import annotations

from megatron_prune.model.family import Family, WeightPattern
from megatron_prune.model.rows import MEGATRON, OUTPUT, norm_bias

_GPT2_HF = "transformer.h.{layer}."


def _gpt2_norm(megatron: str, hf: str) -> tuple[WeightPattern, WeightPattern]:
    """A norm's gain and bias."""
    gain = WeightPattern(megatron + ".weight", {hf + ".weight": ("hidden",)})
    return gain, norm_bias(gain)


FAMILY = Family(
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
        *_gpt2_norm(MEGATRON + "input_layernorm", _GPT2_HF + "ln_1"),
        WeightPattern(
            MEGATRON + "self_attention.linear_qkv.weight",
            {_GPT2_HF + "attn.c_attn.weight": ("qkv", "hidden")},
            transform="fused_qkv",
            shard_dim=0,
            shard_unit="group_rows",
            prunable=True,
        ),
        WeightPattern(
            MEGATRON + "self_attention.linear_qkv.bias",
            {_GPT2_HF + "attn.c_attn.bias": ("qkv",)},
            transform="fused_qkv",
            shard_dim=0,
            shard_unit="group_rows",
        ),
        WeightPattern(
            MEGATRON + "self_attention.linear_proj.weight",
            {_GPT2_HF + "attn.c_proj.weight": ("hidden", "query")},
            shard_dim=1,
            shard_unit="group_inputs",
            prunable=True,
        ),
        WeightPattern(MEGATRON + "self_attention.linear_proj.bias", {_GPT2_HF + "attn.c_proj.bias": ("hidden",)}),
        *_gpt2_norm(MEGATRON + "pre_mlp_layernorm", _GPT2_HF + "ln_2"),
        WeightPattern(
            MEGATRON + "mlp.linear_fc1.weight",
            {_GPT2_HF + "mlp.c_fc.weight": ("ffn", "hidden")},
            shard_dim=0,
            prunable=True,
        ),
        WeightPattern(MEGATRON + "mlp.linear_fc1.bias", {_GPT2_HF + "mlp.c_fc.bias": ("ffn",)}, shard_dim=0),
        WeightPattern(
            MEGATRON + "mlp.linear_fc2.weight",
            {_GPT2_HF + "mlp.c_proj.weight": ("hidden", "ffn")},
            shard_dim=1,
            prunable=True,
        ),
        WeightPattern(MEGATRON + "mlp.linear_fc2.bias", {_GPT2_HF + "mlp.c_proj.bias": ("hidden",)}),
        *_gpt2_norm("decoder.final_layernorm", "transformer.ln_f"),
        OUTPUT,
    ),
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)
