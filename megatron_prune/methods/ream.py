"""REAM (Jha et al. 2026, arXiv:2604.04356): experts are joined to fewer instead of removed.

Those of highest REAP score stay, and each of the others is averaged into the one of them that it is most like, neuron
by neuron (`statistics/merging.py`). From the highest score on, a centre takes as many as a group has room for, so that
most stay what they were. Layer by layer, windows going through the layers that are joined already. In the authors'
program the likeness of logits is one over one plus a distance, that of neurons' weights is taken after a projection to
64 dimensions, and the likeness of neurons' activations from a sample of tokens; here they are a cosine, all weights and
all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from megatron_prune.decision.target import Budget, Shape
from megatron_prune.decision.units import Units
from megatron_prune.errors import UserError
from megatron_prune.methods.base import hyperparameter, register
from megatron_prune.methods.reap import FewerExperts, best_experts, reap_score

if TYPE_CHECKING:
    from megatron_prune.methods.base import Workbench
    from megatron_prune.model.sizes import ModelConfig


@register("ream")
@dataclass(frozen=True)
class REAM(FewerExperts):
    """Average experts into those that they are most like, neuron by neuron."""

    paper: ClassVar[str] = "Jha et al. 2026, arXiv:2604.04356"

    group_size: int = hyperparameter(16, "most experts that become one")

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UserError(f"ream: group_size {self.group_size} was given; allowed: 2 or more")

    def check(self, config: ModelConfig, target: Shape | Budget) -> None:
        """UserError too where the groups have no room for all experts."""
        super().check(config, target)
        count, experts = self.count(config, target), config.num_moe_experts or 0
        if count * self.group_size < experts:
            raise UserError(
                f"ream: {count} groups of at most {self.group_size} have no room for {experts} experts; give "
                f"--group-size {-(-experts // count)} or more, or keep more experts"
            )

    def decide(self, work: Workbench, target: Shape | Budget) -> Units:
        """The centres of groups, the others averaged into them. Collective."""
        keep = partial(best_experts, groups=work.config.moe_router_num_groups)
        return work.merge_experts(self.count(work.config, target), self.group_size, reap_score, keep)
