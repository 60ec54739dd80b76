"""Gemma 3, its language model: norms before and after attention and MLP, windows in all layers but each sixth, which
turns positions by another base, embeddings multiplied by the root of their width.
"""

from __future__ import annotations

from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    BEFORE_MLP_NORM,
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE_UP,
    INPUT_NORM,
    KEY_NORM,
    LLAMA_KEYS,
    OUTPUT,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    PROJECTION,
    QKV,
    QUERY_NORM,
    ROTARY_TABLES,
)

FAMILY = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    keys=LLAMA_KEYS | {"sliding_window": "sliding_window", "query_pre_attn_scalar": "query_pre_attn_scalar"},
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    supported={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    constants={
        "activation": "gelu_pytorch_tanh",
        "normalization": "RMSNorm1P",
        "norm_rounds_last": True,
        "qk_layernorm": True,
        "post_layernorm": True,
        "scaled_embedding": True,
    },
    rope_types=("default", "linear"),
    mixed_windows=6,
    window_rope=(1e6, 1e4),
    table=(
        *(EMBEDDING, INPUT_NORM, QKV, QUERY_NORM, KEY_NORM, PROJECTION, POST_ATTENTION_NORM),
        *(BEFORE_MLP_NORM, GATE_UP, DOWN, POST_MLP_NORM, FINAL_NORM, OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
