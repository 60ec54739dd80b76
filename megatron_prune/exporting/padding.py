"""A model whose layers differ as an ordinary one: every layer padded with zeros to the size of the widest.

Query heads of a layer fill its groups, and groups that it lacks follow; an absent half has zeros only. Heads and
channels that are zeros add nothing, so the model computes the same, at the cost of the widest in every layer.

    2 groups of 1 head in 4 groups of 2:   q0 0 | q1 0 | 0 0 | 0 0      k0 k1 0 0
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_prune.decision.target import NM, Unstructured, parse_any_target
from megatron_prune.model.convert import HFReader
from megatron_prune.model.families import Block, ModelConfig, WeightMap, dimensions, get_family
from megatron_prune.model.transformers_model import filled_model


def in_transformers(reader: HFReader, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face directory as transformers has it; padded where its layers differ.

    Only what `transformers_model` knows of its config.json counts, and no code that lies in the directory is run.
    Weights are found under whatever names the reader knows.
    """
    config = reader.model_config
    weights = ((name, reader.read(name)) for name in reader.names())
    if config.blocks is None:
        return filled_model(config, weights, dtype)
    return filled_model(get_family(config.family).uniform(config), padded(config, weights), dtype)


def kept_history(history: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a checkpoint's history holds of it when it is padded: sizes and budgets do not, and tiles move."""
    target = parse_any_target(history["target"]) if history.get("target") else None
    if target is None or isinstance(target, Unstructured) or (isinstance(target, NM) and target.share == 1):
        return history
    return {**history, "target": None, "parameters": None}


def padded(config: ModelConfig, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face weights of ``config``'s model -> those of `Family.uniform(config)`, absent halves last."""
    family = get_family(config.family)
    wide = family.uniform(config)
    missing = {name: (map, number) for map in family.weights(wide) for number, name in enumerate(map.hf)}
    dtype = None
    for name, tensor in weights:
        dtype = tensor.dtype
        yield name, pad(tensor, *missing.pop(name), config, wide)
    for name, (map, number) in missing.items():
        yield name, torch.zeros(map.shapes[number], dtype=dtype)


def pad(tensor: Tensor, map: WeightMap, number: int, config: ModelConfig, wide: ModelConfig) -> Tensor:
    """One Hugging Face tensor of ``config``'s model, the ``number``-th of a weight of ``wide``, as ``wide`` has it."""
    rows_first = tensor.t() if map.transposed else tensor
    size = dimensions(wide)
    for dim, symbol in enumerate(map.symbols[number]):
        if rows_first.shape[dim] != size[symbol]:
            shape = list(rows_first.shape)
            shape[dim] = size[symbol]
            where = places(symbol, config.block(map.layer), wide).to(tensor.device)
            rows_first = rows_first.new_zeros(shape).index_copy_(dim, where, rows_first)
    return rows_first.t().contiguous() if map.transposed else rows_first


def places(symbol: str, block: Block, wide: ModelConfig) -> Tensor:
    """Where each channel of a layer of these sizes lies in the padded one; ``symbol`` says what is counted."""
    if symbol == "ffn":
        return torch.arange(block.ffn_hidden_size)
    size = dimensions(wide)
    channels = torch.arange(size["head"])
    groups = torch.arange(block.num_query_groups)[:, None, None]
    heads = groups * wide.block(None).group_heads + torch.arange(block.group_heads)[:, None]
    query = (heads * size["head"] + channels).flatten()
    key = (groups * size["head"] + channels).flatten()
    if symbol == "qkv":
        return torch.cat([query, size["query"] + key, size["query"] + size["key_value"] + key])
    return {"query": query, "key_value": key}[symbol]
