"""What pruning each weight costs the loss, from gradients of the model halfway between pruned and dense.

On the straight line from the pruned weights S to the dense ones D the loss falls by the integral of <gradient, D - S>,
a sum over weights, in which each has its own share (integrated gradients, Sundararajan et al. 2017, arXiv:1703.01365,
section 3). The integral is taken by the midpoint rule: one pass of gradients. All shares together are then close to
what the whole pruning costs, which no sum of what single weights cost alone is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import megatron_prune.backend as backend  # isort: skip  (before megatron.core)
import torch
from torch import Tensor

from megatron_prune.model import convert
from megatron_prune.model.families import WeightMap
from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.gradients import layer_gradients
from megatron_prune.statistics.walk import WholeWeights, inner


class Halfway(WholeWeights):
    """Prunable weights halfway between those of a model under its masks and the dense ones, in float32."""

    def __init__(self, model: PrunableModel, dense: Mapping[str, Tensor | None], mask: Callable[[str], Tensor]) -> None:
        """`dense`: what has changed of the weights, as it was, as `PrunableModel.remembering` gives it; `mask`: of
        a Hugging Face weight, as it is stored.
        """
        super().__init__(model)
        self.dtype = torch.float32
        self.dense = dense
        self.mask = mask
        self.ways = dict[str, Way]()
        """What is between the ends for the prunable weights of the last layer, by their names inside it."""

    def layer(self, number: int) -> dict[str, Tensor]:
        """See `Weights`."""
        self.ways.clear()
        found = super().layer(number)
        for map in self.model.maps:
            if map.prunable and map.layer == number:
                whole = found.pop(inner(map.megatron)).float()
                pruned = whole * self._mask(map)
                difference = (self._dense(map).float() if map.megatron in self.dense else whole) - pruned
                found[inner(map.megatron)] = pruned + difference / 2
                self.ways[inner(map.megatron)] = Way(map, difference)
        return found

    def _dense(self, map: WeightMap) -> Tensor:
        shard = self.dense[map.megatron]
        return self.model.gather(map, None if shard is None else shard.to(backend.device()))

    def _mask(self, map: WeightMap) -> Tensor:
        return convert.merge(map, [self.mask(name) for name in map.hf], self.config).to(backend.device())


class Way(NamedTuple):
    """From a weight's pruned end to its dense one."""

    map: WeightMap
    difference: Tensor
    """Whole, float32."""


class _Shares:
    """Of a weight's Hugging Face parts in what each window's loss loses on the way to their dense ends."""

    def __init__(self, weights: Halfway, way: Way, windows: int) -> None:
        self.weights = weights
        self.way = way
        self.found = torch.zeros(windows, len(way.map.hf), dtype=torch.float64, device=way.difference.device)

    def add(self, gradient: Tensor, window: int) -> None:
        """That of one window."""
        parts = convert.split(self.way.map, gradient * self.way.difference, self.weights.config)
        self.found[window] = torch.stack([part.sum(dtype=torch.float64) for part in parts])

    def tensors(self) -> list[Tensor]:
        """What ranks add up: each window is one rank's, so that the sum is the same whoever had it."""
        return [self.found]


def costs(weights: Halfway, tokens: Tensor, progress: Callable[[int], None]) -> dict[str, float]:
    """Hugging Face name of every prunable weight -> how much lower the mean next-token loss of windows
    `[windows, length]` is when it is dense, by the estimate above, in nats. Collective.
    """
    found = dict[str, float]()

    def shares(name: str, _weight: Tensor) -> _Shares | None:
        way = weights.ways.get(name)
        return None if way is None else _Shares(weights, way, len(tokens))

    for _, of_layer in layer_gradients(weights, tokens, progress, shares):
        for each in of_layer.values():
            found |= zip(each.way.map.hf, (-each.found.mean(0)).tolist(), strict=True)
    return found
