"""What structured methods share: they choose units by passes over the model, and the same fit may follow each of them.

Cutting and the record are the same for all (`decision/`). Helpers here are pure functions of scores.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.target import Budget, Shape, StructuredTarget
from megatron_prune.decision.units import Units, heads_of
from megatron_prune.errors import UserError
from megatron_prune.methods.base import STATISTICS, PruningMethod, hyperparameter
from megatron_prune.ranks import from_leader

if TYPE_CHECKING:
    from megatron_prune.methods.base import Workbench
    from megatron_prune.model.families import ModelConfig
    from megatron_prune.statistics.passes import Passes

REFITS = ("none", "mean", "local", "propagated")


@dataclass(frozen=True)
class Refitted(PruningMethod):
    """A method that removes whole units and corrects what stays by a fit; subclasses choose the units."""

    takes: ClassVar[tuple[str, ...]] = (STATISTICS,)

    refit: str = hyperparameter("local", f"fit linears that lost inputs to their old outputs: {', '.join(REFITS)}")
    refit_damping: float = hyperparameter(0.001, "damping of the fit, as a share of the mean diagonal")
    norm_gain: bool = hyperparameter(True, "correct norms for the size of the channels that they lost")

    def __post_init__(self) -> None:
        if self.refit not in REFITS:
            raise UserError(f"{self.name}: refit {self.refit!r} was given; allowed: {', '.join(REFITS)}")
        if not 0 < self.refit_damping < float("inf"):
            raise UserError(f"{self.name}: refit_damping {self.refit_damping} was given; allowed: above 0")

    def decide(self, work: Workbench, target: Any) -> Units:
        """The units that `choose` keeps, corrected for those that go."""
        units = from_leader(self.choose(work.config, work.passes, target))
        work.compensate(units, self.refit, self.refit_damping, self.norm_gain)
        return units

    def idle(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """Damping is of a fit by least squares."""
        del settings
        return {"refit_damping": f"with --refit {self.refit}"} if self.refit in ("none", "mean") else {}

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The units that stay. Collective; UserError when target or data do not allow it.

        `config` is the `ModelConfig` of the whole model.
        """
        raise NotImplementedError

    def check(self, config: ModelConfig, target: StructuredTarget) -> None:
        """The mean can only be taken by biases."""
        if self.refit == "mean" and not config.linear_bias:
            raise UserError(
                f"{self.name}: refit mean was given and a {config.family} model has no biases to take the mean; "
                "allowed: none, local, propagated"
            )


def allowed_sizes(target: StructuredTarget, sizes: Sequence[str], method: str) -> Shape:
    """The target as a Shape of these sizes only; UserError for anything else."""
    if isinstance(target, Budget) or not set(target.given()) <= set(sizes):
        raise UserError(f"method {method} cannot prune to {target}; it supports {', '.join(sizes)}")
    return target


def keep_best(scores: Tensor, count: int) -> tuple[int, ...]:
    """Numbers, rising, of the `count` highest scores `[n]`; of equal ones the later stay, as with N:M masks."""
    order = torch.sort(scores.double(), stable=True).indices
    return tuple(sorted(order[len(scores) - count :].tolist()))


def lowest(scores: Sequence[float], count: int, protected: Container[int] = ()) -> tuple[int, ...]:
    """Numbers, rising, of the `count` lowest scores that are not protected; of equal ones the first."""
    free = [n for n in range(len(scores)) if n not in protected]
    return tuple(sorted(sorted(free, key=lambda n: (scores[n], n))[:count]))


def removed_layers(config: Any, target: Shape) -> int:
    """How many layers the target removes."""
    return config.num_layers - (target.num_layers or config.num_layers)


def keep_groups(
    config: Any, units: Units, scores: Sequence[Tensor], count: int, layers: Sequence[int], over_all: bool = False
) -> Units:
    """`units` with `count` query groups of highest score in each of these layers, all heads of a group with it."""
    kept = _counted(scores, count, layers, over_all)
    blocks = list(units.blocks)
    for layer, groups in kept.items():
        heads = tuple(head for group in groups for head in heads_of(config, layer, group))
        blocks[layer] = replace(blocks[layer], groups=groups, heads=heads)
    return replace(units, blocks=tuple(blocks))


def keep_neurons(
    units: Units, scores: Sequence[Tensor], count: int, layers: Sequence[int], over_all: bool = False
) -> Units:
    """`units` with `count` MLP neurons of highest score in each of these layers."""
    kept = _counted(scores, count, layers, over_all)
    blocks = [replace(block, ffn=kept.get(layer, block.ffn)) for layer, block in enumerate(units.blocks)]
    return replace(units, blocks=tuple(blocks))


def _counted(scores: Sequence[Tensor], count: int, layers: Sequence[int], over_all: bool) -> dict[int, tuple[int, ...]]:
    """`count` units of each layer, or as many over all of them together and at least one of each."""
    if not over_all:
        return {layer: keep_best(scores[layer], min(count, len(scores[layer]))) for layer in layers}
    first = {layer: keep_best(scores[layer], 1) for layer in layers}
    boosted = [scores[layer].double().index_fill(0, torch.tensor(first[layer]), float("inf")) for layer in layers]
    chosen = set(keep_best(torch.cat(boosted), min(count * len(layers), sum(map(len, boosted)))))
    kept, offset = {}, 0
    for layer, there in zip(layers, boosted, strict=True):
        kept[layer] = tuple(unit for unit in range(len(there)) if offset + unit in chosen)
        offset += len(there)
    return kept
