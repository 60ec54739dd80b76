"""Minitron (Muralidharan et al. 2024, arXiv:2407.14679; Sreenivas et al. 2024, arXiv:2408.11796): depth and width.

Width is scored by the size of activations on calibration text, aggregated over the tokens of a window and then over
windows; the same number of units stays in every layer:

    MLP neuron        what enters the down projection
    head              L2 norm over its channels of what enters the output projection; ranked inside its query group
    query group       L2 norm over its heads
    residual channel  what the two norms of every layer give out, summed over layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.depth import CRITERIA, layers_to_remove
from megatron_prune.methods.structured import (
    FC1,
    FC2,
    PROJECTION,
    QKV,
    StructuredMethod,
    allowed_sizes,
    keep_best,
    removed_layers,
)
from megatron_prune.methods.target import Shape, StructuredTarget
from megatron_prune.model.units import BlockUnits, Units, all_of_block, heads_of
from megatron_prune.statistics.channels import AGGREGATIONS, ChannelActivations

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


@register("minitron")
@dataclass(frozen=True)
class Minitron(StructuredMethod):
    """Keep the layers, heads, groups, neurons and channels of largest importance, as many as the target says."""

    paper: ClassVar[str] = "Muralidharan et al. 2024, arXiv:2407.14679"
    targets: ClassVar[Mapping[type, str]] = {Shape: f"a smaller shape: {', '.join(SIZES)}"}

    depth: str = hyperparameter("combined", f"how layers are chosen: {', '.join(CRITERIA)}")
    batch: str = hyperparameter("l2", f"aggregation over windows: {', '.join(AGGREGATIONS)}")
    sequence: str = hyperparameter("mean", f"aggregation over the tokens of a window: {', '.join(AGGREGATIONS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("depth", CRITERIA), ("batch", AGGREGATIONS), ("sequence", AGGREGATIONS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"minitron: {name} {getattr(self, name)!r} was given; allowed: {', '.join(allowed)}")

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The units that stay; width is scored in the whole model."""
        wanted = allowed_sizes(target, SIZES, self.name)
        units = Units.all(config)
        if set(wanted.given()) - {"num_layers"}:
            found = passes.observe(dict.fromkeys((QKV, PROJECTION, FC1, FC2), ChannelActivations))
            units = self._width(config, found, wanted)
        return units.without_layers(layers_to_remove(passes, removed_layers(config, wanted), self.depth))

    def _width(self, config: Any, found: Sequence[Mapping[str, ChannelActivations]], target: Shape) -> Units:
        scores = [{path: x.importance(self.batch, self.sequence) for path, x in layer.items()} for layer in found]
        hidden = torch.stack([layer[path] for layer in scores for path in (QKV, FC1) if path in layer]).sum(0)
        layers = range(config.num_layers)
        return Units(
            tuple(layers),
            keep_best(hidden, target.hidden_size or config.hidden_size),
            tuple(self._block(config, n, scores[n], target) for n in layers),
        )

    def _block(self, config: Any, layer: int, scores: Mapping[str, Tensor], target: Shape) -> BlockUnits:
        block = all_of_block(config, layer)
        if PROJECTION in scores:
            heads = head_scores(scores[PROJECTION], config.kv_channels)
            block = BlockUnits(*keep_heads(config, layer, heads, target), block.ffn)
        if FC2 in scores:
            ffn = keep_best(scores[FC2], min(target.ffn_hidden_size or len(block.ffn), len(block.ffn)))
            block = BlockUnits(block.groups, block.heads, ffn)
        return block


def head_scores(channels: Tensor, width: int) -> Tensor:
    """L2 norm of each head's channels: `[heads * width]` -> `[heads]`."""
    return channels.unflatten(0, (-1, width)).square().sum(1).sqrt()


def keep_heads(config: Any, layer: int, scores: Tensor, target: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Groups and heads of a layer that stay, from the heads' scores `[heads]`."""
    block = config.block(layer)
    grouped = scores.unflatten(0, (block.num_query_groups, block.group_heads))
    groups = keep_best(grouped.square().sum(1), min(target.num_query_groups or len(grouped), len(grouped)))
    wanted = target.num_attention_heads
    count = min(wanted // len(groups) if wanted else block.group_heads, block.group_heads)
    heads = [heads_of(config, layer, group)[i] for group in groups for i in keep_best(grouped[group], count)]
    return groups, tuple(heads)
