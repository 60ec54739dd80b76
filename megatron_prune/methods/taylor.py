"""Taylor importance: how much the loss changes without some weights w, from the gradients of calibration windows.

With G the sum over windows of the gradient, and F that of its square (the diagonal of the Fisher information, which
stands for the second derivative), both of one loss, the sum over windows:

    vector    |sum w G|, over the weights of a row or column
    element1  sum |w G|
    element2  sum |w^2 F|
    mix       sum |w G - w^2 F / 2|

(LLM-Pruner, Ma et al. 2023, arXiv:2305.11627, section 3.2.) A structure runs through many tensors; which of their rows
and columns are its own is read from the family's table (`WeightMap.symbols`), as it is when structures are cut out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_prune.model import convert
from megatron_prune.model.families import WeightMap, dimensions
from megatron_prune.statistics.gradients import Gradient

FORMS = ("vector", "element1", "element2", "mix")
ROWS = 4096
"""Of a weight are expanded at a time, in the float64 of its gradients: an embedding is large."""


class Importance:
    """Of a model's residual channels, and of every layer's query groups and MLP neurons; float64."""

    def __init__(self, config: Any) -> None:
        self.config = config
        blocks = [config.block(layer) for layer in range(config.num_layers)]
        self.hidden = torch.zeros(config.hidden_size).double()
        self.groups = [torch.zeros(block.num_query_groups).double() for block in blocks]
        self.ffn = [torch.zeros(block.ffn_hidden_size).double() for block in blocks]

    def add(self, map: WeightMap, gradient: Gradient, form: str) -> None:
        """What one tensor adds to the structures that run through it."""
        for symbol, scores in saliences(map, self.config, gradient, form):
            if symbol == "hidden":
                self.hidden += scores
            elif map.layer is not None and symbol == "ffn":
                self.ffn[map.layer] += scores
            elif map.layer is not None:
                self._add_heads(map.layer, symbol, scores)

    def _add_heads(self, layer: int, symbol: str, scores: Tensor) -> None:
        size, groups = dimensions(self.config, layer), len(self.groups[layer])
        parts = {"qkv": ("query", "key_value", "key_value")}.get(symbol, (symbol,))
        for part in scores.split([size[name] for name in parts]):
            self.groups[layer] += part.unflatten(0, (groups, -1)).sum(1)

    @property
    def layers(self) -> list[float]:
        """Of each layer: all its groups and neurons."""
        return [float(groups.sum() + ffn.sum()) for groups, ffn in zip(self.groups, self.ffn, strict=True)]


STRUCTURES = ("hidden", "ffn", "query", "key_value", "qkv")
"""Symbolic sizes that count structures; those of the vocabulary, of positions and inside a head do not."""


def saliences(map: WeightMap, config: Any, gradient: Gradient, form: str) -> Iterator[tuple[str, Tensor]]:
    """Of every Hugging Face tensor in a Megatron one, and each of its dimensions: what it counts, and its scores."""
    parts = [convert.split(map, x, config) for x in (gradient.weight, gradient.total, gradient.squares)]
    for symbols, *stored in zip(map.symbols, *parts, strict=True):
        weight, total, squares = (x.t() if map.transposed else x for x in stored)
        for dim, symbol in enumerate(symbols):
            if symbol in STRUCTURES:
                yield symbol, salience(weight, total, squares, form, dim).cpu()


def salience(weight: Tensor, total: Tensor, squares: Tensor, form: str, dim: int) -> Tensor:
    """Importance, by one of `FORMS`, of each row (dim 0) or column (dim 1) of a weight `[out, in]`, or number of a
    vector, float64; `total` is G, `squares` F.
    """
    sums = []
    for w, g, f in zip(weight.split(ROWS), total.split(ROWS), squares.split(ROWS), strict=True):
        change = expansion(w, g, f, form)
        change = change if form == "vector" else change.abs()
        sums.append(change.sum(0) if dim else change.reshape(len(change), -1).sum(1))
    return (torch.stack(sums).sum(0) if dim else torch.cat(sums)).abs()


def expansion(weight: Tensor, total: Tensor, squares: Tensor, form: str) -> Tensor:
    """Change of the loss by each weight, the sign left out where `FORMS` has none."""
    first, second = weight * total, weight.square() * squares
    return {"element2": second, "mix": first - 0.5 * second}.get(form, first)
