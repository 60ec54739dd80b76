"""Search over models put together from a database of levels, within a budget.

Evolution with one parent (DarwinLM, Tang et al. 2025, arXiv:2502.07780, section 3.2): children differ from it by a few
switches, one half of a layer a level smaller and another a level larger; several rounds of selection on more and more
tokens leave one of them, and the parent itself stands in the last round. Generic libraries of evolutionary algorithms
would bring populations, crossover and real-valued genes, none of which this has, and not the growing rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_prune.decision.cost import budgeted
from megatron_prune.decision.target import Budget
from megatron_prune.decision.units import BlockUnits, Units
from megatron_prune.errors import UserError
from megatron_prune.model.blocks import Block, widest
from megatron_prune.model.families import ModelConfig
from megatron_prune.search.fitness import Genome
from megatron_prune.search.levels import ATTENTION, MLP, Level, Levels

RETRIES = 100


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
        larger = replace(self.config, blocks=None).with_blocks([*blocks, self.largest])
        return budgeted(larger, self.budget)

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
                and self._keeps_both_kinds(_moved(genome, gene, level - genome[gene]))
            ]
            if not steps:
                raise UserError(f"target {self.budget}: with some attention and some MLP no model costs so little")
            _, gene, level = min(steps)
            genome = _moved(genome, gene, level - genome[gene])
        return genome

    def _slope(self, gene: int, level: int, other: int) -> float:
        """Error that the other, smaller level adds for each unit of cost that it saves."""
        (kind, layer), saves = self.genes[gene], self.saves[gene]
        added = self.levels.error(kind, layer, other) - self.levels.error(kind, layer, level)
        return added / (saves[other] - saves[level]) if saves[other] > saves[level] else float("inf")

    def fill(self, genome: Genome, choose: Callable[[Genome, list[int]], int]) -> Genome:
        """Take larger levels, the gene that `choose` says each time, as long as one fits in."""
        while True:
            free = [g for g in range(len(genome)) if genome[g] and self.fits(_moved(genome, g, -1))]
            if not free:
                return genome
            genome = _moved(genome, choose(genome, free), -1)

    def mutate(self, parent: Genome, rng: random.Random, most: int, trade: bool) -> Genome:
        """Another genome, up to `most` switches away; without `trade` attention and MLP keep their shares."""
        for _ in range(RETRIES):
            child = parent
            for _ in range(min(rng.randint(1, most), rng.randint(1, most))):
                child = self._switched(child, rng, trade)
            if trade:
                while self.cost(child) > self.budget.limit:
                    child = _moved(child, rng.choice([g for g in range(len(child)) if child[g] < self.last[g]]), 1)
                child = self.fill(child, lambda _genome, genes: rng.choice(genes))
            if child != parent and self.fits(child):
                return child
        return parent

    def _switched(self, genome: Genome, rng: random.Random, trade: bool) -> Genome:
        """One half a level smaller, another a level larger."""
        gene = rng.choice([g for g in range(len(genome)) if genome[g] < self.last[g]])
        larger = [g for g in range(len(genome)) if genome[g] and g != gene and (trade or g % 2 == gene % 2)]
        return _moved(_moved(genome, gene, 1), rng.choice(larger), -1) if larger else genome

    def units(self, genome: Genome) -> Units:
        """What stays of the model."""
        whole = Units.all(self.config)
        blocks: list[BlockUnits] = []
        for layer in range(self.config.num_layers):
            blocks.append(self.levels.units(layer, genome[2 * layer], genome[2 * layer + 1]))
        return replace(whole, blocks=tuple(blocks))


def _moved(genome: Genome, gene: int, by: int) -> Genome:
    return (*genome[:gene], genome[gene] + by, *genome[gene + 1 :])


@dataclass(frozen=True)
class Stage:
    """One round of selection in a generation."""

    survivors: int
    fitness_tokens: int
    training_tokens: int
    """Every candidate is trained on so many before it is judged; 0: it is judged as the database has it."""


Score = Callable[[Sequence[Genome], Stage, random.Random], list[float]]
"""Divergences from the whole model, of all candidates on the same text, which the generator draws. Collective."""


@dataclass(frozen=True)
class Generation:
    """What a generation found."""

    parent: Genome
    fitness: float
    """Of the parent, on the last stage's text."""
    replaced: bool
    """Whether a child took the parent's place."""
    tried: int
    """Different children."""


def next_generation(
    space: Space,
    parent: Genome,
    number: int,
    seed: int,
    stages: Sequence[Stage],
    offspring: int,
    most: int,
    trade: bool,
    score: Score,
) -> Generation:
    """Generation `number`, a pure function of the parent and of what `score` says. Collective."""
    rng = random.Random(f"{seed}/{number}")
    children = list(dict.fromkeys(space.mutate(parent, rng, most, trade) for _ in range(offspring)))
    pool = [child for child in children if child != parent]
    scores: list[float] = []
    for stage in stages:
        if stage is stages[-1]:
            pool = [parent, *pool]
        draw = random.Random(rng.random())
        scores = [float("inf") if math.isnan(found) else found for found in score(pool, stage, draw)]
        order = sorted(range(len(pool)), key=lambda n: (scores[n], n))[: stage.survivors]
        pool, scores = [pool[n] for n in order], [scores[n] for n in order]
    return Generation(pool[0], scores[0], pool[0] != parent, len(children))
