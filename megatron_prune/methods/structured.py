"""What structured methods share: they choose units, and the same compensation may follow each of them.

A method sees the model through `Passes` and answers with the units that stay; cutting, compensation and the record
are the same for all (`apply/`). Helpers here are pure functions of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.target import MEASURES, Budget, Shape, StructuredTarget, Target
from megatron_prune.decision.units import Units, heads_of
from megatron_prune.errors import UserError
from megatron_prune.methods.base import PruningMethod, hyperparameter

if TYPE_CHECKING:
    from megatron_prune.model.prunable import PrunableModel
    from megatron_prune.statistics.passes import Passes
    from megatron_prune.training.shearing import ShearingRunner
    from megatron_prune.training.stopping import StopRequest

REFITS = ("none", "mean", "local", "propagated")


@dataclass(frozen=True)
class StructuredMethod(PruningMethod):
    """Base of methods that remove whole units; subclass as a frozen dataclass, as other methods are."""

    structured: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = MEASURES
    """What its budgets may limit."""
    keeps_statistics: ClassVar[bool] = True
    """Whether what it measures can be kept and serve another target."""
    searches: ClassVar[bool] = False
    """Whether it takes long and goes on after a kill: `run` (`train` where `learned`) instead of `choose`."""

    refit: str = hyperparameter("local", f"fit linears that lost inputs to their old outputs: {', '.join(REFITS)}")
    refit_damping: float = hyperparameter(0.001, "damping of the fit, as a share of the mean diagonal")
    norm_gain: bool = hyperparameter(True, "correct norms for the size of the channels that they lost")

    def __post_init__(self) -> None:
        if self.refit not in REFITS:
            raise UserError(f"{self.name}: refit {self.refit!r} was given; allowed: {', '.join(REFITS)}")
        if not 0 < self.refit_damping < float("inf"):
            raise UserError(f"{self.name}: refit_damping {self.refit_damping} was given; allowed: above 0")

    def accept(self, target: Target | StructuredTarget) -> None:
        """As the base class; of budgets, only those that limit what the method knows."""
        super().accept(target)
        if isinstance(target, Budget) and target.measure not in self.measures:
            raise UserError(
                f"method {self.name} cannot prune to {target}; its budgets may limit {', '.join(self.measures)}"
            )

    def compensate(
        self, model: PrunableModel, units: Units, tokens: Tensor | None, progress: Callable[[int], None]
    ) -> bool:
        """Correct what stays for what goes, in place; whether anything changed. Collective."""
        from megatron_prune.statistics.compensation import Compensation

        if self.refit == "mean" and not model.config.linear_bias:
            raise UserError(
                f"{self.name}: refit mean was given and a {model.config.family} model has no biases to take the mean; "
                "allowed: none, local, propagated"
            )
        if tokens is None or not units.thins(model.config):
            return False
        return Compensation(model, units, tokens, self.refit, self.refit_damping, self.norm_gain).run(progress)

    def choose(self, config: Any, passes: Passes, target: StructuredTarget) -> Units:
        """The units that stay. Collective, and the same on every rank; UserError when target or data do not allow it.

        `config` is the `ModelConfig` of the whole model.
        """
        raise NotImplementedError

    def run(self, model: PrunableModel, passes: Passes, target: Any, folder: Path, stop: StopRequest) -> Units:
        """The units that stay, whose weights are then in the model. Collective; raises Stopped when asked to end.

        What an earlier process left in the run's `folder` is used.
        """
        raise NotImplementedError

    def check(self, config: Any, target: StructuredTarget) -> None:
        """UserError for a model or target that the method cannot take; called before a method that trains begins."""

    def train(self, runner: ShearingRunner, target: Any) -> Units:
        """As `run`, by the steps of a training session. Collective; raises Stopped when asked to end."""
        raise NotImplementedError


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
    config: Any, units: Units, scores: Sequence[Tensor], target: Shape, layers: Sequence[int], over_all: bool = False
) -> Units:
    """`units` with the query groups of highest score in these layers, all heads of a group with it."""
    kept = _counted(scores, target.num_query_groups or 0, layers, over_all)
    blocks = list(units.blocks)
    for layer, groups in kept.items():
        heads = tuple(head for group in groups for head in heads_of(config, layer, group))
        blocks[layer] = replace(blocks[layer], groups=groups, heads=heads)
    return replace(units, blocks=tuple(blocks))


def keep_neurons(
    units: Units, scores: Sequence[Tensor], target: Shape, layers: Sequence[int], over_all: bool = False
) -> Units:
    """`units` with the MLP neurons of highest score in these layers."""
    kept = _counted(scores, target.ffn_hidden_size or 0, layers, over_all)
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
