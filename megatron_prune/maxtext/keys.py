"""The noise of learned masks for the arrays of MaxText's tree: their keys and the rows it counts by. Without JAX."""

from __future__ import annotations

import numpy as np

from megatron_prune.kernels.definition import Draw
from megatron_prune.maxtext.layout import Leaf, interleaved, weight_shape
from megatron_prune.model.families import ModelConfig

_LINEARS = {
    "query": 0, "key": 0, "value": 0, "out": 1, "wi_0": 2, "wi_1": 2, "wo": 3,
}  # fmt: skip
"""Which of a layer's four Megatron linears an array is a part of."""


def keys(leaf: Leaf, config: ModelConfig, seed: int, step: int) -> np.ndarray:
    """Philox keys of every layer's linear in a step, uint32 [layers, 2]; one draw for the whole batch."""
    linear = _LINEARS[leaf.path.split("/")[-2]]
    ids = (layer * 4 + linear for layer in range(config.num_layers))
    return np.array([Draw(seed, step, 0, tensor_id).key() for tensor_id in ids], np.uint32)


def row_ids(leaf: Leaf, config: ModelConfig) -> np.ndarray:
    """[out] int32: the row of the unsharded Megatron weight that each output of the array is.

    Query, key and value lie in one weight, group by group; gate and up in another, one after the other.
    """
    name = leaf.path.split("/")[-2]
    rows = np.arange(weight_shape(leaf, config)[0], dtype=np.int32)
    if name == "wi_1":
        return rows + config.ffn_hidden_size
    if name not in ("query", "key", "value"):
        return rows
    width, heads = config.kv_channels, config.num_attention_heads // config.num_query_groups
    head, channel = rows // width, rows % width
    if leaf.rotated and interleaved(config):
        channel = channel // 2 + channel % 2 * (width // 2)
    if name == "query":
        group, place = head // heads, head % heads
    else:
        group, place = head, np.full_like(head, heads + (name == "value"))
    return ((group * (heads + 2) + place) * width + channel).astype(np.int32)
