"""The other search over a database of levels: an integer program on what single replacements cost.

The divergence of every model with one half of one layer at another level is measured, and the sum of those over all
halves is lowered within the budget, exactly, by SciPy's HiGHS. It takes replacements to add up; evolution does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.search.fitness import Genome
from megatron_prune.search.space import Space

AT_A_TIME = 64
"""So many candidates share a pass; each holds hidden states."""


def single_replacements(
    space: Space,
    judged: Callable[[Sequence[Genome]], list[float]],
    known: Sequence[float],
    between: Callable[[list[float], int], None],
) -> list[list[float]]:
    """Divergence of the model in which only one gene has each of its levels, by gene and level. Collective.

    `known`: the first of them, gene by gene, from an earlier call. `between` is called after each share with those that
    are known by then, and the number of all.
    """
    whole: Genome = (0,) * len(space.genes)
    changed = [(gene, level) for gene, last in enumerate(space.last) for level in range(1, last + 1)]
    genomes = [(*whole[:gene], level, *whole[gene + 1 :]) for gene, level in changed]
    found = list(known)
    while len(found) < len(genomes):
        found += judged(genomes[len(found) : len(found) + AT_A_TIME])
        between(found, len(genomes))
    scores = [[0.0] * (last + 1) for last in space.last]
    for (gene, level), score in zip(changed, found, strict=True):
        scores[gene][level] = score
    return scores


def best_sum(space: Space, scores: Sequence[Sequence[float]]) -> Genome:
    """The genome within the budget whose scores sum to the least."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    places = [(gene, level) for gene, of_gene in enumerate(scores) for level in range(len(of_gene))]
    one_each = np.zeros((len(scores), len(places)))
    for column, (gene, _) in enumerate(places):
        one_each[gene, column] = 1
    saves = np.array([float(space.saves[gene][level]) for gene, level in places])
    needed = float(space.whole - space.budget.limit)
    keeps = np.zeros((2, len(places)))  # of attention and of MLPs: anything but none
    for column, (gene, level) in enumerate(places):
        keeps[gene % 2, column] = level < space.last[gene]
    solved = milp(
        c=np.array([scores[gene][level] for gene, level in places]),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(saves[None] / needed, 1, np.inf),
            LinearConstraint(keeps, 1, np.inf),
        ],
        options={"mip_rel_gap": 0},
    )
    if solved.x is None:
        raise UserError(f"target {space.budget}: the integer program found no model so small: {solved.message}")
    chosen = [places[column] for column in np.flatnonzero(solved.x > 0.5)]
    genome = tuple(level for _, level in sorted(chosen))
    if not space.fits(genome):
        raise UserError(f"target {space.budget}: the program's answer costs {space.cost(genome)}, a rounding too much")
    return genome
