"""REAP (Lasby et al. 2025, arXiv:2510.13999): experts that add little for the tokens that the router sends to them go.

The score of expert j of a layer is the mean, over the calibration tokens whose chosen experts have j among them, of its
gate times the Euclidean norm of what it gives (section 4). Gates are the model's own, as it uses them: divided by their
sum over the chosen experts in models that do so. The authors' program takes a softmax and its highest values for every
model, also for those that choose otherwise. An expert without tokens scores 0.

In every layer with experts equally many of the lowest go, with their rows of the router; a token still goes to as many
of those that stay. Nothing is trained and no other weight changes. Beside the paper's score there are those that it
compares with: how often an expert is chosen, the sum of the norms of what it gives (`ean`), and chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from megatron_prune.decision.target import Shape
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import PruningMethod, hyperparameter, register
from megatron_prune.methods.structured import keep_best
from megatron_prune.ranks import from_leader

if TYPE_CHECKING:
    from megatron_prune.methods.base import Workbench
    from megatron_prune.statistics.experts import ExpertActivity

SCORES = ("reap", "frequency", "ean", "random")


def reap_score(activity: ExpertActivity) -> Tensor:
    """Mean of gate times norm over the tokens of each expert, float64 `[experts]` (equation 9); 0 without tokens."""
    return activity.gated_norms / activity.tokens.clamp(min=1.0)


@register("reap")
@dataclass(frozen=True)
class REAP(PruningMethod):
    """Remove the experts whose gated outputs are smallest on average over the tokens that they get."""

    paper: ClassVar[str] = "Lasby et al. 2025, arXiv:2510.13999"
    targets: ClassVar[Mapping[type, str]] = {Shape: "fewer experts in every layer that has any: num_moe_experts=N"}
    sizes_with_experts: ClassVar[tuple[str, ...]] = ("num_moe_experts",)

    score: str = hyperparameter("reap", f"of an expert: {', '.join(SCORES)}")
    random_seed: int = hyperparameter(0, "of the score `random`")

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"reap: score {self.score!r} was given; allowed: {', '.join(SCORES)}")

    def idle(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """A seed is of chance."""
        del settings
        return {} if self.score == "random" else {"random_seed": f"with --score {self.score}"}

    def check(self, config: Any, target: Shape) -> None:
        """UserError for a model without experts, and other sizes."""
        if not config.num_moe_experts or set(target.given()) != {"num_moe_experts"}:
            raise UserError(
                f"method reap cannot prune a {config.family} model to {target}; it removes experts: give a model that "
                "has some and num_moe_experts=N"
            )
        if (config.moe_router_num_groups or 1) > 1:
            raise UserError(
                f"method reap: the model chooses among {config.moe_router_num_groups} groups of experts, and which are "
                "neighbours would change: allowed are models without groups"
            )

    def decide(self, work: Workbench, target: Shape) -> Units:
        """The experts of highest score in every layer; all else stays. Collective."""
        assert target.num_moe_experts is not None
        units = Units.all(work.config)
        blocks = list(units.blocks)
        for layer, activity in enumerate(work.passes.expert_activity()):
            if activity is not None:
                scores = self._scores(activity, layer)
                blocks[layer] = replace(blocks[layer], experts=keep_best(scores, target.num_moe_experts))
        return from_leader(replace(units, blocks=tuple(blocks)))

    def _scores(self, activity: ExpertActivity, layer: int) -> Tensor:
        if self.score == "reap":
            return reap_score(activity)
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.random_seed * 65536 + layer)
            return torch.rand(len(activity.tokens), generator=generator, dtype=torch.float64)
        return activity.tokens if self.score == "frequency" else activity.norms
