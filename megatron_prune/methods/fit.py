"""Whether a target fits a model, from sizes alone: before anything is loaded, and in `plan`, which loads nothing."""

from __future__ import annotations

from megatron_prune.errors import UserError
from megatron_prune.methods.target import NM, Target
from megatron_prune.model.families import get_family
from megatron_prune.model.family import ModelConfig


def check_target(config: ModelConfig, target: Target) -> None:
    """UserError when a prunable weight's width does not allow the target."""
    for map in get_family(config.family).weights(config):
        if map.prunable:
            target.check(map.shape[1], map.megatron)


def check_shards(config: ModelConfig, target: Target, tensor: int) -> None:
    """UserError when a group of M inputs would lie across `tensor` tensor-parallel ranks, where none could learn it."""
    for map in get_family(config.family).weights(config):
        if map.prunable and map.shard_dim == 1 and isinstance(target, NM):
            width, rest = divmod(map.shape[1], tensor)
            if rest or width % target.m:
                raise UserError(
                    f"--tensor-model-parallel-size {tensor} gives each rank {map.shape[1] / tensor:g} inputs of "
                    f"{map.megatron}, not a multiple of {target.m} as {target} needs: use a smaller size or another "
                    "pattern"
                )
