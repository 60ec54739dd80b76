"""Which layers of a model to remove: by block influence, by the loss without them, or the best of several answers.

Removing a layer changes what the others see, so sets that are made of single scores are only candidates here: their
losses are measured together, in one pass over the weights (`Passes.losses_without`). Several answers are compared on
windows of the text that none of them was found on, and a difference counts when it is beyond its error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_prune.methods.structured import lowest
from megatron_prune.search.held_out import split
from megatron_prune.search.racing import better
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
    combined         these three sets from three quarters of the windows; of them the one without which the loss is
                     lowest on the last quarter, then exchanges of one of its layers for another as long as they lower
                     that by more than its error
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
    finding, judging = split(passes)
    losses = finding.losses_without([*singles, *allowed])
    candidates = {
        frozenset(lowest(losses[:total], count, protected)),
        frozenset(lowest(block_influence(finding), count, protected)),
    }
    if allowed:
        candidates.add(best(allowed, losses[total:]))
    ordered = sorted(candidates, key=sorted)
    chosen = best(ordered, judging.losses_without(ordered))
    return exchanged(finding, judging, chosen, losses[:total], protected)


def exchanged(
    finding: Passes, judging: Passes, chosen: Layers, singles: Sequence[float], protected: frozenset[int]
) -> Layers:
    """Exchange a layer of the set for another as long as the loss without the set falls.

    Tried are the exchanges that look best by the losses without single layers, `EXCHANGES` of them at a time. The best
    of them by the windows of `finding` is made when those of `judging` confirm it, paired and beyond the error.
    """
    for _ in range(ROUNDS):
        others = [layer for layer in range(len(singles)) if layer not in chosen and layer not in protected]
        pairs = sorted((singles[new] - singles[old], old, new) for old in chosen for new in others)[:EXCHANGES]
        if not pairs:
            return chosen
        sets = [chosen - {old} | {new} for _, old, new in pairs]
        other = best(sets, finding.losses_without(sets))
        if not better(*judging.window_losses_without([other, chosen])):
            return chosen
        chosen = other
    return chosen


def block_influence(passes: Passes) -> list[float]:
    """Of every layer, from one pass over the calibration windows. Collective."""
    return [found[RESIDUAL].value() for found in passes.observe({RESIDUAL: BlockInfluence})]


def best(sets: list[Layers], losses: list[float]) -> Layers:
    """The set of lowest loss, the first of equal ones."""
    return min(zip(losses, range(len(sets)), sets, strict=True))[2]
