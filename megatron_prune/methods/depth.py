"""Which layers of a model to remove: by block influence, by the loss without them, or the best of several answers.

Removing a layer changes what the others see, so sets that are made of single scores are only candidates here: their
losses are measured together, in one pass over the weights (`Passes.losses_without`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_prune.methods.structured import lowest
from megatron_prune.statistics.channels import RESIDUAL, BlockInfluence

if TYPE_CHECKING:
    from megatron_prune.statistics.passes import Passes

CRITERIA = ("block_influence", "contiguous", "single", "combined")
Layers = frozenset[int]
EXCHANGES, ROUNDS = 32, 4


def layers_to_remove(passes: Passes, count: int, criterion: str, protected: frozenset[int] = frozenset()) -> Layers:
    """`count` layers of the model, none of the protected ones, by a criterion of `CRITERIA`. Collective.

    block_influence  the lowest 1 - cos(input, output) (ShortGPT, arXiv:2403.03853)
    contiguous       the neighbours without which the loss is lowest (Minitron, arXiv:2407.14679, section 2.2)
    single           those without which, one by one, the loss is lowest (Shortened LLaMA, arXiv:2402.02834)
    combined         of these three sets the one without which the loss is lowest, then exchanges of one of its layers
                     for another as long as they lower it
    """
    total = passes.model.config.num_layers
    if count == 0:
        return frozenset()
    if criterion == "block_influence":
        return frozenset(lowest(block_influence(passes), count, protected))
    windows = [frozenset(range(first, first + count)) for first in range(total - count + 1)]
    allowed = [window for window in windows if not window & protected]
    singles = [frozenset([layer]) for layer in range(total)]
    if criterion == "contiguous":
        return best(allowed, passes.losses_without(allowed))
    if criterion == "single":
        return frozenset(lowest(passes.losses_without(singles), count, protected))
    losses = passes.losses_without([*singles, *allowed])
    candidates = {
        frozenset(lowest(losses[:total], count, protected)),
        frozenset(lowest(block_influence(passes), count, protected)),
    }
    if allowed:
        candidates.add(best(allowed, losses[total:]))
    ordered = sorted(candidates, key=sorted)
    found = passes.losses_without(ordered)
    chosen = best(ordered, found)
    return exchanged(passes, chosen, min(found), losses[:total], protected)


def exchanged(
    passes: Passes, chosen: Layers, loss: float, singles: Sequence[float], protected: frozenset[int]
) -> Layers:
    """Exchange a layer of the set for another as long as the loss without the set falls.

    Tried are the exchanges that look best by the losses without single layers, `EXCHANGES` of them at a time.
    """
    for _ in range(ROUNDS):
        others = [layer for layer in range(len(singles)) if layer not in chosen and layer not in protected]
        pairs = sorted((singles[new] - singles[old], old, new) for old in chosen for new in others)[:EXCHANGES]
        sets = [chosen - {old} | {new} for _, old, new in pairs]
        losses = passes.losses_without(sets) if sets else [loss]
        if min(losses) >= loss:
            return chosen
        chosen, loss = best(sets, losses), min(losses)
    return chosen


def block_influence(passes: Passes) -> list[float]:
    """Of every layer, from one pass over the calibration windows. Collective."""
    return [found[RESIDUAL].value() for found in passes.observe({RESIDUAL: BlockInfluence})]


def best(sets: list[Layers], losses: list[float]) -> Layers:
    """The set of lowest loss, the first of equal ones."""
    return min(zip(losses, range(len(sets)), sets, strict=True))[2]
