"""Models put together from a database of levels, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_prune.decision.cost import budgeted
from megatron_prune.decision.target import Budget
from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.errors import UserError
from megatron_prune.model.blocks import Block, widest
from megatron_prune.model.families import ModelConfig
from megatron_prune.search.fitness import Genome
from megatron_prune.search.levels import ATTENTION, MLP, Level, Levels


def moved(genome: Genome, gene: int, by: int) -> Genome:
    """The genome with one gene `by` levels further down."""
    return (*genome[:gene], genome[gene] + by, *genome[gene + 1 :])


class Space:
    """All models of a database, and what each of them costs."""

    def __init__(self, config: ModelConfig, levels: Levels, budget: Budget) -> None:
        self.config = config
        self.levels = levels
        self.budget = budget
        self.genes = [(kind, layer) for layer in range(config.num_layers) for kind in (ATTENTION, MLP)]
        self.last = [len(levels.sizes[kind][layer]) - 1 for kind, layer in self.genes]
        self.whole = budgeted(config, budget)
        self.largest = widest([config.block(layer) for layer in range(config.num_layers)])
        saved: dict[tuple[Block, str, Level], int] = {}
        self.saves = [
            [self._saves(saved, kind, layer, level) for level in levels.sizes[kind][layer]]
            for kind, layer in self.genes
        ]
        """What each level of each gene saves of that."""
        if self.cost(tuple(self.last)) > budget.limit:
            raise UserError(f"target {budget}: without any attention and MLP {self.cost(tuple(self.last))} are left")

    def _saves(self, known: dict[tuple[Block, str, Level], int], kind: str, layer: int, level: Level) -> int:
        block = self.config.block(layer)
        key = (block, kind, level)
        if key not in known:
            smaller = replace(block, ffn_hidden_size=level.ffn)
            if kind == ATTENTION:
                heads = level.groups * level.heads
                smaller = replace(block, num_attention_heads=heads, num_query_groups=level.groups)
            known[key] = self._cost_with(layer, block) - self._cost_with(layer, smaller)
        return known[key]

    def _cost_with(self, layer: int, block: Block) -> int:
        """Of the model with another layer in this place, and one more of the largest: no half is the last."""
        blocks = [self.config.block(n) for n in range(self.config.num_layers)]
        blocks[layer] = block
        return budgeted(self.config.with_blocks([*blocks, self.largest]), self.budget)

    def cost(self, genome: Genome) -> int:
        """What the budget limits, of the model."""
        return self.whole - sum(saves[level] for saves, level in zip(self.saves, genome, strict=True))

    def fits(self, genome: Genome) -> bool:
        """Within the budget, and with some attention and some MLP left."""
        return self.cost(genome) <= self.budget.limit and self._keeps_both_kinds(genome)

    def _keeps_both_kinds(self, genome: Genome) -> bool:
        kinds = {kind for (kind, _), level, last in zip(self.genes, genome, self.last, strict=True) if level < last}
        return kinds == {ATTENTION, MLP}

    def start(self) -> Genome:
        """All halves equally far down, then the larger levels that fit in, where they lower the error most."""
        steps = max(self.last)
        uniform = (tuple(round(last * step / steps) for last in self.last) for step in range(steps + 1))
        found = next((genome for genome in uniform if self.fits(genome)), None) or self._descent()

        def worst(genome: Genome, genes: list[int]) -> int:
            return max(genes, key=lambda gene: (self._slope(gene, genome[gene] - 1, genome[gene]), -gene))

        return self.fill(found, worst)

    def _descent(self) -> Genome:
        """From the whole model down, always the level that adds the least error for what it saves."""
        genome: Genome = (0,) * len(self.genes)
        while self.cost(genome) > self.budget.limit:
            steps = [
                (self._slope(gene, genome[gene], level), gene, level)
                for gene in range(len(genome))
                for level in range(genome[gene] + 1, self.last[gene] + 1)
                if self.saves[gene][level] > self.saves[gene][genome[gene]]
                and self._keeps_both_kinds(moved(genome, gene, level - genome[gene]))
            ]
            if not steps:
                raise UserError(f"target {self.budget}: with some attention and some MLP no model costs so little")
            _, gene, level = min(steps)
            genome = moved(genome, gene, level - genome[gene])
        return genome

    def _slope(self, gene: int, level: int, other: int) -> float:
        """Error that the other, smaller level adds for each unit of cost that it saves."""
        (kind, layer), saves = self.genes[gene], self.saves[gene]
        added = self.levels.error(kind, layer, other) - self.levels.error(kind, layer, level)
        return added / (saves[other] - saves[level]) if saves[other] > saves[level] else float("inf")

    def fill(self, genome: Genome, choose: Callable[[Genome, list[int]], int]) -> Genome:
        """Take larger levels, the gene that `choose` says each time, as long as one fits in."""
        while True:
            free = [g for g in range(len(genome)) if genome[g] and self.fits(moved(genome, g, -1))]
            if not free:
                return genome
            genome = moved(genome, choose(genome, free), -1)

    def units(self, genome: Genome) -> Units:
        """What stays of the model."""
        whole = Units.all(self.config)
        blocks: list[BlockUnits] = []
        for layer in range(self.config.num_layers):
            blocks.append(self.levels.units(layer, genome[2 * layer], genome[2 * layer + 1]))
        return replace(whole, blocks=tuple(blocks))
