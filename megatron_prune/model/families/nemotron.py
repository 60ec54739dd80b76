"""Nemotron-4 and Minitron: squared ReLU without a gate, LayerNorm of gains less one, half of a head rotated."""

from __future__ import annotations

from megatron_prune.model.family import Family
from megatron_prune.model.rows import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    INPUT_NORM,
    LLAMA_KEYS,
    MLP_NORM,
    NO_BIAS,
    OUTPUT,
    PROJECTION,
    QKV,
    ROTARY_TABLES,
    UP,
    norm_bias,
)

FAMILY = Family(
    name="nemotron",
    model_types=("nemotron",),
    keys=LLAMA_KEYS | {"layernorm_epsilon": "norm_eps"},
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    supported={"hidden_act": ("relu2",)} | NO_BIAS,
    constants={"activation": "relu2", "gated": False, "normalization": "LayerNorm1P"},
    partial_rotary=0.5,
    table=(
        *(EMBEDDING, INPUT_NORM, norm_bias(INPUT_NORM), QKV, PROJECTION),
        *(MLP_NORM, norm_bias(MLP_NORM), UP, DOWN, FINAL_NORM, norm_bias(FINAL_NORM), OUTPUT),
    ),
    ignored=ROTARY_TABLES,
)
