"""Minitron (Muralidharan et al. 2024, arXiv:2407.14679; Sreenivas et al. 2024, arXiv:2408.11796): depth and width.

Width is scored by the size of activations on calibration text, aggregated over the tokens of a window and then over
windows; the same number of units stays in every layer:

    MLP neuron        what enters the down projection
    head              L2 norm over its channels of what enters the output projection; ranked inside its query group
    query group       L2 norm over its heads
    residual channel  what the two norms of every layer give out, summed over layers
    expert            mean over its tokens of the norm of what it adds, gate included (REAP's score, `methods/reap.py`)

An expert's neurons are judged by the tokens that are sent to it, each expert's by themselves; a window without any does
not count. Experts that get none keep their first neurons.

Heads and groups may instead be chosen by what a least-squares refit of the output projection cannot make up for
(`statistics/reconstruction.py`), which is ours. For a number of parameters instead of a shape, shapes are searched
(`methods/shape_search.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.target import MEASURES, Budget, Shape, StructuredTarget
from megatron_prune.decision.units import BlockUnits, Units, all_of_block, heads_of
from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.depth import CRITERIA, layers_to_remove
from megatron_prune.methods.reap import keep_experts, reap_score
from megatron_prune.methods.shape_search import Refit, best_shape, settled, sites
from megatron_prune.methods.structured import Refitted, allowed_sizes, keep_best, removed_layers
from megatron_prune.model.prunable import EXPERTS, FC1, FC2, PROJECTION, QKV, SHARED
from megatron_prune.statistics.channels import AGGREGATIONS, ChannelActivations, ChannelMoments
from megatron_prune.statistics.reconstruction import Reconstruction, groups_to_keep, heads_to_keep

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes
    from megatron_prune.statistics.store import Statistic

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
EXPERT_SIZES = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
"""Of models with experts; `ffn_hidden_size` is that of their other layers."""
HEADS = ("reconstruction", "activations")
AUTO = "auto"
"""Reconstruction where a refit follows: what it chooses is worse than anything without one."""


@register("minitron")
@dataclass(frozen=True)
class Minitron(Refitted):
    """Keep the layers, heads, groups, neurons and channels of largest importance, as many as the target says."""

    paper: ClassVar[str] = "Muralidharan et al. 2024, arXiv:2407.14679"
    sizes_with_experts: ClassVar[tuple[str, ...]] = (*SIZES, *EXPERT_SIZES)
    budget_with_experts: ClassVar[bool] = True
    targets: ClassVar[Mapping[type, str]] = {
        Shape: f"a smaller shape: {', '.join((*SIZES, *EXPERT_SIZES))}",
        Budget: f"the best shape within a budget: {', '.join(MEASURES)}",
    }

    depth: str = hyperparameter("combined", f"how layers are chosen: {', '.join(CRITERIA)}")
    heads: str = hyperparameter(AUTO, f"how heads and query groups are chosen: {', '.join(HEADS)}, or as refit needs")
    batch: str = hyperparameter("l2", f"aggregation over windows: {', '.join(AGGREGATIONS)}")
    sequence: str = hyperparameter("mean", f"aggregation over the tokens of a window: {', '.join(AGGREGATIONS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (("depth", CRITERIA), ("heads", (AUTO, *HEADS)), ("batch", AGGREGATIONS), ("sequence", AGGREGATIONS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise UserError(f"minitron: {name} {getattr(self, name)!r} was given; allowed: {', '.join(allowed)}")

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The units that stay; width is scored in the whole model."""
        if isinstance(target, Budget):
            return self._search(config, passes, target)
        wanted = allowed_sizes(target, (*SIZES, *EXPERT_SIZES), self.name)
        units = Units.all(config)
        if set(wanted.given()) - {"num_layers", "num_moe_experts"}:
            found = passes.observe_each(self._sites(passes, wanted))
            units = self.width(config, passes, map(settled, found), wanted)
        if wanted.num_moe_experts is not None:
            units = keep_experts(units, expert_scores(passes), wanted.num_moe_experts, config.moe_router_num_groups)
        return units.without_layers(layers_to_remove(passes, removed_layers(config, wanted), self.depth))

    @property
    def _reconstructs(self) -> bool:
        return self.heads == "reconstruction" or (self.heads == AUTO and self.refit in ("local", "propagated"))

    def _sites(self, passes: Passes, target: Shape) -> dict[str, Statistic]:
        """What to look at; where it is kept, all that another target could ask for."""
        if passes.store is not None:
            return sites(passes.model.config)
        attention = target.num_attention_heads or target.num_query_groups
        moments: dict[str, Statistic] = {PROJECTION: ChannelMoments} if attention and self._reconstructs else {}
        return {**dict.fromkeys((QKV, PROJECTION, FC1, FC2), ChannelActivations), **moments}

    def _search(self, config: Any, passes: Passes, budget: Budget) -> Units:
        width = functools.partial(self.width, config, passes, known={})
        experts = expert_scores(passes) if config.num_moe_experts else []
        refit = Refit(None if self.refit in ("none", "mean") else self.refit_damping, self.norm_gain)

        def cut(found: Iterable[Mapping[str, Any]], shape: Shape) -> Units:
            units = width(found, shape)
            count, groups = shape.num_moe_experts, config.moe_router_num_groups
            return keep_experts(units, experts, count, groups) if count else units

        shape, found = best_shape(config, passes, budget, cut, refit)
        removed = layers_to_remove(passes, removed_layers(config, shape), self.depth)
        return cut(found, shape).without_layers(removed)

    def width(
        self,
        config: Any,
        passes: Passes,
        found: Iterable[Mapping[str, Any]],
        target: Shape,
        known: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> Units:
        """All layers at the target's width, from what was seen in each; one at a time. Collective.

        `known` remembers choices of heads between calls with the same `found`.
        """
        hidden = torch.zeros(config.hidden_size, dtype=torch.float64)
        blocks = []
        for number, layer in enumerate(found):
            for path in (QKV, FC1):
                if path in layer:
                    hidden += layer[path].importance(self.batch, self.sequence).cpu()
            blocks.append(self._block(config, passes, number, layer, target, {} if known is None else known))
        kept = keep_best(hidden, target.hidden_size or config.hidden_size)
        return Units(tuple(range(config.num_layers)), kept, tuple(blocks))

    def _block(
        self, config: Any, passes: Passes, layer: int, seen: Mapping[str, Any], target: Shape, known: dict[Any, Any]
    ) -> BlockUnits:
        block = all_of_block(config, layer)
        groups, heads, ffn = block.groups, block.heads, block.ffn
        counts = head_counts(config, layer, target)
        if PROJECTION in seen and counts != (len(groups), config.block(layer).group_heads):
            if (layer, counts) not in known:
                known[layer, counts] = self._attention(config, passes, layer, seen[PROJECTION], target)
            groups, heads = known[layer, counts]
        if FC2 in seen:
            ffn = self._neurons(seen[FC2], target.ffn_hidden_size or len(ffn))
        if not block.experts:
            return BlockUnits(groups, heads, ffn)
        return self._experts(config, replace(block, groups=groups, heads=heads), seen, target)

    def _experts(self, config: Any, block: BlockUnits, seen: Mapping[str, Any], target: Shape) -> BlockUnits:
        """A layer's experts at the target's width, all of them; shared ones that are counted become as wide."""
        width, shared = target.moe_ffn_hidden_size, target.moe_shared_expert_intermediate_size
        if width is not None and config.moe_num_shared_experts:
            shared = min(width, len(block.ffn)) * config.moe_num_shared_experts
        if width is not None and width < len(block.ffn):
            each = (self._neurons(seen[f"{EXPERTS}.{expert}.linear_fc2"], width) for expert in block.experts)
            block = replace(block, ffn=(), expert_ffn=tuple(each))
        if shared is not None:
            block = replace(block, shared_ffn=self._neurons(seen[f"{SHARED}.linear_fc2"], shared))
        return block

    def _neurons(self, seen: Any, count: int) -> tuple[int, ...]:
        """The neurons that stay of those that enter a linear."""
        scores = seen.importance(self.batch, self.sequence)
        return keep_best(scores, min(count, len(scores))) if seen.windows > 0 else tuple(range(count))

    def _attention(
        self, config: Any, passes: Passes, layer: int, seen: Any, target: Shape
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Groups and heads of a layer that stay."""
        if not self._reconstructs:
            return keep_heads(
                config, layer, head_scores(seen.importance(self.batch, self.sequence), config.kv_channels), target
            )
        linear = Reconstruction(passes.weight(layer, PROJECTION), seen.settled, self.refit_damping)
        groups, heads = head_counts(config, layer, target)
        kept = groups_to_keep(config, layer, linear, groups)
        members = {group: heads_of(config, layer, group) for group in kept}
        return kept, heads_to_keep(config, layer, linear, members, heads)


def expert_scores(passes: Passes) -> list[Tensor | None]:
    """Of the experts of each layer, float64 `[experts]`; None for layers without any. Collective."""
    return [None if activity is None else reap_score(activity) for activity in passes.expert_activity()]


def head_scores(channels: Tensor, width: int) -> Tensor:
    """L2 norm of each head's channels: `[heads * width]` -> `[heads]`."""
    return channels.unflatten(0, (-1, width)).square().sum(1).sqrt()


def head_counts(config: Any, layer: int, target: Shape) -> tuple[int, int]:
    """How many query groups of a layer stay, and how many heads in each of them."""
    block = config.block(layer)
    groups = min(target.num_query_groups or block.num_query_groups, block.num_query_groups)
    wanted = target.num_attention_heads
    return groups, min(wanted // groups if wanted else block.group_heads, block.group_heads)


def keep_heads(config: Any, layer: int, scores: Tensor, target: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Groups and heads of a layer that stay, from the heads' scores `[heads]`."""
    block = config.block(layer)
    grouped = scores.unflatten(0, (block.num_query_groups, block.group_heads))
    count, in_each = head_counts(config, layer, target)
    groups = keep_best(grouped.square().sum(1), count)
    heads = [heads_of(config, layer, group)[i] for group in groups for i in keep_best(grouped[group], in_each)]
    return groups, tuple(heads)
