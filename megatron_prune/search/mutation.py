"""Children of a genome: a few switches, one half of a layer a level smaller and another a level larger.

Which halves is drawn evenly (DarwinLM, arXiv:2502.07780, section 3.2). Where it was measured what single replacements
cost (`integer.py`) they are drawn by it: near the optimum of their sum almost every switch makes things worse, and the
few that may not are those whose costs are close.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from megatron_prune.search.fitness import Genome
from megatron_prune.search.space import Space, moved

RETRIES = 100


class Mutation:
    """Draws children within the budget."""

    def __init__(self, space: Space, most: int, trade: bool, singles: Sequence[Sequence[float]] | None = None) -> None:
        """Up to `most` switches; without `trade` attention and MLP keep their shares.

        `singles`: the divergence of the model in which only one gene has each of its levels, by gene and level.
        """
        self.space, self.most, self.trade, self.singles = space, most, trade, singles

    def __call__(self, parent: Genome, rng: random.Random) -> Genome:
        """Another genome; the parent itself where none was found."""
        for _ in range(RETRIES):
            child = parent
            for _ in range(min(rng.randint(1, self.most), rng.randint(1, self.most))):
                child = self._switched(child, rng)
            if self.trade:
                child = self._filled(child, rng)
            if child != parent and self.space.fits(child):
                return child
        return parent

    def _switched(self, genome: Genome, rng: random.Random) -> Genome:
        """One half a level smaller, another a level larger."""
        gene = self._smaller(genome, rng)
        larger = [g for g in range(len(genome)) if genome[g] and g != gene and (self.trade or g % 2 == gene % 2)]
        return moved(moved(genome, gene, 1), self._larger(genome, larger, rng), -1) if larger else genome

    def _filled(self, genome: Genome, rng: random.Random) -> Genome:
        """Smaller until it fits, then as large as fits."""
        while self.space.cost(genome) > self.space.budget.limit:
            genome = moved(genome, self._smaller(genome, rng), 1)
        return self.space.fill(genome, lambda found, genes: self._larger(found, genes, rng))

    def _smaller(self, genome: Genome, rng: random.Random) -> int:
        """A gene to be one level smaller, likelier one that costs little."""
        genes = [g for g in range(len(genome)) if genome[g] < self.space.last[g]]
        return self._drawn(genes, [self._slope(g, genome[g]) for g in genes], rng)

    def _larger(self, genome: Genome, genes: Sequence[int], rng: random.Random) -> int:
        """One of these genes to be one level larger, likelier one that brings much."""
        return self._drawn(genes, [-self._slope(g, genome[g] - 1) for g in genes], rng)

    def _slope(self, gene: int, level: int) -> float:
        """Divergence that the next level of a gene adds alone, for each unit of cost that it saves."""
        if self.singles is None:
            return 0.0
        saves, scores = self.space.saves[gene], self.singles[gene]
        saved = saves[level + 1] - saves[level]
        return (scores[level + 1] - scores[level]) / saved if saved > 0 else math.inf

    def _drawn(self, genes: Sequence[int], costs: Sequence[float], rng: random.Random) -> int:
        """Evenly, or with a probability that falls as 1 / rank of the cost, which needs no scale and excludes none."""
        if self.singles is None:
            return rng.choice(genes)
        order = sorted(range(len(genes)), key=lambda n: (costs[n], n))
        weights = [1 / (rank + 1) for rank in range(len(genes))]
        return genes[rng.choices(order, weights)[0]]
