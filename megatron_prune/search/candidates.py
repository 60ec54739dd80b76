"""Candidates of a search: their weights put into the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_prune.search.levels import KINDS

if TYPE_CHECKING:
    from megatron_prune.model.prunable import PrunableModel


def put(model: PrunableModel, levels: Any, genome: Sequence[int]) -> None:
    """Give the model's linears the weights of these levels, zero where inputs are gone. Collective."""
    for layer in range(model.config.num_layers):
        for gene, (kind, path) in enumerate(KINDS.items()):
            map = model.by_name.get(f"decoder.layers.{layer}.{path}.weight")
            level = genome[2 * layer + gene]
            if map is not None and level:
                model.assign(map, levels.weight(kind, layer, level, model.whole(map)))
    silence(model, levels, genome)


def silence(model: PrunableModel, levels: Any, genome: Sequence[int]) -> None:
    """Zero the biases behind halves of layers that these levels leave out."""
    for gene, level in enumerate(genome):
        layer, (kind, path) = gene // len(KINDS), list(KINDS.items())[gene % len(KINDS)]
        bias = model.by_name.get(f"decoder.layers.{layer}.{path}.bias")
        if bias is not None and levels.gone(kind, layer, level):
            model.assign(bias, torch.zeros(bias.shape))
