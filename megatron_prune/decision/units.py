"""Units of a model that structured pruning removes, and how its weights are cut to those that stay.

Units are numbered as in the unsharded model: decoder layers, and in each of them query heads, query groups (with the
key and value head their query heads share), MLP neurons and experts; channels of the residual stream, the same in all
layers.
What a unit is made of is not listed again: the family's table says, for every Hugging Face tensor, what each of its
dimensions counts (`WeightMap.symbols`), so one rule cuts every weight, bias, norm and embedding of every family. This
is the only place that knows which query heads share a group: head h is of group h // (heads / groups).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_prune.model import convert
from megatron_prune.model.families import Block, ModelConfig, WeightMap, dimensions


@dataclass(frozen=True)
class BlockUnits:
    """Units of one decoder layer, numbers rising; each group has equally many heads. None of a kind: that half of the
    layer is absent, an identity. Neurons, where all of them stay, may be in any order.
    """

    groups: tuple[int, ...]
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    """Of the MLP; of every expert where there are experts and `expert_ffn` does not say."""
    experts: tuple[int, ...] = ()
    """None: the MLP is dense."""
    expert_ffn: tuple[tuple[int, ...], ...] = ()
    """Neurons of each expert that stays, equally many; none: those in `ffn`."""
    shared_ffn: tuple[int, ...] = ()
    """Of the MLP that all tokens go through beside their experts; none: all of it."""

    @property
    def ffn_width(self) -> int:
        """Neurons of the MLP, or of each expert."""
        return len(self.expert_ffn[0]) if self.expert_ffn else len(self.ffn)


@dataclass(frozen=True)
class Units:
    """What stays of a model."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    """In any order where all of them stay."""
    blocks: tuple[BlockUnits, ...]
    """One for each layer that stays."""

    @classmethod
    def all(cls, config: ModelConfig) -> Units:
        """Everything stays."""
        layers = range(config.num_layers)
        return cls(tuple(layers), tuple(range(config.hidden_size)), tuple(all_of_block(config, n) for n in layers))

    def keeps(self, layer: int, expert: int | None = None) -> bool:
        """Whether a layer stays, and an expert in it, by their numbers in the whole model."""
        if layer not in self.layers:
            return False
        return expert is None or expert in self.blocks[self.layers.index(layer)].experts

    def without_layers(self, removed: Iterable[int]) -> Units:
        """The same without some layers, by their numbers in the whole model."""
        gone = set(removed)
        stay = [(layer, block) for layer, block in zip(self.layers, self.blocks, strict=True) if layer not in gone]
        return replace(self, layers=tuple(n for n, _ in stay), blocks=tuple(block for _, block in stay))

    def thins(self, whole: ModelConfig) -> bool:
        """Whether more goes than whole layers."""
        return self != Units.all(whole).without_layers(set(range(whole.num_layers)) - set(self.layers))

    def config(self, whole: ModelConfig) -> ModelConfig:
        """Sizes of the smaller model. ValueError for units that `whole` does not have or that make no model."""
        self._check(whole)
        smaller = replace(whole.with_layers(self.layers), hidden_size=len(self.hidden))
        sizes = [Block(len(x.heads), len(x.groups), x.ffn_width, len(x.experts)) for x in self.blocks]
        return self._with_shared_width(whole, smaller.with_blocks(sizes))

    def _with_shared_width(self, whole: ModelConfig, smaller: ModelConfig) -> ModelConfig:
        """With the width of the shared experts' MLP, which is one in all layers."""
        widths = {len(block.shared_ffn) or whole.shared_width for block in self.blocks if block.experts}
        if not whole.shared_width or widths == {smaller.shared_width}:
            return smaller
        if len(widths) > 1 or whole.moe_shared_expert_intermediate_size is None:
            raise ValueError(
                f"shared experts of {sorted(widths)} neurons; allowed: one width in all layers, and where the model "
                "counts them, that of so many experts"
            )
        return replace(smaller, moe_shared_expert_intermediate_size=widths.pop())

    def source(self, map: WeightMap) -> str:
        """Name in the whole model of the tensor that one of the smaller model is cut from."""
        if map.layer is None:
            return map.megatron
        layer, rest = self.layers[map.layer], map.megatron.removeprefix(f"decoder.layers.{map.layer}.")
        if map.expert is not None:
            expert = self.blocks[map.layer].experts[map.expert]
            rest = rest.replace(f"local_experts.{map.expert}.", f"local_experts.{expert}.", 1)
        return f"decoder.layers.{layer}.{rest}"

    def cut(self, whole: ModelConfig, map: WeightMap, tensor: Tensor, smaller: WeightMap) -> Tensor:
        """An unsharded Megatron tensor of the whole model -> what stays of it, which is `smaller`'s tensor."""
        tensor = self._rescaled(whole, map, tensor)
        parts = convert.split(map, tensor, whole)
        cut = []
        for part, symbols in zip(parts, map.symbols, strict=True):
            rows_first = part.t() if map.transposed else part
            for dim, symbol in enumerate(symbols):
                kept = self.indices(whole, map.layer, symbol, map.expert)
                if kept is not None:
                    rows_first = rows_first.index_select(dim, kept.to(part.device))
            cut.append(rows_first.t() if map.transposed else rows_first)
        return convert.merge(smaller, cut, self.config(whole))

    def _rescaled(self, whole: ModelConfig, map: WeightMap, tensor: Tensor) -> Tensor:
        """A weight of the embedding, and of the final norm before an output layer that is the same, so that what the
        smaller width multiplies embeddings by changes nothing.
        """
        factor = whole.embedding_scale / replace(whole, hidden_size=len(self.hidden)).embedding_scale
        if factor == 1.0 or not whole.scaled_embedding:
            return tensor
        if map.megatron == "embedding.word_embeddings.weight":
            return tensor * factor
        if map.megatron == "decoder.final_layernorm.weight" and whole.tie_word_embeddings:
            return (tensor + whole.gain_offset) / factor - whole.gain_offset
        return tensor

    def mask(self, whole: ModelConfig, map: WeightMap) -> Tensor:
        """Bool in the shape of the unsharded Megatron tensor: True where both (all) its dimensions stay."""
        parts = []
        for shape, symbols in zip(map.row_shapes, map.symbols, strict=True):
            part = torch.ones(shape, dtype=torch.bool)
            for dim, symbol in enumerate(symbols):
                kept = self.indices(whole, map.layer, symbol, map.expert)
                if kept is not None:
                    stays = torch.zeros(shape[dim], dtype=torch.bool).index_fill_(0, kept, True)
                    part &= stays.unflatten(0, (-1, *[1] * (len(shape) - dim - 1)))
            parts.append(part.t() if map.transposed else part)
        return convert.merge(map, parts, whole)

    def indices(self, whole: ModelConfig, layer: int | None, symbol: str, expert: int | None = None) -> Tensor | None:
        """Numbers int64 of what stays along a dimension of that symbolic size; None: all of it.

        `expert`: by its number in the whole model, one that stays, where the size is of one.
        """
        if symbol == "hidden":
            return torch.tensor(self.hidden)
        if layer is None:
            return None
        block = self.blocks[self.layers.index(layer)]
        if symbol == "shared_ffn":
            return torch.tensor(block.shared_ffn) if block.shared_ffn else None
        size = dimensions(whole, layer)
        ffn = block.ffn
        if expert is not None and block.expert_ffn:
            ffn = block.expert_ffn[block.experts.index(expert)]
        query = channels_of(block.heads, size["head"])
        key_value = channels_of(block.groups, size["head"])
        rows = {
            "ffn": torch.tensor(ffn, dtype=torch.int64),
            "experts": torch.tensor(block.experts, dtype=torch.int64),
            "heads": torch.tensor(block.heads, dtype=torch.int64),
            "latent_query": channels_of(block.heads, size["query_head"]),
            "latent_key_value": channels_of(block.heads, size["up_head"]),
            "query": query,
            "key_value": key_value,
            "qkv": torch.cat([query, size["query"] + key_value, size["query"] + size["key_value"] + key_value]),
        }
        return rows.get(symbol)

    def _check(self, whole: ModelConfig) -> None:
        _check_numbers("layers", self.layers, whole.num_layers)
        _check_numbers("hidden", self.hidden, whole.hidden_size, any_order=True)
        if len(self.blocks) != len(self.layers):
            raise ValueError(f"{len(self.layers)} layers stay and {len(self.blocks)} are described")
        for layer, block in zip(self.layers, self.blocks, strict=True):
            available = all_of_block(whole, layer)
            if bool(block.experts) != bool(available.experts):
                raise ValueError(f"layer {layer} has {len(available.experts)} experts and {len(block.experts)} stay")
            for name in ("groups", "heads", "ffn", "experts"):
                kept, there = getattr(block, name), getattr(available, name)
                if kept:
                    _check_numbers(f"{name} of layer {layer}", kept, len(there), any_order=name == "ffn")
            self._check_experts(whole, layer, block)
            counts = dict.fromkeys(block.groups, 0)
            for head in block.heads:
                group = group_of(whole, layer, head)
                counts[group] = counts.get(group, 0) + 1
            if len(set(counts.values())) > 1 or set(counts) != set(block.groups):
                raise ValueError(f"query groups of layer {layer} keep different numbers of heads: {counts}")

    @staticmethod
    def _check_experts(whole: ModelConfig, layer: int, block: BlockUnits) -> None:
        groups, members = whole.moe_router_num_groups or 1, whole.block(layer).num_moe_experts
        stay = [expert * groups // members for expert in block.experts]
        if len({stay.count(group) for group in range(groups)}) > 1:
            raise ValueError(f"layer {layer}: groups of experts keep different numbers of them: {block.experts}")
        width, shared = whole.block(layer).ffn_hidden_size, whole.shared_width if block.experts else 0
        if block.shared_ffn:
            _check_numbers(f"shared neurons of layer {layer}", block.shared_ffn, shared, any_order=True)
        if not block.expert_ffn:
            return
        for neurons in block.expert_ffn:
            _check_numbers(f"neurons of an expert of layer {layer}", neurons, width, any_order=True)
        counts = sorted(set(map(len, block.expert_ffn)))
        if block.ffn or len(block.expert_ffn) != len(block.experts) or len(counts) > 1:
            raise ValueError(
                f"layer {layer}: neurons of {len(block.expert_ffn)} experts, {counts} of each, and {len(block.ffn)} of "
                f"all; {len(block.experts)} experts stay, and each keeps equally many"
            )


def group_of(config: ModelConfig, layer: int, head: int) -> int:
    """The query group of a query head."""
    return head // config.block(layer).group_heads


def heads_of(config: ModelConfig, layer: int, group: int) -> range:
    """The query heads of a query group."""
    count = config.block(layer).group_heads
    return range(group * count, (group + 1) * count)


def all_of_block(config: ModelConfig, layer: int) -> BlockUnits:
    """Every unit of a decoder layer."""
    block = config.block(layer)
    return BlockUnits(
        tuple(range(block.num_query_groups)),
        tuple(range(block.num_attention_heads)),
        tuple(range(block.ffn_hidden_size)),
        tuple(range(block.num_moe_experts)),
    )


def channels_of(units: Sequence[int], width: int) -> Tensor:
    """Numbers int64 of the channels of units, heads say, that are `width` wide."""
    return (torch.tensor(units, dtype=torch.int64)[:, None] * width + torch.arange(width)).flatten()


def _check_numbers(what: str, numbers: tuple[int, ...], count: int, *, any_order: bool = False) -> None:
    if any_order and len(numbers) == count:
        numbers = tuple(sorted(numbers))
    if not numbers or list(numbers) != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < count:
        raise ValueError(f"{what}: {numbers} are not rising numbers below {count}, at least one")
