"""The integers behind the noise of learned masks, without PyTorch or JAX: keys, and the rows that noise counts by.

`megatron_prune.kernels.philox` and `gumbel.Draw` say the same for PyTorch; a test compares them.
"""

from __future__ import annotations

import numpy as np

from megatron_prune.maxtext.layout import Leaf, interleaved, weight_shape
from megatron_prune.model.families import ModelConfig

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK_64 = 2**64 - 1
_LINEARS = {
    "query": 0, "key": 0, "value": 0, "out": 1, "wi_0": 2, "wi_1": 2, "wo": 3,
}  # fmt: skip
"""Which of a layer's four Megatron linears an array is a part of."""


def hash_key(*values: int) -> tuple[int, int]:
    """Philox key (low, high word) of a tuple of integers: h = splitmix64(h XOR value) for each value."""
    state = 0
    for value in values:
        z = ((state ^ (value & _MASK_64)) + 0x9E3779B97F4A7C15) & _MASK_64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state = z ^ (z >> 31)
    return state & 0xFFFFFFFF, state >> 32


def keys(leaf: Leaf, config: ModelConfig, seed: int, step: int) -> np.ndarray:
    """Philox keys of every layer's linear in a step, uint32 [layers, 2]; one draw for the whole batch."""
    linear = _LINEARS[leaf.path.split("/")[-2]]
    ids = (layer * 4 + linear for layer in range(config.num_layers))
    return np.array([hash_key(seed, step, 0, tensor_id) for tensor_id in ids], np.uint32)


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
