"""Evolution with one parent (DarwinLM, Tang et al. 2025, arXiv:2502.07780, section 3.2).

Children differ from the parent by a few switches of levels; several rounds of selection on more and more text leave one
of them, which then races the parent. The paper draws text anew in each round and takes the lowest number; that makes a
walk at random of it near an optimum, where nearly all children are a little worse and the luckiest one wins. Here every
candidate is judged on the same list of held-out windows, of which it gets more as it survives, and takes the parent's
place only when it is better on all of them by more than the error of the difference. So the parent's divergence on the
list falls from generation to generation, and the last parent is the best one. Generic libraries of evolutionary
algorithms would bring populations, crossover and real-valued genes, none of which this has, and not the growing rounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_prune.search.fitness import Genome
from megatron_prune.search.racing import better, looks, lowest_first, standard_error


@dataclass(frozen=True)
class Stage:
    """One round of selection in a generation."""

    survivors: int
    fitness_tokens: int
    training_tokens: int
    """Every candidate is trained on so many before it is judged; 0: it is judged as the database has it."""


class Judging(Protocol):
    """What tells how far candidates are from the whole model, window by window."""

    windows: int
    """Of the list."""
    length: int
    """Tokens of each."""

    def __call__(self, genomes: Sequence[Genome], trained: int, windows: int) -> list[list[float]]:
        """Divergences, nats per token, on the first `windows`, after so many tokens of training. Collective."""


@dataclass(frozen=True)
class Generation:
    """What a generation found."""

    parent: Genome
    fitness: float
    """Of the parent, mean of all windows of the list: comparable between generations."""
    error: float
    """Standard error of that over windows."""
    replaced: bool
    """Whether a child took the parent's place."""
    tried: int
    """Different children."""


def next_generation(
    parent: Genome,
    number: int,
    seed: int,
    stages: Sequence[Stage],
    offspring: int,
    mutate: Callable[[Genome, random.Random], Genome],
    judge: Judging,
) -> Generation:
    """Generation `number`, a pure function of the parent and of what `judge` says. Collective."""
    rng = random.Random(f"{seed}/{number}")
    children = list(dict.fromkeys(mutate(parent, rng) for _ in range(offspring)))
    pool = [child for child in children if child != parent]
    for stage in stages if pool else ():
        found = judge(pool, stage.training_tokens, windows_of(stage, judge))
        order = sorted(range(len(pool)), key=lambda n: (lowest_first(found[n]), n))
        pool = [pool[n] for n in order[: stage.survivors]]
    replaced = bool(pool) and _wins(pool[0], parent, stages[-1], judge)
    best = pool[0] if replaced else parent
    (scores,) = judge([best], stages[-1].training_tokens, judge.windows)
    return Generation(best, lowest_first(scores), standard_error(scores), replaced, len(children))


def windows_of(stage: Stage, judge: Judging) -> int:
    """Of the list, those that a stage judges by."""
    return min(max(1, round(stage.fitness_tokens / judge.length)), judge.windows)


def _wins(child: Genome, parent: Genome, stage: Stage, judge: Judging) -> bool:
    """Whether a child is better than the parent; it gets more windows as long as it is ahead.

    Candidates that are trained are judged on all windows at once: they would be trained again for more.
    """
    trained = stage.training_tokens
    (known,) = judge([parent], trained, judge.windows)
    first = judge.windows if trained else windows_of(stage, judge)
    scores: list[float] = []
    for count in looks(first, judge.windows):
        (scores,) = judge([child], trained, count)
        if not lowest_first(scores) < lowest_first(known[:count]):
            return False
    return better(scores, known)
