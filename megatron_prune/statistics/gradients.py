"""Gradients of calibration windows' losses by a model's weights, a layer at a time, the same in every layout.

Each window is a sample whose loss is its mean next-token loss. All is computed in float32. A process holds the hidden
states of its windows before every layer: 4 bytes x hidden size x (layers + 1) for each of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_prune.model.prunable import PrunableModel
from megatron_prune.statistics.walk import (
    FINAL_NORM,
    OUTPUT,
    POSITIONS,
    WORDS,
    Head,
    LayerWalk,
    WholeWeights,
    sum_over_ranks,
)


class Gradient:
    """A weight and the gradients of its samples' losses."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.total = torch.zeros_like(self.weight, dtype=torch.float64)
        """Sum over samples."""
        self.squares = torch.zeros_like(self.weight, dtype=torch.float64)
        """Sum over samples of the squared gradient."""

    def add(self, gradient: Tensor) -> None:
        """One sample's."""
        self.total += gradient
        self.squares += gradient.square()

    def add_rows(self, rows: Tensor, gradient: Tensor, already: Tensor | float) -> None:
        """One sample's, which is zero outside these rows; `already` is what `add` was given of it for them."""
        self.total[rows] += gradient
        self.squares[rows] += gradient * (gradient + 2 * already)


Gradients = dict[str, Gradient]
"""By the weights' names, inside their layer or outside all layers."""


def gradients(
    model: PrunableModel, tokens: Tensor | None, progress: Callable[[int], None], outer: bool
) -> Iterator[tuple[int | None, Gradients]]:
    """Layer number and the gradients of its weights by name inside the layer, from the last layer to the first.

    With `outer` those outside all layers too, by their names and with None for the layer: the output layer's and the
    final norm's first, the embeddings' last. A tied embedding is one weight, and comes last with both its gradients.
    Collective.
    """
    weights = _Float32(model)
    walk = LayerWalk(weights, tokens, unit_windows=1)
    states = [list(walk.hidden)]
    for number in range(model.config.num_layers):
        walk.take(number)
        walk.advance()
        states.append(list(walk.hidden))
    ends = _Ends(weights, outer)
    flowing = [ends.head(hidden, window) for hidden, window in zip(states.pop(), walk.tokens, strict=True)]
    if outer:
        yield None, _summed(ends.after_the_layers())
    for number in reversed(range(model.config.num_layers)):
        walk.take(number)
        sums = {name: Gradient(parameter) for name, parameter in walk.module.named_parameters()}
        for i, before in enumerate(states.pop()):
            flowing[i] = _layer(walk, before, flowing[i], sums)
        yield number, _summed(sums)
        progress(1)
    if outer:
        yield None, _summed(ends.before_the_layers(walk.tokens, flowing))


def _summed(found: Gradients) -> Gradients:
    """Those of all ranks' windows."""
    for gradient in found.values():
        sum_over_ranks([gradient.total, gradient.squares])
    return found


def _layer(walk: LayerWalk, before: Tensor, flowing: Tensor, sums: Gradients) -> Tensor:
    """One sample through the loaded layer backward; adds to `sums` and returns the gradient of the layer's input."""
    names, parameters = zip(*walk.module.named_parameters(), strict=True)
    leaf = before.detach().requires_grad_()
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        found = torch.autograd.grad(walk.run(leaf), [leaf, *parameters], flowing)
    for name, gradient in zip(names, found[1:], strict=True):
        sums[name].add(gradient)
    return found[0]


class _Float32(WholeWeights):
    """The model's weights in float32, whatever their own type."""

    def __init__(self, model: PrunableModel) -> None:
        super().__init__(model)
        self.dtype = torch.float32


class _Ends:
    """The weights before the first layer and after the last one, whose gradients are taken only if they are `wanted`.

    A tied embedding's gradient has two parts. Its square needs both, of each sample: the first is kept in the rows of
    the sample's own words, the only ones that have a second.
    """

    def __init__(self, weights: WholeWeights, wanted: bool) -> None:
        self.weights = weights
        self.module = Head(weights)
        self.tied = weights.config.tie_word_embeddings
        output = WORDS if self.tied else OUTPUT
        norm = {f"{FINAL_NORM}.{name}": x for name, x in self.module.norm.named_parameters()}
        self.parameters = {output: self.module.output, **norm} if wanted else {}
        self.sums = {name: Gradient(parameter) for name, parameter in self.parameters.items()}
        self.first_parts: list[Tensor | float] = []

    def head(self, hidden: Tensor, window: Tensor) -> Tensor:
        """One sample from its loss to the hidden states `[s, 1, h]` after the last layer, whose gradient it returns."""
        leaf = hidden.detach().requires_grad_()
        leaves = [leaf, *self.parameters.values()]
        found = [torch.zeros_like(each) for each in leaves]
        with torch.enable_grad():
            for parameter in leaves:
                parameter.requires_grad_(True)
            for loss in self.module.pieces(leaf, window):
                parts = torch.autograd.grad(loss.sum() / (window.numel() - 1), leaves)
                for whole, part in zip(found, parts, strict=True):
                    whole += part
        for name, gradient in zip(self.parameters, found[1:], strict=True):
            self.sums[name].add(gradient)
        if self.tied and self.parameters:
            self.first_parts.append(found[1][window.unique()])
        return found[0]

    def after_the_layers(self) -> Gradients:
        """Those that are complete when the loss has reached the last layer; they are not held any longer."""
        return {name: self.sums.pop(name) for name in list(self.sums) if name != WORDS}

    def before_the_layers(self, windows: Sequence[Tensor], flowing: Sequence[Tensor]) -> Gradients:
        """Those of the embeddings, from the gradients `[s, 1, h]` of their sum."""
        words, positions = self.weights.outer(WORDS), self.weights.outer(POSITIONS)
        assert words is not None
        found = {WORDS: self.sums.pop(WORDS) if self.tied else Gradient(words.float())}
        if positions is not None:
            found[POSITIONS] = Gradient(positions.float())
        for i, (window, gradient) in enumerate(zip(windows, flowing, strict=True)):
            rows, place = window.flatten().unique(return_inverse=True)
            summed = gradient.new_zeros(len(rows), gradient.shape[-1]).index_add_(0, place, gradient.flatten(0, 1))
            summed *= self.weights.config.embedding_scale
            found[WORDS].add_rows(rows, summed, self.first_parts[i] if self.tied else 0.0)
            if positions is not None:
                found[POSITIONS].add_rows(torch.arange(len(window), device=window.device), gradient[:, 0], 0.0)
        return found
