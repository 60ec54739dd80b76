"""Whether a target fits a model, from sizes alone: before anything is loaded, and in `plan`, which loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_prune.decision.cost import budgeted
from megatron_prune.decision.target import NM, Budget, Shape, StructuredTarget, Target
from megatron_prune.decision.tiles import has_room
from megatron_prune.errors import UserError
from megatron_prune.kernels.selection import as_written
from megatron_prune.methods.base import PruningMethod
from megatron_prune.model.families import get_family
from megatron_prune.model.sizes import ModelConfig


def check_experts(config: ModelConfig, method: PruningMethod, target: Target | StructuredTarget) -> None:
    """UserError when a method removes units of a model with experts that it does not know there."""
    if not isinstance(target, Shape | Budget):
        return
    if isinstance(target, Shape) and target.num_moe_experts is not None:
        if not config.num_moe_experts or config.moe_router_topk is None:
            raise UserError(f"target {target}: a {config.family} model has no experts; give other sizes")
        if target.num_moe_experts < config.moe_router_topk:
            raise UserError(
                f"target {target}: each token goes to {config.moe_router_topk} experts; keep at least as many"
            )
    if not config.num_moe_experts:
        return
    sizes = method.sizes_with_experts
    known = method.budget_with_experts if isinstance(target, Budget) else set(target.given()) <= set(sizes)
    if not known or (isinstance(target, Budget) and target.table is not None):
        raise UserError(
            f"method {method.name} cannot prune a model with experts to {target}; it can change "
            f"{', '.join(sizes) or 'nothing of one'}; allowed: num_moe_experts=N by reap and ream, num_layers=N by "
            "shortgpt and shortened_llama, either, widths and budgets (not of latency) by minitron"
        )
    _check_parts(config, target)


def _check_parts(config: ModelConfig, target: Shape | Budget) -> None:
    """UserError for the size of a part that a model with experts does not have, or that may not change there."""
    if isinstance(target, Budget):
        return
    groups, experts = config.moe_router_num_groups or 1, target.num_moe_experts
    if experts is not None and groups > 1 and (experts % groups or experts < 2 * groups):
        raise UserError(
            f"target {target}: the model chooses among {groups} groups of experts, which keep equally many, at least "
            f"2: allowed are multiples of {groups} from {2 * groups} on"
        )
    if target.ffn_hidden_size is not None and config.moe_layers is None:
        raise UserError(
            f"target {target}: every layer of the model has experts; their width is moe_ffn_hidden_size, not "
            "ffn_hidden_size"
        )
    shared = "moe_shared_expert_intermediate_size"
    if target.moe_shared_expert_intermediate_size is not None and config.moe_shared_expert_intermediate_size is None:
        why = "counts its shared experts, which are as wide as the others" if config.shared_width else "has none"
        raise UserError(f"target {target}: the model {why}; allowed: other sizes than {shared}")


def check_target(config: ModelConfig, target: Target | StructuredTarget) -> None:
    """UserError when the model cannot be pruned to the target: a weight's width, or a size that it does not have."""
    if isinstance(target, Shape):
        _check_shape(config, target)
    elif isinstance(target, Budget):
        whole = budgeted(config, target)
        if target.limit >= whole:
            raise UserError(f"target {target}: the whole model has {whole}; give less")
    else:
        _check_widths(config, target)


def _check_shape(config: ModelConfig, target: Shape) -> None:
    for name, wanted in target.given().items():
        if wanted > (getattr(config, name) or 0):
            raise UserError(f"target {name}={wanted}: the model has {getattr(config, name)}; give that or less")
    groups = target.num_query_groups or config.num_query_groups
    heads = target.num_attention_heads
    most = config.num_attention_heads // config.num_query_groups
    if heads is not None and (heads % groups or heads // groups > most):
        allowed = ", ".join(str(groups * count) for count in range(1, most + 1))
        raise UserError(
            f"target num_attention_heads={heads} with {groups} query groups: every group keeps equally many heads, "
            f"allowed: {allowed}"
        )


def _check_widths(config: ModelConfig, target: Target) -> None:
    names, sizes = list[str](), list[int]()
    share, target = target.dense_share, replace(target, dense_share=0.0)
    fits = not isinstance(target, NM) or target.share == 1
    for map in get_family(config.family).weights(config):
        if map.prunable:
            names += map.hf
            sizes += [math.prod(shape) for shape in map.shapes]
            if not all(target.leaves(name) for name in map.hf):
                target.check(map.shape[1], map.megatron)
                fits |= isinstance(target, NM) and any(has_room(shape, target) for shape in map.row_shapes)
    known = set(names)
    for pattern in target.dense:
        alone = replace(target, dense=(pattern,))
        if pattern not in known and not any(alone.leaves(name) for name in names):
            raise UserError(
                f"target {target.title}: no prunable weight has {pattern} in its name; they are such as {names[0]}"
            )
    if all(target.leaves(name) for name in names):
        raise UserError(f"target {target.title} leaves all {len(names)} prunable weights dense; name fewer")
    if share and dense_room(share, sizes) < min(sizes):
        raise UserError(
            f"target {replace(target, dense_share=share)}: the smallest of {len(sizes)} prunable weights is "
            f"{min(sizes) / sum(sizes):.2%} of them all; give at least as much"
        )
    if not fits:
        raise UserError(
            f"target {target}: no weight of the model has a tile as small as what may stay dense; give smaller tiles, "
            "such as tile=8xall, or a smaller share"
        )


def dense_room(share: float, sizes: Sequence[int]) -> int:
    """The most weights that matrices of these sizes may leave dense."""
    return math.floor(as_written(share) * sum(sizes))


def check_shards(
    config: ModelConfig, target: Target | StructuredTarget, tensor: int, expert_tensor: int | None = None
) -> None:
    """UserError when a group of M inputs would lie across `tensor` tensor-parallel ranks, where none could learn it.

    `expert_tensor`: ranks that share an expert; None: as many.
    """
    for map in get_family(config.family).weights(config):
        if map.prunable and map.shard_dim == 1 and isinstance(target, NM):
            own = expert_tensor if map.expert is not None else None
            parts = own or tensor
            width, rest = divmod(map.shape[1], parts)
            if rest or width % target.m:
                raise UserError(
                    f"--{'expert-tensor' if own else 'tensor-model'}-parallel-size {parts} gives each rank "
                    f"{map.shape[1] / parts:g} inputs of {map.megatron}, not a multiple of {target.m} as {target} "
                    "needs: use a smaller size or another pattern"
                )
