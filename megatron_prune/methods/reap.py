"""REAP (Lasby et al. 2025, arXiv:2510.13999): experts that add little for the tokens that the router sends to them go.

The score of expert j of a layer is the mean, over the calibration tokens whose chosen experts have j among them, of its
gate times the Euclidean norm of what it gives (section 4). Gates are the model's own, as it uses them: divided by their
sum over the chosen experts in models that do so. The authors' program takes a softmax and its highest values for every
model, also for those that choose otherwise. An expert without tokens scores 0.

In every layer with experts equally many of the lowest go, with their rows of the router; a token still goes to as many
of those that stay. Where a model chooses among groups of experts, each group keeps equally many, and stays a group; the
paper has no such model. Nothing is trained and no other weight changes. Beside the paper's score there are those that
it compares with: how often an expert is chosen, the sum of the norms of what it gives (`ean`), and chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.cost import budgeted
from megatron_prune.decision.target import Budget, Shape
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import PruningMethod, hyperparameter, register
from megatron_prune.methods.structured import keep_best
from megatron_prune.ranks import from_leader

if TYPE_CHECKING:
    from megatron_prune.methods.base import Workbench
    from megatron_prune.model.sizes import ModelConfig
    from megatron_prune.statistics.experts import ExpertActivity

SCORES = ("reap", "frequency", "ean", "random")


def reap_score(activity: ExpertActivity) -> Tensor:
    """Mean of gate times norm over the tokens of each expert, float64 `[experts]` (equation 9); 0 without tokens."""
    return activity.gated_norms / activity.tokens.clamp(min=1.0)


def best_experts(score: Tensor, count: int, groups: int | None) -> tuple[int, ...]:
    """Numbers, rising, of the `count` experts of highest score `[experts]`, as many of each of `groups` groups."""
    size = len(score) // (groups or 1)
    parts = [keep_best(each, count // (groups or 1)) for each in score.split(size)]
    return tuple(part * size + expert for part, kept in enumerate(parts) for expert in kept)


def keep_experts(units: Units, scores: Sequence[Tensor | None], count: int, groups: int | None) -> Units:
    """`units`, which still have all of them, with the `count` experts of highest score `[experts]` in every layer.

    As many of each of the `groups` that the model chooses among.
    """
    blocks = list(units.blocks)
    for place, (layer, block) in enumerate(zip(units.layers, units.blocks, strict=True)):
        score = scores[layer]
        if score is not None:
            kept = best_experts(score, count, groups)
            neurons = tuple(block.expert_ffn[expert] for expert in kept) if block.expert_ffn else ()
            blocks[place] = replace(block, experts=kept, expert_ffn=neurons)
    return replace(units, blocks=tuple(blocks))


@dataclass(frozen=True)
class FewerExperts(PruningMethod):
    """A method that leaves every layer with fewer experts; subclasses decide which."""

    targets: ClassVar[Mapping[type, str]] = {
        Shape: "fewer experts in every layer that has any: num_moe_experts=N",
        Budget: "as many experts as a budget has room for: parameters",
    }
    sizes_with_experts: ClassVar[tuple[str, ...]] = ("num_moe_experts",)
    budget_with_experts: ClassVar[bool] = True

    def check(self, config: Any, target: Shape | Budget) -> None:
        """UserError for a model without experts, other sizes, and a budget that no number of them meets."""
        wanted = target.measure if isinstance(target, Budget) else ",".join(target.given())
        if not config.num_moe_experts or wanted not in ("num_moe_experts", "parameters"):
            raise UserError(
                f"method {self.name} cannot prune a {config.family} model to {target}; it removes experts: give a "
                "model that has some and num_moe_experts=N or parameters=N"
            )
        if isinstance(target, Budget):
            self.count(config, target)

    @staticmethod
    def count(config: ModelConfig, target: Shape | Budget) -> int:
        """How many experts stay in a layer; UserError when a budget leaves fewer than a token goes to."""
        if isinstance(target, Shape):
            assert target.num_moe_experts is not None
            return target.num_moe_experts
        most, least = config.num_moe_experts or 1, config.moe_router_topk or 1
        groups = config.moe_router_num_groups or 1
        least = max(least, 2 * groups) if groups > 1 else least
        for count in range(most, least - 1, -groups):
            if budgeted(replace(config, num_moe_experts=count), target) <= target.limit:
                return count
        smallest = budgeted(replace(config, num_moe_experts=least), target)
        raise UserError(
            f"target {target}: with {least} experts in a layer, which routing needs, {smallest} are left; give more, "
            "or prune to fewer layers first"
        )


@register("reap")
@dataclass(frozen=True)
class REAP(FewerExperts):
    """Remove the experts whose gated outputs are smallest on average over the tokens that they get."""

    paper: ClassVar[str] = "Lasby et al. 2025, arXiv:2510.13999"

    score: str = hyperparameter("reap", f"of an expert: {', '.join(SCORES)}")
    random_seed: int = hyperparameter(0, "of the score `random`")

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"reap: score {self.score!r} was given; allowed: {', '.join(SCORES)}")

    def idle(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """A seed is of chance."""
        del settings
        return {} if self.score == "random" else {"random_seed": f"with --score {self.score}"}

    def decide(self, work: Workbench, target: Shape | Budget) -> Units:
        """The experts of highest score in every layer; all else stays. Collective."""
        found = work.passes.expert_activity()
        scores = [None if each is None else self._scores(each, layer) for layer, each in enumerate(found)]
        count, groups = self.count(work.config, target), work.config.moe_router_num_groups
        return from_leader(keep_experts(Units.all(work.config), scores, count, groups))

    def _scores(self, activity: ExpertActivity, layer: int) -> Tensor:
        if self.score == "reap":
            return reap_score(activity)
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.random_seed * 65536 + layer)
            return torch.rand(len(activity.tokens), generator=generator, dtype=torch.float64)
        return activity.tokens if self.score == "frequency" else activity.norms
