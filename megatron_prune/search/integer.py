"""Choices by an integer program, which SciPy's HiGHS solves: levels of a database, and weights that stay dense.

Of a database of levels the divergence of every model with one half of one layer at another level is measured, and the
sum of those over all halves is lowered within the budget, exactly. It takes replacements to add up; evolution does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.search.fitness import Genome
from megatron_prune.search.space import Space

GAP = 1e-4
"""Share of the best worth that may be missed."""
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


def best_worth(worth: Sequence[float], sizes: Sequence[int], limit: int) -> list[int]:
    """Numbers of the items, in order, whose worths sum to the most, within 0.01%, while their sizes sum to at most
    `limit`; of items that are worth nothing none.
    """
    able = [number for number, value in enumerate(worth) if value > 0 and sizes[number] <= limit]
    able.sort(key=lambda number: worth[number] / sizes[number], reverse=True)
    chosen, room, bound = list[int](), limit, 0.0
    for number in able:  # each in turn, the best for its size first; `bound`: were a part of one allowed
        if sizes[number] <= room:
            chosen.append(number)
            room -= sizes[number]
        elif not bound:
            bound = sum(worth[each] for each in chosen) + worth[number] * room / sizes[number]
    if sum(worth[number] for number in chosen) < (1 - GAP) * bound:
        chosen = _best_by_program(able, worth, sizes, limit)
    return sorted(chosen)


def _best_by_program(able: Sequence[int], worth: Sequence[float], sizes: Sequence[int], limit: int) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    most = max(worth[number] for number in able)  # the solver's tolerances are no shares
    solved = milp(
        c=-np.array([worth[number] / most for number in able]),
        integrality=np.ones(len(able)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array([[sizes[number] / limit for number in able]]), -np.inf, 1),
        options={"mip_rel_gap": GAP},
    )
    assert solved.x is not None, f"leaving all out is a solution: {solved.message}"
    chosen = [number for number, x in zip(able, solved.x, strict=True) if x > 0.5]
    while sum(sizes[number] for number in chosen) > limit:  # the solver's sizes are rounded
        chosen.remove(min(chosen, key=lambda number: worth[number] / sizes[number]))
    return chosen


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
