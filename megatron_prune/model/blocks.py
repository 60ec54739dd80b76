"""Sizes of single decoder layers in models whose layers differ, and how config.json lists them.

The list is `block_configs`, in the form that NVIDIA's heterogeneous models have and megatron-core's
HeterogeneousTransformerConfig reads:

    {"attention": {"no_op": false, "replace_with_linear": false, "num_attention_heads": 6, "num_query_groups": 2,
                   "n_heads_in_group": 3},
     "ffn": {"no_op": true, "replace_with_linear": false, "ffn_hidden_size": null}}

`num_attention_heads` is an addition: megatron-core has as many heads in every layer and overlooks it, so it reads a
list only where `same_heads` is true. `ffn_mult`, which some readers want instead of `ffn_hidden_size`, is not written:
they round it up to a multiple of 256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import UserError

KEY = "block_configs"
"""Of the list in config.json."""
SUFFIX = "_blocks"
"""What `model_type` ends with when config.json has the list: stock software must not take it for the plain family."""
PREFIX = "Blocks"
"""What the names of its `architectures` begin with, for the same reason."""


@dataclass(frozen=True)
class Block:
    """Sizes of one decoder layer; 0 means that this half of it is absent: an identity."""

    num_attention_heads: int
    num_query_groups: int
    """Divides num_attention_heads."""
    ffn_hidden_size: int
    """Of the MLP; of each expert where there are experts."""
    num_moe_experts: int = 0
    """0: the MLP is dense."""

    def __post_init__(self) -> None:
        heads, groups = self.num_attention_heads, self.num_query_groups
        if (
            min(heads, groups, self.ffn_hidden_size, self.num_moe_experts) < 0
            or bool(heads) != bool(groups)
            or (groups and heads % groups)
        ):
            raise ValueError(f"{self} is no layer: groups divide heads, sizes are 0 or more")

    @property
    def group_heads(self) -> int:
        """Query heads of each group."""
        return self.num_attention_heads // self.num_query_groups if self.num_query_groups else 0


def widest(blocks: Sequence[Block]) -> Block:
    """The smallest layer into which all of them fit: as many groups, and heads in a group, as any has."""
    groups = max(block.num_query_groups for block in blocks)
    heads = max(block.group_heads for block in blocks)
    experts = max(block.num_moe_experts for block in blocks)
    return Block(groups * heads, groups, max(block.ffn_hidden_size for block in blocks), experts)


def same_heads(blocks: Sequence[Block]) -> bool:
    """Whether all layers that attend have as many heads."""
    return len({block.num_attention_heads for block in blocks if block.num_attention_heads}) <= 1


def add(hf_config: Mapping[str, Any], blocks: Sequence[Block]) -> dict[str, Any]:
    """An ordinary config.json of the widest layer with the list of layers, under names of its own."""
    classes = [PREFIX + name for name in _classes(hf_config)]
    names = {"model_type": hf_config["model_type"] + SUFFIX, "architectures": classes}
    return {**hf_config, **names, KEY: to_list(blocks)}


def remove(hf_config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Block, ...]]:
    """Inverse of `add`: the ordinary config.json, without pointers to code beside it, and the layers."""
    classes = [name.removeprefix(PREFIX) for name in _classes(hf_config)]
    names = {"model_type": hf_config["model_type"].removesuffix(SUFFIX), "architectures": classes}
    plain = {key: value for key, value in hf_config.items() if key not in (KEY, "auto_map")}
    return plain | names, from_list(hf_config[KEY])


def _classes(hf_config: Mapping[str, Any]) -> list[str]:
    given = hf_config.get("architectures")
    return [str(name) for name in given] if isinstance(given, list) else []


def to_list(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """The list in config.json; see the module's docstring."""
    return [{"attention": _attention(block), "ffn": _ffn(block)} for block in blocks]


def _attention(block: Block) -> dict[str, Any]:
    return {
        "no_op": not block.num_attention_heads,
        "replace_with_linear": False,
        "num_attention_heads": block.num_attention_heads or None,
        "num_query_groups": block.num_query_groups or None,
        "n_heads_in_group": block.group_heads or None,
    }


def _ffn(block: Block) -> dict[str, Any]:
    width = block.ffn_hidden_size
    return {"no_op": not width, "replace_with_linear": False, "ffn_hidden_size": width or None}


def from_list(given: Any) -> tuple[Block, ...]:
    """The layers of such a list; UserError for one that is not what `to_list` writes."""
    if not isinstance(given, list) or not given:
        raise UserError(f"config.json gives {KEY} that are no list of layers; there is one entry for each layer")
    return tuple(_block(number, entry) for number, entry in enumerate(given))


def _block(number: int, entry: Any) -> Block:
    attention, ffn = (entry.get(key) if isinstance(entry, Mapping) else None for key in ("attention", "ffn"))
    if not isinstance(attention, Mapping) or not isinstance(ffn, Mapping):
        raise UserError(f"config.json: {KEY} of layer {number} lacks attention or ffn")
    if attention.get("replace_with_linear") or ffn.get("replace_with_linear"):
        raise UserError(f"config.json: {KEY} of layer {number} has replace_with_linear; supported: no_op and sizes")
    heads, groups = (_size(number, attention, key) for key in ("num_attention_heads", "num_query_groups"))
    if groups and heads % groups:
        raise UserError(
            f"config.json: {KEY} of layer {number} has {heads} attention heads and {groups} query groups; the second "
            "must divide the first"
        )
    return Block(heads, groups, _size(number, ffn, "ffn_hidden_size"))


def _size(number: int, half: Mapping[str, Any], key: str) -> int:
    """A size of a layer; 0 where the half is a no_op."""
    if half.get("no_op"):
        return 0
    value = half.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"config.json: {KEY} of layer {number} gives {key} = {value!r}; it must be a whole number of at least 1"
        )
    return value
