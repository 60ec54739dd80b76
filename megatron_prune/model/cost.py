"""What a model of given sizes costs, exactly, from the family's table: nothing is loaded or run."""

from __future__ import annotations

import math

from megatron_prune.model.families import ModelConfig, WeightMap, dimensions, get_family

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def parameters(config: ModelConfig) -> int:
    """Weights, biases and gains; a tied output layer counts once."""
    return sum(math.prod(map.shape) for map in get_family(config.family).weights(config))


def active_parameters(config: ModelConfig) -> int:
    """Those that one token meets: of its experts, not of all."""
    return sum(_passed(config, map) for map in get_family(config.family).weights(config))


def _passed(config: ModelConfig, map: WeightMap) -> int:
    """Elements of a weight that one token meets; experts are alike, so it might be sent to the first ones."""
    idle = map.expert is not None and map.expert >= (config.moe_router_topk or 0)
    return 0 if idle else math.prod(map.shape)


def kv_cache_bytes(config: ModelConfig) -> int:
    """Bytes that a token adds to the key and value cache of all layers, in the model's own type."""
    size = _over_layers(config, "latent_rope") if config.kv_lora_rank else 2 * _over_layers(config, "key_value")
    return size * BYTES[config.dtype]


def forward_flops(config: ModelConfig, context: int) -> int:
    """FLOPs of one token that sees `context` tokens, a multiply-add being 2: linear layers, output layer, attention."""
    linears = sum(_passed(config, map) for map in get_family(config.family).weights(config) if map.prunable)
    return 2 * (linears + config.vocab_size * config.hidden_size + channels_seen(config, context))


def channels_seen(config: ModelConfig, context: int) -> int:
    """Channels of all heads' queries and values times the tokens that one of `context` tokens sees, over all layers."""
    found = 0
    for layer in range(config.num_layers):
        size = dimensions(config, layer)
        found += (size["latent_query"] + size["query"]) * min(context, config.window(layer) or context)
    return found


CONTEXT = 2048
"""Tokens that a token sees where a budget limits its FLOPs, fewer in models that are made for fewer."""


def cost(config: ModelConfig, measure: str) -> int:
    """One of the measures that a budget may limit."""
    if measure == "forward_flops":
        return forward_flops(config, min(CONTEXT, config.max_position_embeddings))
    counts = {"parameters": parameters, "active_parameters": active_parameters, "kv_cache_bytes": kv_cache_bytes}
    return counts[measure](config)


def _over_layers(config: ModelConfig, symbol: str) -> int:
    """Sum of a size over the layers."""
    return sum(dimensions(config, layer)[symbol] for layer in range(config.num_layers))
