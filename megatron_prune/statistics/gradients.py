"""Gradients of calibration windows' losses by a model's weights, a layer at a time, the same in every layout.

Each window is a sample whose loss is its mean next-token loss. All is computed in float32. A process holds the hidden
states of its windows before every layer: 4 bytes x hidden size x (layers + 1) for each of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

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


class Summed(Protocol):
    """What is made of a weight's gradients, one sample's after the other."""

    def add(self, gradient: Tensor, window: int) -> None:
        """One sample's, of that number."""

    def tensors(self) -> list[Tensor]:
        """What ranks add up."""


S = TypeVar("S", bound=Summed)


class Gradient:
    """A weight and the gradients of its samples' losses."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.total = torch.zeros_like(self.weight, dtype=torch.float64)
        """Sum over samples."""
        self.squares = torch.zeros_like(self.weight, dtype=torch.float64)
        """Sum over samples of the squared gradient."""

    def add(self, gradient: Tensor, window: int = 0) -> None:
        """One sample's."""
        self.total += gradient
        self.squares += gradient.square()

    def tensors(self) -> list[Tensor]:
        """What ranks add up."""
        return [self.total, self.squares]

    def add_rows(self, rows: Tensor, gradient: Tensor, already: Tensor | float) -> None:
        """One sample's, which is zero outside these rows; `already` is what `add` was given of it for them."""
        self.total[rows] += gradient
        self.squares[rows] += gradient * (gradient + 2 * already)


Gradients = dict[str, Gradient]
"""By the weights' names, inside their layer or outside all layers."""


def gradients(
    weights: WholeWeights, tokens: Tensor | None, progress: Callable[[int], None], outer: bool
) -> Iterator[tuple[int | None, Gradients]]:
    """Layer number and the gradients of its weights by name inside the layer, from the last layer to the first.

    With `outer` those outside all layers too, by their names and with None for the layer: the output layer's and the
    final norm's first, the embeddings' last. A tied embedding is one weight, and comes last with both its gradients.
    `weights` are in float32. Collective.
    """
    passes = _Passes(weights, tokens, outer)
    if outer:
        yield None, _summed(passes.ends.after_the_layers())
    yield from passes.layers(lambda _name, weight: Gradient(weight), progress)
    if outer:
        yield None, _summed(passes.ends.before_the_layers(passes.walk.tokens, passes.flowing))


def layer_gradients(
    weights: WholeWeights, tokens: Tensor, progress: Callable[[int], None], begin: Callable[[str, Tensor], S | None]
) -> Iterator[tuple[int, dict[str, S]]]:
    """As `gradients` of the layers alone, added up in what `begin` makes of a name inside the layer and its weight;
    None: not asked for.
    """
    return _Passes(weights, tokens, outer=False).layers(begin, progress)


class _Passes:
    """All windows forward, the hidden states kept, and then backward as far as what has been asked for."""

    def __init__(self, weights: WholeWeights, tokens: Tensor | None, outer: bool) -> None:
        self.walk = walk = LayerWalk(weights, tokens, unit_windows=1)
        self.states = [list(walk.hidden)]
        for number in range(weights.config.num_layers):
            walk.take(number)
            walk.advance()
            self.states.append(list(walk.hidden))
        self.ends = _Ends(weights, outer)
        last = zip(self.states.pop(), walk.tokens, strict=True)
        self.flowing = [self.ends.head(hidden, window) for hidden, window in last]
        """Of each window the gradient of what the next layer gives."""

    def layers(
        self, begin: Callable[[str, Tensor], S | None], progress: Callable[[int], None]
    ) -> Iterator[tuple[int, dict[str, S]]]:
        """Backward through all layers, the last first."""
        for number in reversed(range(self.walk.weights.config.num_layers)):
            self.walk.take(number)
            begun = ((name, begin(name, weight)) for name, weight in self.walk.module.named_parameters())
            sums = {name: each for name, each in begun if each is not None}
            for i, before in enumerate(self.states.pop()):
                self.flowing[i] = _layer(self.walk, before, self.flowing[i], sums, self.walk.units[i].start)
            yield number, _summed(sums)
            progress(1)


def _summed(found: dict[str, S]) -> dict[str, S]:
    """Those of all ranks' windows."""
    for each in found.values():
        sum_over_ranks(each.tensors())
    return found


def _layer(walk: LayerWalk, before: Tensor, flowing: Tensor, sums: Mapping[str, Summed], window: int) -> Tensor:
    """One sample through the loaded layer backward; adds to `sums` and returns the gradient of the layer's input."""
    own = dict(walk.module.named_parameters())
    parameters = [own[name] for name in sums]
    leaf = before.detach().requires_grad_()
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        found = torch.autograd.grad(walk.run(leaf), [leaf, *parameters], flowing)
    for each, gradient in zip(sums.values(), found[1:], strict=True):
        each.add(gradient, window)
    return found[0]


class Float32(WholeWeights):
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
