"""What a budget limits, of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prune.model.cost import cost
from megatron_prune.model.families import ModelConfig

if TYPE_CHECKING:
    from megatron_prune.decision.target import Budget


def budgeted(config: ModelConfig, budget: Budget) -> int:
    """What a budget limits, of a model; a budget of latency has its table by now."""
    return cost(config, budget.measure) if budget.table is None else budget.table.of(config)
